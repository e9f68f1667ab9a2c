"""Ranks without processes: threads that really wait for each other."""

from __future__ import annotations

import threading

import pytest


@pytest.fixture(scope="session")
def on_ranks():
    def on_ranks(parts, work):
        """`work(rank, episodes, gather)` in one thread per rank, with a `gather` that really waits for the others."""
        barrier, board, results, errors = threading.Barrier(len(parts), timeout=60), [None] * len(parts), {}, []

        def run(rank):
            def gather(items):
                board[rank] = items
                barrier.wait()
                everyone = [item for part in board for item in part]
                barrier.wait()
                return everyone

            try:
                results[rank] = work(rank, parts[rank], gather)
            except Exception as error:
                errors.append(error)
                barrier.abort()

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(parts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return [results[rank] for rank in range(len(parts))]

    return on_ranks

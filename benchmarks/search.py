"""What search costs: in memory and in a bank on disk, with the embedder that ships in a package.

OMP_NUM_THREADS=1 python benchmarks/search.py                 # about 4 minutes, most of them to embed 100,000 entries
python benchmarks/search.py --disk 20000                      # a smaller bank on disk
python benchmarks/search.py --bank FILE --json figures.json   # keeps the bank: the next run need not embed it again

Entries and questions are generated (benchmarks/search_text.py), all distinct; a question is asked once, so that no
cache knows it. Times of a search include embedding the question unless they say otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
from search_text import facts, questions

from memfactory.episode import Operation
from memfactory.memory.entries import Entry
from memfactory.memory.sqlite import SqliteBank, SqliteStore
from memfactory.search import CachedEmbedder, DenseSearcher, Hit, StoredSearcher, build_searcher, recall
from memfactory.search.build import EmbedderOptions, build_embedder

TARGETS = {"memory.hybrid_p50_ms": 5.0, "disk.hybrid_p50_ms": 20.0}
"""At most, for 10,000 entries in memory and 100,000 on disk."""

HYBRID = {"name": "hybrid"}


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def spread(name: str, work: Callable[[str], object], asked: Sequence[str]) -> dict[str, float]:
    """Median and 95th percentile over `asked`, and the median of the processor's time, in ms.

    Under OMP_NUM_THREADS=1 the last says what the first would be on a machine that has nothing else to do.
    """
    times, used = [], []
    for question in asked:
        start, busy = time.perf_counter(), time.thread_time()
        work(question)
        times.append((time.perf_counter() - start) * 1e3)
        used.append((time.thread_time() - busy) * 1e3)
    return {
        f"{name}_p50_ms": statistics.median(times),
        f"{name}_p95_ms": sorted(times)[int(0.95 * len(times))],
        f"{name}_cpu_p50_ms": statistics.median(used),
    }


def memory(size: int, count: int, asked: Iterator[str], use: CachedEmbedder) -> dict[str, float]:
    """A bank in memory, as in training."""
    entries = [Entry(f"e{number}", text) for number, text in enumerate(islice(facts(), size), start=1)]
    figures = spread("query_embedding", lambda question: use.embed([question]), list(islice(asked, count)))
    for name in ("bm25", "dense", "hybrid"):
        searcher = build_searcher({"name": name}, embedder=use)
        took = seconds(lambda: searcher.put(entries))  # noqa: B023 - called at once
        figures |= {f"memory.{name}_index_s": took} if name == "bm25" else {}
        figures |= spread(f"memory.{name}", lambda question: searcher.search(question, 10), list(islice(asked, count)))  # noqa: B023
    known = list(islice(asked, count))
    use.embed(known)
    return figures | spread("memory.hybrid_without_embedding", lambda question: searcher.search(question, 10), known)


def disk(size: int, count: int, path: Path, use: CachedEmbedder) -> dict[str, float]:
    """A bank on disk, as in serving."""
    figures: dict[str, float] = {}
    with SqliteStore(path) as store:
        bank = store.bank("bench")
        if not len(bank):
            additions = [Operation("ADD", text=text) for text in islice(facts(), size)]
            figures["disk.write_texts_s"] = seconds(lambda: bank.apply_all(additions))
            figures["disk.file_without_vectors_mb"] = file_size(path)
            searcher = StoredSearcher(bank, HYBRID, embedder=use)
            figures["disk.embed_and_write_vectors_s"] = seconds(searcher.refresh)
        figures["disk.entries"] = len(bank)
        figures["disk.file_mb"] = file_size(path)
    # a process of its own, so that memory is that of the index, and nothing is loaded yet
    command = [sys.executable, __file__, "--serve", str(path), "--queries", str(count), "--skip", str(5 * count)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return figures | json.loads(answer)


def serve(path: Path, count: int, asked: Iterator[str]) -> dict[str, float]:
    """Figures of a process that opens a bank which has its vectors."""
    with path.open("rb") as file:  # what the system has kept of the file in memory
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = resident()
    figures = {"embedder.load_s": seconds(lambda: build_embedder(EmbedderOptions()).embed(["a first text"]))}
    use, started = build_embedder(EmbedderOptions()), resident()
    with SqliteStore(path) as store:
        bank = store.bank("bench")
        searcher = StoredSearcher(bank, HYBRID, embedder=use)
        figures["disk.load_s"] = seconds(searcher.refresh)
        figures["disk.first_search_ms"] = seconds(lambda: searcher.search(next(asked), 10)) * 1e3
        figures |= {"disk.index_mb": resident() - started, "embedder.mb": started - before}

        def ask(question: str) -> list[Hit]:
            return searcher.search(question, 10)

        figures |= spread("disk.hybrid", ask, list(islice(asked, count)))
        known = list(islice(asked, count))
        use.embed(known)
        figures |= spread("disk.hybrid_without_embedding", ask, known)
        figures |= accuracy(bank, searcher, list(islice(asked, min(count, 100))), use)
        figures |= spread("disk.fts5_match", lambda question: bank.match(question, 10), list(islice(asked, 50)))
        texts, fork = facts(seed=2), bank.fork()  # a fork, so that the bank is the same at the next run
        searcher = searcher.fork(fork)
        searcher.search(next(asked), 10)

        def add_and_ask(question: str) -> list[Hit]:
            fork.apply(Operation("ADD", text=next(texts)))
            return searcher.search(question, 10)

        figures |= spread("disk.add_then_hybrid", add_and_ask, list(islice(asked, min(count, 100))))
        fork.discard()
        return figures


def accuracy(
    bank: SqliteBank, searcher: StoredSearcher, asked: Sequence[str], use: CachedEmbedder
) -> dict[str, float]:
    """How much of an exact search the search in two steps finds."""
    entries = bank.entries()
    figures = {}
    exact_hybrid = StoredSearcher(bank, HYBRID, embedder=use)
    for part in exact_hybrid.parts:
        if isinstance(part, DenseSearcher):
            part.exact_up_to = len(entries)
    pairs = [(exact_hybrid.search(question, 10), searcher.search(question, 10)) for question in asked]
    figures["disk.recall_hybrid_10"] = mean_recall(pairs, 10)
    exact, fast = (
        next(part for part in one.parts if isinstance(part, DenseSearcher)) for one in (exact_hybrid, searcher)
    )
    for k in (10, 100):
        pairs = [(exact.search(question, k), fast.search(question, k)) for question in asked]
        figures[f"disk.recall_dense_{k}"] = mean_recall(pairs, k)
    figures |= spread("disk.dense_exact_without_embedding", lambda question: exact.search(question, 10), asked)
    return figures | spread("disk.dense_without_embedding", lambda question: fast.search(question, 10), asked)


def mean_recall(pairs: Sequence[tuple[Sequence[Hit], Sequence[Hit]]], k: int) -> float:
    return statistics.mean(share for exact, found in pairs if (share := recall(exact, found, k)) is not None)


def file_size(path: Path) -> float:
    """With its log, MB."""
    return sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*")) / 1e6


def resident() -> float:
    """Memory of this process, MB."""
    return float(psutil.Process().memory_info().rss) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=int, default=10_000, help="entries of the bank in memory (default: 10000)")
    parser.add_argument(
        "--disk", type=int, default=100_000, help="entries of the bank on disk (default: 100000; 0: none)"
    )
    parser.add_argument("--queries", type=int, default=300, help="questions for each figure (default: 300)")
    parser.add_argument("--bank", type=Path, help="file of the bank on disk, used again where it is there (temporary)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    asked = islice(questions(), options.skip, None)
    if options.serve:
        print(json.dumps(serve(options.serve, options.queries, asked)))
        return
    use = build_embedder(EmbedderOptions())
    figures = memory(options.memory, options.queries, asked, use)
    with tempfile.TemporaryDirectory() as folder:
        if options.disk:
            figures |= disk(options.disk, options.queries, options.bank or Path(folder, "bank.db"), use)
    for name, value in figures.items():
        goal = TARGETS.get(name)
        target = "" if goal is None else f"  target at most {goal:g}: {'met' if value <= goal else 'MISSED'}"
        print(f"{name:44}{value:>10,.3f}{target}")
    print(f"{'load average of the last minute':44}{os.getloadavg()[0]:>10,.1f}  on {os.cpu_count()} processors")
    if options.json:
        about: dict[str, Any] = {"memory": options.memory, "disk": options.disk, "queries": options.queries}
        options.json.write_text(json.dumps(about | {"figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""What banks in PostgreSQL and indexes in LanceDB cost: adds and queries.

python benchmarks/large_banks.py --dsn "dbname=bench"          # the schema memfactory_bench is made and removed
python benchmarks/large_banks.py --dsn "dbname=bench" --others 20
python benchmarks/large_banks.py --lance
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence

import numpy as np
from bank import additions, milliseconds, per_second, updates

from memfactory.episode import Operation
from memfactory.errors import StoreError
from memfactory.memory.bank import EntryBank
from memfactory.memory.entries import Bank, Entry
from memfactory.search import CachedEmbedder, build_embedder, recall
from memfactory.search.base import content
from memfactory.search.build import EmbedderOptions

QUESTIONS = [f"where does person {number} live" for number in range(7, 2000, 100)]


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def apply(bank: Bank, operations: Sequence[Operation]) -> None:
    for operation in operations:
        if bank.apply(operation).error:
            raise AssertionError(operation)


def postgres(dsn: str, size: int, others: int, embedder: CachedEmbedder) -> dict[str, float]:
    """Figures of a bank of `size` entries beside `others` banks as large."""
    from memfactory.memory.postgres import PostgresStore
    from memfactory.memory.postgres_vectors import PostgresVectors

    with PostgresStore(dsn, schema="memfactory_bench") as store:
        try:
            for number in range(others):
                store.bank(f"other {number}").apply_all(additions(size))
            bank = store.bank("bench")
            figures = {"postgres.apply_all_per_second": per_second(size, lambda: bank.apply_all(additions(size)))}
            figures["postgres.add_ms"] = 1e3 / per_second(200, lambda: apply(bank, additions(200)))
            figures["postgres.update_ms"] = 1e3 / per_second(200, lambda: apply(bank, updates(200, size)))
            with store.connection() as connection:
                connection.execute("ANALYZE")  # which the server does by itself within a minute
            point = bank.snapshot()
            apply(bank, updates(100, size))
            late = bank.snapshot()

            def back_and_forth() -> None:
                bank.restore(point)
                bank.restore(late)

            figures |= {
                "postgres.get_ms": milliseconds(lambda: bank.get(f"e{size // 2}"), 200),
                "postgres.match_rare_word_ms": milliseconds(lambda: bank.match(f"{size // 3}", 10), 30),
                "postgres.match_word_in_every_entry_ms": milliseconds(lambda: bank.match("lives", 10), 20),
                "postgres.match_question_ms": milliseconds(lambda: bank.match(QUESTIONS[0], 10), 20),
                "postgres.entries_ms": milliseconds(bank.entries, 10),
                "postgres.restore_over_100_changes_ms": milliseconds(back_and_forth, 10) / 2,
                "postgres.fork_ms": milliseconds(bank.fork, 10),
            }
            try:
                index = PostgresVectors(bank, embedder, model="use")
            except StoreError as error:
                print(f"(no search by meaning: {error.why})")
                return figures
            figures["pgvector.embed_and_store_per_second"] = size / seconds(index.refresh)
            with store.connection() as connection:
                connection.execute("ANALYZE")
            figures["pgvector.search_ms"] = milliseconds(lambda: index.search(QUESTIONS[0], 10), 20)
            return figures
        finally:
            with store.connection() as connection:
                connection.execute("DROP SCHEMA memfactory_bench CASCADE")


def lance(size: int, embedder: CachedEmbedder) -> dict[str, float]:
    """Figures of an index of `size` entries; the vectors are computed before, so that only LanceDB is timed."""
    from memfactory.search.lance import LanceSearcher

    bank = EntryBank("bench")
    for operation in additions(size):
        bank.apply(operation)
    single = [Entry(f"e{number}", f"person {number} moved", owner="bench") for number in range(1, 101)]
    with tempfile.TemporaryDirectory() as folder:
        both = LanceSearcher(folder, "bench", embedder)
        by_words = LanceSearcher(folder, "bench", embedder, weights=(1, 0), stopwords=frozenset())
        by_meaning = LanceSearcher(folder, "bench", embedder, weights=(0, 1))
        embedder.embed([content(entry) for entry in (*bank.entries(), *single)])
        figures = {"lance.put_all_per_second": size / seconds(lambda: both.put(bank.entries()))}
        figures["lance.put_ms"] = 10 * seconds(lambda: [both.put([entry]) for entry in single])
        both.tidy()
        for name, index in (("words", by_words), ("meaning", by_meaning), ("both", both)):
            figures[f"lance.search_{name}_ms"] = milliseconds(lambda index=index: index.search(QUESTIONS[0], 10), 20)  # type: ignore[misc]
        exact = [by_meaning.search(question, 10) for question in QUESTIONS]
        figures["lance.approximate_seconds"] = seconds(by_meaning.approximate)
        found = [by_meaning.search(question, 10) for question in QUESTIONS]
        shares = [recall(a, b, 10) for a, b in zip(exact, found, strict=True)]
        figures["lance.approximate_recall"] = float(np.mean([share for share in shares if share is not None]))
        figures["lance.approximate_search_ms"] = milliseconds(lambda: by_meaning.search(QUESTIONS[0], 10), 20)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=10_000, help="entries of the bank (default: 10000)")
    parser.add_argument("--dsn", help="a database of PostgreSQL that may be written to")
    parser.add_argument("--others", type=int, default=0, help="banks of other owners beside it, as large (default: 0)")
    parser.add_argument("--lance", action="store_true", help="measure LanceDB, in a temporary folder")
    options = parser.parse_args()
    embedder = build_embedder(EmbedderOptions())
    figures: dict[str, float] = {}
    if options.dsn is not None:
        figures |= postgres(options.dsn, options.size, options.others, embedder)
    if options.lance:
        figures |= lance(options.size, embedder)
    for name, value in figures.items():
        print(f"{name:40}{value:>14,.4f}" if value < 1 else f"{name:40}{value:>14,.1f}")


if __name__ == "__main__":
    main()

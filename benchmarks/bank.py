"""What banks of entries cost: operations in memory and on disk, snapshots, forks, search.

python benchmarks/bank.py                        # about 15 seconds
python benchmarks/bank.py --folder DISK          # put the file of the store on the disk to be measured
python benchmarks/bank.py --json figures.json
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

from memfactory.episode import Operation
from memfactory.memory.bank import EntryBank
from memfactory.memory.sqlite import SqliteBank, SqliteStore

TARGETS = {
    "memory.add_per_second": (1e5, "at least"),
    "memory.update_per_second": (1e5, "at least"),
    "memory.fork_ms": (1.0, "at most"),
}
"""For a bank of 10,000 entries."""


def additions(count: int) -> list[Operation]:
    return [Operation("ADD", text=f"person {i} lives in town {i % 97}", key=f"person{i}.town") for i in range(count)]


def updates(count: int, size: int, seed: int = 0) -> list[Operation]:
    draw = random.Random(seed)
    return [Operation("UPDATE", f"e{draw.randint(1, size)}", f"moved to town {i}") for i in range(count)]


def per_second(count: int, work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return count / (time.perf_counter() - start)


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """Median of wall clock."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def memory(size: int, repeats: int) -> dict[str, float]:
    """Figures of an EntryBank; rates are the best of `repeats`, because other work on the machine only slows down."""
    grow, change = additions(size), updates(size, size)
    add_rates, update_rates, mixed_rates = [], [], []
    bank = EntryBank("bench")
    for _ in range(repeats):
        bank = EntryBank("bench")
        add_rates.append(per_second(size, lambda bank=bank: apply(bank, grow)))  # type: ignore[misc]
        update_rates.append(per_second(size, lambda bank=bank: apply(bank, change)))  # type: ignore[misc]
    for _ in range(repeats):
        fork = bank.fork()
        work = [Operation("DELETE", f"e{i}") for i in range(1, size, 2)] + additions(size // 2)
        mixed_rates.append(per_second(len(work), lambda fork=fork, work=work: apply(fork, work)))  # type: ignore[misc]
    tracemalloc.start()
    fork = bank.fork()
    empty, _ = tracemalloc.get_traced_memory()
    apply(fork, change[:10])
    changed, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    point = bank.snapshot()

    def list_after_a_change() -> None:
        bank.apply(Operation("UPDATE", "e1", "x"))
        bank.entries()

    return {
        "memory.add_per_second": max(add_rates),
        "memory.update_per_second": max(update_rates),
        "memory.delete_and_add_per_second": max(mixed_rates),
        "memory.snapshot_ms": milliseconds(bank.snapshot, 1000),
        "memory.fork_ms": milliseconds(bank.fork, 1000),
        "memory.restore_ms": milliseconds(lambda: bank.restore(point), 1000),
        "memory.entries_after_a_change_ms": milliseconds(list_after_a_change, 50),
        "memory.fork_bytes": float(empty),
        "memory.bytes_per_update_of_a_fork": (changed - empty) / 10,
    }


def apply(bank: EntryBank | SqliteBank, operations: Sequence[Operation]) -> None:
    for turn, operation in enumerate(operations):
        if bank.apply(operation, turn=turn).error:
            raise AssertionError(operation)


def disk(size: int, folder: Path) -> dict[str, float]:
    """Figures of a SqliteBank; every apply is flushed to the disk."""
    with SqliteStore(folder / "bank.db") as store:
        bank = store.bank("bench")
        bulk = per_second(size, lambda: bank.apply_all(additions(size)))
        single = additions(200)
        add_ms = 1e3 / per_second(len(single), lambda: apply(bank, single))
        point = bank.snapshot()
        apply(bank, updates(100, size))
        late = bank.snapshot()

        def back_and_forth() -> None:
            bank.restore(point)
            bank.restore(late)

        return {
            "sqlite.apply_all_per_second": bulk,
            "sqlite.apply_ms": add_ms,
            "sqlite.get_ms": milliseconds(lambda: bank.get(f"e{size // 2}"), 200),
            "sqlite.match_rare_word_ms": milliseconds(lambda: bank.match(f"{size // 3}", 10), 50),
            "sqlite.match_word_in_every_entry_ms": milliseconds(lambda: bank.match("lives", 10), 20),
            "sqlite.entries_ms": milliseconds(bank.entries, 10),
            "sqlite.snapshot_ms": milliseconds(bank.snapshot, 200),
            "sqlite.restore_over_100_changes_ms": milliseconds(back_and_forth, 10) / 2,
            "sqlite.fork_ms": milliseconds(bank.fork, 10),
            "sqlite.file_mb": sum(path.stat().st_size for path in folder.glob("bank.db*")) / 1e6,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=10_000, help="entries of the bank (default: 10000)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of the rates in memory; the best counts")
    parser.add_argument(
        "--folder", type=Path, help="where the file of the store is made (default: a temporary folder)"
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    figures = memory(options.size, options.repeats)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        figures |= disk(options.size, Path(folder))
    for name, value in figures.items():
        goal, direction = TARGETS.get(name, (None, ""))
        met = "" if goal is None else "met" if (value >= goal) == (direction == "at least") else "MISSED"
        target = "" if goal is None else f"  target {direction} {goal:g}: {met}"
        print(f"{name:40}{value:>14,.4f}{target}" if value < 1 else f"{name:40}{value:>14,.1f}{target}")
    if options.json:
        options.json.write_text(json.dumps({"size": options.size, "figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()

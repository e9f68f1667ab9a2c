"""What is kept between requests: nothing is read again, nobody waits for another's bank, and there is an end to it."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from memfactory.episode import Episode, Operation
from memfactory.memory.entries import Entry
from memfactory.memory.sqlite import SqliteBank, SqliteStore
from memfactory.policy.base import Sampling
from memfactory.search import BM25Searcher, SearchOptions
from memfactory.search.stored import IndexedBank
from memfactory.serve.desk import Asked, Desk, Replied, owner_of
from memfactory.serve.indexes import EACH, Indexes
from memfactory.serve.loading import Served, open_run
from memfactory.serve.memories import Memories
from memfactory.serve.transcript import ChatMessage

LARGE, SMALL = owner_of("large"), owner_of("small")
ENTRIES = 200


def asked(owner: str, *texts: str, memory: bool = False) -> Asked:
    return Asked(owner, [ChatMessage("user", text) for text in texts], Sampling(0.0), memory=memory)


def fill(file: Path, owner: str, count: int = ENTRIES) -> None:
    with SqliteStore(file) as store:
        store.bank(owner).apply_all([Operation("ADD", text=f"the dog sat on stone {n} .") for n in range(count)])


@pytest.fixture(scope="module")
def served(runs: dict[str, Path]) -> Served:
    return open_run(runs["bank"])


@pytest.fixture
def open_memories(tmp_path: Path) -> Iterator[Callable[..., Memories]]:
    opened: list[Memories] = []

    def open_(name: str = "memories.sqlite", **options: Any) -> Memories:
        opened.append(Memories(tmp_path / name, bank=True, **options))
        return opened[-1]

    yield open_
    for one in opened:
        one.close()


def forks(memories: Memories) -> int:
    with closing(sqlite3.connect(memories.path)) as file:
        (count,) = file.execute("SELECT COUNT(*) FROM banks WHERE name != ''").fetchone()
    return int(count)


def test_a_bank_is_read_and_indexed_once_and_then_only_what_is_new(
    served: Served, open_memories: Callable[..., Memories], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "memories.sqlite", LARGE)
    indexed: list[int] = []
    real = BM25Searcher.put

    def counting(self: BM25Searcher, entries: Sequence[Entry]) -> None:
        indexed.append(len(entries))
        real(self, entries)

    monkeypatch.setattr(BM25Searcher, "put", counting)
    for name in ("entries", "fork"):
        monkeypatch.setattr(SqliteBank, name, _counted(getattr(SqliteBank, name), read := list[str]()))
    desk = Desk(served, open_memories())

    async def main() -> None:
        await desk.answer(asked(LARGE, "the cat stood .", "which animal ?"), lambda text: None)
        assert (max(indexed), sum(indexed)) == (ENTRIES, ENTRIES + 1)
        del indexed[:], read[:]
        for number in range(3):
            await desk.answer(asked(LARGE, f"stone {number} .", "which stone ?"), lambda text: None)

    asyncio.run(main())
    assert sum(indexed) == 3 * 2  # a document and the last exchange, each time
    assert read == []


def _counted(real: Callable[..., Any], called: list[str]) -> Callable[..., Any]:
    def counting(*arguments: Any) -> Any:
        called.append(real.__name__)
        return real(*arguments)

    return counting


def test_while_a_bank_is_indexed_others_are_answered(
    served: Served, open_memories: Callable[..., Memories], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "memories.sqlite", LARGE)
    came, may_go_on = threading.Event(), threading.Event()
    real = BM25Searcher.put

    def slow(self: BM25Searcher, entries: Sequence[Entry]) -> None:
        if len(entries) >= ENTRIES:
            came.set()
            may_go_on.wait(30)
        real(self, entries)

    monkeypatch.setattr(BM25Searcher, "put", slow)
    desk = Desk(served, open_memories())

    async def main() -> Replied:
        large = asyncio.create_task(desk.answer(asked(LARGE, "which animal ?"), lambda text: None))
        await asyncio.to_thread(came.wait, 30)
        small = asyncio.create_task(desk.answer(asked(SMALL, "the cat stood .", "who ?"), lambda text: None))
        await asyncio.wait({small, large}, timeout=20, return_when=asyncio.FIRST_COMPLETED)
        try:
            assert small.done(), "it waits for a bank of somebody else"
            assert not large.done()
        finally:
            may_go_on.set()
        assert (await small).text
        return await large

    assert asyncio.run(main()).text


def test_a_memory_is_written_as_text_for_a_request_that_asks_for_it_alone(
    served: Served, open_memories: Callable[..., Memories]
) -> None:
    desk = Desk(served, memories := open_memories())

    async def main() -> tuple[Episode, Episode]:
        without = await desk.answer(asked(SMALL, "the cat stood .", "who ?"), lambda text: None)
        wanted = await desk.answer(asked(SMALL, "the dog sat .", "who ?", memory=True), lambda text: None)
        return without.episode, wanted.episode

    without, wanted = asyncio.run(main())
    assert without.memory == ""
    assert wanted.memory == memories.shown(SMALL)
    assert [line.partition(" ")[0] for line in wanted.memory.splitlines()] == ["e1:", "e2:", "assistant:", "e3:"]


@pytest.mark.parametrize("dropped", [False, True])
def test_what_is_kept_changes_no_answer(served: Served, open_memories: Callable[..., Memories], dropped: bool) -> None:
    """Against memories that keep nothing, over a conversation; with a request in it that is given up near its end."""
    kept, anew = open_memories("kept.sqlite"), open_memories("anew.sqlite", indexed=0)

    async def talk(memories: Memories) -> list[Any]:
        desk, said = Desk(served, memories), []
        for number, word in enumerate(["dog", "cat", "dog", "bird", "cat", "dog"]):
            if dropped and number in (2, 4):
                draft = memories.begin(SMALL, ())
                draft.store.apply(Operation("ADD", text=f"a {word} that nobody kept"))  # type: ignore[union-attr]
                if number == 2:  # or else only what is there is looked at
                    draft.store.searcher(SearchOptions()).search("dog", 3)  # type: ignore[union-attr]
                memories.drop(draft)
            reply = await desk.answer(
                asked(SMALL, f"the {word} stood on {number} .", f"which {word} ?"), lambda text: None
            )
            said += [(turn.messages, turn.completion_ids, turn.retrieved) for turn in reply.episode.turns]
        return [*said, memories.shown(SMALL)]

    assert asyncio.run(talk(kept)) == asyncio.run(talk(anew))
    assert (forks(kept), forks(anew)) == (1, 0)
    assert (len(kept.indexes), len(anew.indexes)) == (EACH + 11, 0)


def test_no_more_is_kept_than_allowed_and_what_is_forgotten_is_not(
    served: Served, open_memories: Callable[..., Memories], tmp_path: Path
) -> None:
    fill(tmp_path / "memories.sqlite", LARGE)
    limit = 2 * EACH + 10
    desk = Desk(served, memories := open_memories(indexed=limit))
    owners = [owner_of("user", str(number)) for number in range(4)]

    async def main() -> None:
        for owner in [*owners, LARGE]:
            await desk.answer(asked(owner, "the cat stood .", "who ?"), lambda text: None)
            assert 0 <= len(memories.indexes) <= limit
        assert forks(memories) == 0, "the last one is larger than the limit, and left no room for others"
        for owner in owners[:2]:
            await desk.answer(asked(owner, "the cat stood .", "who ?"), lambda text: None)
        assert forks(memories) == 2
        await desk.forget(owners[0])
        assert forks(memories) == 1
        assert len(memories.indexes) == EACH + 1
        again = await desk.answer(asked(owners[0], "the dog sat .", "who ?", memory=True), lambda text: None)
        assert again.episode.memory.splitlines() == ["e1: the dog sat ."]

    asyncio.run(main())


def test_a_change_that_another_process_made_is_seen(served: Served, open_memories: Callable[..., Memories]) -> None:
    desk = Desk(served, memories := open_memories())

    async def main() -> Episode:
        await desk.answer(asked(SMALL, "the cat stood .", "who ?"), lambda text: None)
        with SqliteStore(memories.path) as store:
            store.bank(SMALL).apply(Operation("ADD", text="the bird sang ."))
        return (await desk.answer(asked(SMALL, "which bird ?", memory=True), lambda text: None)).episode

    episode = asyncio.run(main())
    assert "the bird sang ." in episode.memory
    assert "the bird sang ." in [entry.text for entry in episode.turns[-1].retrieved]
    assert forks(memories) == 1


def test_who_asked_longest_ago_goes_first(tmp_path: Path) -> None:
    with SqliteStore(tmp_path / "banks.sqlite") as store:
        banks = {name: IndexedBank(store.bank(name)) for name in "abc"}
        indexes = Indexes(2 * EACH)
        assert indexes.bring(banks["a"]) == indexes.bring(banks["b"]) == []
        assert indexes.take("a") is banks["a"]
        assert indexes.take("a") is None
        assert indexes.bring(banks["a"]) == []
        assert indexes.bring(banks["c"]) == [banks["b"]]
        other = IndexedBank(store.bank("a"))
        assert indexes.bring(other) == [banks["a"]]
        assert indexes.empty() == [banks["c"], other]
        assert len(indexes) == 0

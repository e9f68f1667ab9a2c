"""A request that is given up at its last moment, and one whose memory cannot be written."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from memfactory.errors import StoreError
from memfactory.policy.base import Sampling
from memfactory.serve.desk import Asked, Desk, owner_of
from memfactory.serve.loading import Served, open_run
from memfactory.serve.memories import Memories
from memfactory.serve.transcript import ChatMessage

OWNER = owner_of("anna")
ASKED = Asked(
    OWNER, [ChatMessage("user", "the old dog stood ."), ChatMessage("user", "which animal ?")], Sampling(0.0)
)


class Late(Memories):
    """Waits within its commit, or fails in the middle of it."""

    fails = False

    def __init__(self, path: Path) -> None:
        super().__init__(path, bank=True)
        self.came, self.may_go_on = threading.Event(), threading.Event()

    def keep(self, *arguments: Any) -> None:
        with self._store.transaction() as connection:
            super().keep(*arguments)
            if self.fails:
                raise StoreError("the disk is full")
            self.came.set()
            assert self.may_go_on.wait(30)
            assert connection.in_transaction


@pytest.fixture
def late(tmp_path: Path) -> Iterator[Late]:
    memories = Late(tmp_path / "memories.sqlite")
    yield memories
    memories.close()


@pytest.fixture(scope="module")
def served(runs: dict[str, Path]) -> Served:
    return open_run(runs["bank"])


def drafts(memories: Memories) -> int:
    with closing(sqlite3.connect(memories.path)) as file:
        (count,) = file.execute("SELECT COUNT(*) FROM banks WHERE name != ''").fetchone()
    return int(count)


def test_a_request_that_is_given_up_while_it_is_committed_is_answered(served: Served, late: Late) -> None:
    async def main() -> str:
        desk = Desk(served, late)
        work = asyncio.create_task(desk.answer(ASKED, lambda text: None))
        await asyncio.to_thread(late.came.wait, 30)
        work.cancel()
        await asyncio.sleep(0.05)
        late.may_go_on.set()
        return (await work).text

    assert asyncio.run(main())
    assert late.shown(OWNER).splitlines()[0].endswith("the old dog stood .")
    assert drafts(late) == 1, "it stands for the next request"
    late.close()
    assert drafts(late) == 0


def test_a_memory_that_cannot_be_written_stays_as_it_was(served: Served, late: Late) -> None:
    late.fails = True
    desk = Desk(served, late)
    with pytest.raises(StoreError, match="disk is full"):
        asyncio.run(desk.answer(ASKED, lambda text: None))
    assert late.shown(OWNER) == ""
    assert drafts(late) == 0

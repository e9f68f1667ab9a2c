"""`Memories`: what a served agent remembers of each owner, and what it has read, in one SQLite file.

A request works on a draft. What it changes counts when it is kept: the memory, the marks of what was read and the
exchange with its answer change in one transaction, which is on the disk before the answer is sent. A draft that is
dropped, or that a killed process leaves behind, changes nothing.

Agents over a bank have a :class:`~memfactory.memory.sqlite.SqliteBank` in the same file, and their drafts are forks of
it; agents with one text have a row here. A fork that was kept stands for the owner's next request, see
:class:`~memfactory.serve.indexes.Indexes`; one that was dropped is gone, so that whoever still works with it changes
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from memfactory.agents.bank_agent import text_of
from memfactory.errors import StoreError
from memfactory.memory.sqlite import SqliteBank, SqliteStore, decoded, encoded
from memfactory.memory.text import TextMemory
from memfactory.search.stored import IndexedBank
from memfactory.serve.indexes import Indexes
from memfactory.serve.transcript import ChatMessage, Exchange, Plan

try:
    import fcntl
except ImportError:  # not on Windows: two processes on one file are then nobody's to notice
    fcntl = None  # type: ignore[assignment]

TABLES = (
    # what is NULL is not there yet; text is BLOB where it holds what UTF-8 cannot (`encoded`)
    """CREATE TABLE IF NOT EXISTS served_memories (
        owner INTEGER PRIMARY KEY REFERENCES owners (id),
        text TEXT NOT NULL,                   -- of an agent that keeps one text
        question TEXT, name TEXT, answer TEXT, asked BLOB, replied BLOB -- the exchange that nobody has read yet
    )""",
    """CREATE TABLE IF NOT EXISTS served_read (
        owner INTEGER NOT NULL REFERENCES owners (id),
        mark BLOB NOT NULL,
        PRIMARY KEY (owner, mark)
    ) WITHOUT ROWID""",
    "CREATE TABLE IF NOT EXISTS served_drafts (owner TEXT NOT NULL, fork TEXT NOT NULL PRIMARY KEY)",
    """CREATE TRIGGER IF NOT EXISTS served_owner_removed AFTER DELETE ON owners BEGIN
        DELETE FROM served_memories WHERE owner = old.id;
        DELETE FROM served_read WHERE owner = old.id;
        DELETE FROM served_drafts WHERE owner = old.owner;
    END""",
)
INDEXED = 100_000
"""Entries of all owners together that stay in memory between requests."""
_AT_ONCE = 500
"""Marks in one query: SQLite takes 999 parameters in its oldest builds."""


@dataclass(frozen=True, slots=True)
class Draft:
    """An owner's memory for one request."""

    owner: str
    store: IndexedBank | TextMemory
    """What the agent is given, and writes to."""
    read: frozenset[bytes]
    """Which of the marks asked for were read before."""
    last: Exchange | None
    """The exchange that nobody has read yet."""


class Memories:
    """The memories of many owners in one file, which one process at a time may serve.

    Args:
        path: the file; created where there is none.
        bank: whether the agent keeps a bank; else one text.
        indexed: entries of all owners together that stay in memory between requests.

    Raises:
        StoreError: the file cannot be opened, or another process serves it.
    """

    def __init__(self, path: Path, *, bank: bool, indexed: int = INDEXED) -> None:
        self.path, self.bank, self.indexes = path, bank, Indexes(indexed)
        self._held = ExitStack()
        self._held.enter_context(_alone(path))
        try:
            self._store = SqliteStore(path)
            self._drafts = SqliteStore(path, flush=False)  # a fork is made and changed without waiting for the disk
            with self._store.guard("opened"), self._store.transaction() as connection:
                for statement in TABLES:
                    connection.execute(statement)
                left = connection.execute("SELECT owner, fork FROM served_drafts").fetchall()
                for owner, fork in left:  # of a process that was killed
                    self._discard(decoded(owner), fork)
        except BaseException:
            self._held.close()
            raise

    def begin(self, owner: str, marks: Sequence[bytes]) -> Draft:
        """A draft of what `owner` remembers, and what is known of `marks`. To be kept or dropped.

        Raises:
            StoreError: the storage failed.
        """
        with self._store.guard("read"):
            connection = self._store.connection()
            read: set[bytes] = set()
            for at in range(0, len(marks), _AT_ONCE):
                part = marks[at : at + _AT_ONCE]
                query = (
                    "SELECT mark FROM served_read JOIN owners ON owners.id = served_read.owner"
                    f" WHERE owners.owner = ? AND mark IN ({', '.join('?' * len(part))})"
                )
                read.update(mark for (mark,) in connection.execute(query, (encoded(owner), *part)))
            found = connection.execute(
                "SELECT text, question, name, answer, asked, replied FROM served_memories"
                " JOIN owners ON owners.id = served_memories.owner WHERE owners.owner = ?",
                (encoded(owner),),
            ).fetchone()
        text, last = "", None
        if found is not None:
            text = decoded(found[0])
            if found[1] is not None:
                question, name, answer = map(decoded, found[1:4])
                last = Exchange(ChatMessage("user", question, name), answer, *found[4:])
        store = self._draft(owner) if self.bank else TextMemory(text)
        return Draft(owner, store, frozenset(read), last)

    def keep(self, draft: Draft, plan: Plan, exchange: Exchange) -> None:
        """Make `draft` what its owner remembers; on the disk when it returns.

        Args:
            plan: whose marks are read now.
            exchange: the question and its answer, for the next request to read.

        Raises:
            StoreError: the storage failed; everything is as before the request.
        """
        text = ""
        with self._store.guard("written"), self._store.transaction() as connection:
            own = self._store.bank(draft.owner)
            if isinstance(draft.store, IndexedBank):
                own.restore(draft.store.snapshot())
                for old in self.indexes.bring(draft.store):
                    self._discard(old.owner, old.name)
            else:
                text = draft.store.text
            (owner,) = connection.execute("SELECT id FROM owners WHERE owner = ?", (encoded(draft.owner),)).fetchone()
            question = exchange.question
            connection.execute(
                "INSERT OR REPLACE INTO served_memories VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    owner,
                    *map(encoded, (text, question.content, question.name, exchange.answer)),
                    exchange.asked,
                    exchange.replied,
                ),
            )
            connection.executemany(
                "INSERT OR IGNORE INTO served_read VALUES (?, ?)", [(owner, mark) for mark in plan.marks]
            )

    def drop(self, draft: Draft) -> None:
        """Leave everything as it was before `draft`.

        Raises:
            StoreError: the storage failed.
        """
        if isinstance(draft.store, IndexedBank):
            self._discard(draft.owner, draft.store.name)
            for old in self.indexes.bring(draft.store):  # the fork is gone, its index is of use
                self._discard(old.owner, old.name)

    def shown(self, owner: str) -> str:
        """What `owner` remembers, as text; an entry on each line where it is a bank.

        Raises:
            StoreError: the storage failed.
        """
        if self.bank:
            return text_of(self._store.bank(owner))
        draft = self.begin(owner, ())
        assert isinstance(draft.store, TextMemory)
        return draft.store.text

    def forget(self, owner: str) -> None:
        """Remove everything of `owner`, also what it has read.

        Raises:
            StoreError: the storage failed.
        """
        self.indexes.take(owner)
        self._store.forget(owner)

    def close(self) -> None:
        """Let go of the file."""
        with suppress(StoreError), self._store.guard("written"), self._store.transaction():
            for bank in self.indexes.empty():  # else the next start does it
                self._discard(bank.owner, bank.name)
        self._drafts.close()
        self._store.close()
        self._held.close()

    def _draft(self, owner: str) -> IndexedBank:
        """The fork that stands from the last request, where nobody has changed the bank since; else a new one."""
        own, before = self._drafts.bank(owner), self.indexes.take(owner)
        if before is not None and _alike(before, own):
            return before
        if before is not None:
            self._discard(owner, before.name)
        with self._drafts.guard("written"), self._drafts.transaction() as connection:
            fork = own.fork()
            connection.execute("INSERT INTO served_drafts VALUES (?, ?)", (encoded(owner), fork.name))
        return IndexedBank(fork, before)

    def _discard(self, owner: str, fork: str) -> None:
        """Remove a fork; one that is gone already is passed over."""
        with self._store.guard("written"), self._store.transaction() as connection:
            if connection.execute("DELETE FROM served_drafts WHERE fork = ?", (fork,)).rowcount:
                self._store.bank(owner, fork=fork).discard()


def _alike(fork: SqliteBank, own: SqliteBank) -> bool:
    if not fork.shares_changes(own):
        return False
    try:
        return fork.snapshot() == own.snapshot()
    except StoreError:
        return False


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep `path` from a second process; the system lets go of it however the first one ends."""
    if fcntl is None:
        yield
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream: IO[bytes] = path.with_name(path.name + ".lock").open("ab")
    except OSError as error:
        raise StoreError(f"{path} cannot be opened", str(error), "--memory FILE in a folder of yours") from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(
                f"{path} cannot be opened",
                "another `memfactory serve` or `memfactory chat` works with it",
                "end that one, or talk to its server, or name another file with --memory",
            ) from error
        except OSError:  # a file system without locks
            pass
        yield

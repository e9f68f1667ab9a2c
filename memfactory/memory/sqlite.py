"""`SqliteStore`: the banks of many owners in one file on disk, for serving.

What `apply` has returned is on disk: every call is one transaction, written to the log and flushed (WAL with
``synchronous=FULL``) before it returns, so it survives kill -9 and a power cut. Threads and other processes may
use the same file at the same time; writers take turns, readers wait for nobody. The file must lie on a local disk.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sqlite3
import threading
import time as clock
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memfactory.episode import Operation
from memfactory.errors import StoreError
from memfactory.memory.entries import Change, Entry, Verb
from memfactory.memory.operations import (
    VERBS,
    Limits,
    Refusal,
    added,
    entry_id,
    entry_number,
    refusal,
    refused,
    updated,
    with_target,
)
from memfactory.memory.sqlite_schema import prepare
from memfactory.memory.sqlite_vectors import VectorTable

QUERY_WORDS = 64
"""Words of a query that `match` looks for; more are left out, because the time of a search grows with them."""

PAGE = 8192
"""Bytes of a page in a new file. In SQLite's own 4096 one vector of 512 numbers has room, in 8192 three."""

_FIXES = {
    sqlite3.SQLITE_FULL: "free space on its disk; what was written before is intact",
    sqlite3.SQLITE_BUSY: "end the process that holds the file, or pass a longer busy_seconds",
    sqlite3.SQLITE_LOCKED: "end the process that holds the file, or pass a longer busy_seconds",
    sqlite3.SQLITE_NOTADB: "name another file, or a new one; this one is not a SQLite database",
    sqlite3.SQLITE_CORRUPT: "restore the file from a backup, together with its -wal file",
    sqlite3.SQLITE_CANTOPEN: "create the folder, and check that it may be written to",
    sqlite3.SQLITE_READONLY: "make the file and its folder writable",
    sqlite3.SQLITE_PERM: "make the file and its folder writable",
    sqlite3.SQLITE_IOERR: "check the disk; the file must be on a local one",
}
"""By SQLite's result code (https://www.sqlite.org/rescode.html)."""

_INHERITED: list[sqlite3.Connection] = []
"""Connections of the parent process, kept from being collected."""

_ENTRY = "changes.number, changes.text, changes.key, changes.tags, changes.time, changes.turn"
_PRESENT = f"SELECT {_ENTRY}, changes.id FROM present JOIN changes ON changes.id = present.change"


@dataclass(frozen=True, slots=True)
class SqliteSnapshot:
    """State of a :class:`SqliteBank`: a place in the tree of its owner's changes. Stays valid after a restart."""

    store: str
    """Id of the file."""
    owner: str
    change: int
    """The newest change in this state; 0 for none."""
    given: int
    """How many ids the bank had given out."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How the present state of a :class:`SqliteBank` differs from an earlier one, or from one of a fork."""

    head: int
    """The newest change in the present state: what to ask with next time."""
    entries: list[Entry]
    """As they are now: what was added or changed, in the order of their ids."""
    gone: list[str]
    """Ids of what is not there any more. Some may not have been there before either."""


class SqliteStore:
    """The banks of many owners in one SQLite file.

    Args:
        path: the file; created where there is none.
        busy_seconds: how long to wait for another writer before giving up.
        limits: longest text, key, time and tags of an operation.
        flush: whether what is written is on the disk when the call returns. Without, it is there once any store of
            this file that does flush has written something later: for drafts that count for nothing until then.

    Raises:
        StoreError: the file cannot be opened, is no memory bank, or is of a newer version. Its text ends with the fix.
    """

    def __init__(
        self, path: str | Path, *, busy_seconds: float = 30.0, limits: Limits | None = None, flush: bool = True
    ) -> None:
        self.path, self.busy_seconds, self.limits, self.flush = str(path), busy_seconds, limits or Limits(), flush
        if self.path in ("", ":memory:"):  # every thread would get a database of its own
            raise StoreError("a SqliteStore needs a file", f"path is {self.path!r}", "in memory, use EntryBank")
        self._local = threading.local()
        self._open: list[tuple[threading.Thread, sqlite3.Connection]] = []
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._closed = False
        with self.guard("opened"):
            self.id = prepare(self.connection(), self.path)

    def bank(self, owner: str, *, fork: str = "") -> SqliteBank:
        """The bank of `owner`, made at first use; or the fork of it that is called `fork`.

        Raises:
            StoreError: there is no such fork, or the storage fails.
        """
        query = (
            "SELECT banks.id, owners.id FROM banks JOIN owners ON owners.id = banks.owner"
            " WHERE owners.owner = ? AND name = ?"
        )
        place = (encoded(owner), fork)
        with self.guard("opened"):
            found = self.connection().execute(query, place).fetchone()
            if found is None and fork:
                raise StoreError(
                    f"no fork {fork!r} of the bank of {owner!r} in {self.path}", fix="use the `name` of the fork"
                )
            if found is None:
                with self.transaction() as connection:
                    connection.execute("INSERT OR IGNORE INTO owners (owner) VALUES (?)", place[:1])
                    connection.execute(
                        "INSERT OR IGNORE INTO banks (owner, name) SELECT id, '' FROM owners WHERE owner = ?",
                        place[:1],
                    )
                    found = connection.execute(query, place).fetchone()
        return SqliteBank(self, owner, fork, *found)

    def owners(self) -> list[str]:
        """Everyone who has a bank here, in the order of their first use."""
        with self.guard("read"):
            return [decoded(owner) for (owner,) in self.connection().execute("SELECT owner FROM owners ORDER BY id")]

    def forget(self, owner: str) -> None:
        """Remove everything of `owner`: bank, forks, history, words, vectors. Banks still held become unusable.

        The room is used again by later writes; the old bytes may stay in the file until then.
        """
        with self.guard("written"), self.transaction() as connection:
            found = connection.execute("SELECT id FROM owners WHERE owner = ?", (encoded(owner),)).fetchone()
            if found is None:
                return
            connection.execute("DELETE FROM present WHERE bank IN (SELECT id FROM banks WHERE owner = ?)", found)
            connection.execute("DELETE FROM banks WHERE owner = ?", found)
            connection.execute("DELETE FROM changes WHERE owner = ?", found)
            connection.execute("DELETE FROM owners WHERE id = ?", found)

    def close(self) -> None:
        """Close the connections of all threads. Nothing is lost without it."""
        with self._lock:
            connections, self._open, self._closed = self._open, [], True
        if self._pid == os.getpid():
            for _, connection in connections:
                connection.close()

    def __enter__(self) -> SqliteStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def connection(self) -> sqlite3.Connection:
        """The connection of this thread in this process, opened at first use."""
        if self._closed:
            raise StoreError(f"{self.path} is closed", "close() was called", "open a new SqliteStore")
        pid = os.getpid()
        if getattr(self._local, "pid", None) != pid:
            self._local.connection, self._local.pid = self._connect(), pid
        connection: sqlite3.Connection = self._local.connection
        return connection

    def _connect(self) -> sqlite3.Connection:
        # check_same_thread: close() closes the connections of the other threads
        connection = sqlite3.connect(
            self.path, timeout=self.busy_seconds, isolation_level=None, check_same_thread=False
        )
        try:
            connection.execute(f"PRAGMA page_size = {PAGE}")  # only of a file that is empty yet
            mode = _switch_to_wal(connection, self.busy_seconds)
            if mode != "wal":
                raise StoreError(
                    f"{self.path} cannot be opened",
                    f"its journal stays in mode {mode!r}",
                    "use a file on a local disk",
                )
            connection.execute(f"PRAGMA synchronous = {'FULL' if self.flush else 'NORMAL'}")
        except BaseException:
            connection.close()
            raise
        with self._lock:
            if self._pid != os.getpid():
                # connections that came through os.fork() must not be used in the child, and not even be closed
                _INHERITED.extend(connection for _, connection in self._open)
                self._pid, self._open = os.getpid(), []
            for thread, other in self._open:
                if not thread.is_alive():
                    other.close()
            self._open = [(thread, other) for thread, other in self._open if thread.is_alive()]
            self._open.append((threading.current_thread(), connection))
        return connection

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One transaction that may write: all of what is done inside is kept, or nothing.

        Inside another one of this thread it is a part of that: several banks, or a bank and tables beside it, change
        together.
        """
        connection = self.connection()
        if connection.in_transaction:
            yield connection
            return
        # IMMEDIATE: a transaction that begins by reading cannot wait for another writer, it fails
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:  # SQLite has rolled back by itself after some errors
                connection.execute("ROLLBACK")
            raise

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """One state of the file for several queries, whatever others write meanwhile."""
        connection = self.connection()
        connection.execute("BEGIN")
        try:
            yield connection
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")  # nothing was written

    @contextmanager
    def guard(self, done: str) -> Iterator[None]:
        """Turn what SQLite throws into a StoreError with the fix; `done` completes "could not be ..."."""
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the low byte is the class of the extended code
            fix = _FIXES.get(code, "see https://www.sqlite.org/rescode.html")
            raise StoreError(f"{self.path} could not be {done}", str(error), fix) from error


class SqliteBank:
    """One bank in a :class:`SqliteStore`; keeps the contract of :class:`~memfactory.memory.entries.Bank`.

    Same operations, ids and errors as :class:`~memfactory.memory.bank.EntryBank`. Several objects, threads and
    processes may hold the same bank; each call sees what was committed before it.
    """

    def __init__(self, store: SqliteStore, owner: str, name: str, bank: int, scope: int) -> None:
        self.owner = owner
        self.name = name
        """Empty for the owner's own bank; of a fork, what ``store.bank(owner, fork=name)`` finds it by."""
        self._store, self._bank, self._scope = store, bank, scope

    def apply(self, operation: Operation, *, turn: int | None = None) -> Operation:
        """As :meth:`EntryBank.apply`. On disk when it returns.

        Raises:
            StoreError: the storage failed; nothing was changed.
        """
        return self.apply_all([operation], turn=turn)[0]

    def apply_all(self, operations: Iterable[Operation], *, turn: int | None = None) -> list[Operation]:
        """Each as by `apply`, in order, with one flush to the disk for all. A refused one does not stop the rest.

        Raises:
            StoreError: the storage failed; none of them was carried out.
        """
        # what cannot be carried out in any state is sorted out before other writers are made to wait
        checked = [self._checked(operation) for operation in operations]
        if all(operation.error or operation.verb == Verb.NONE for operation in checked):
            return checked
        with self._store.guard("written"), self._store.transaction() as connection:
            head, given = self._place(connection)
            results = []
            for operation in checked:
                if not operation.error and operation.verb != Verb.NONE:
                    operation, head, given = self._carry_out(connection, operation, turn, head, given)
                results.append(operation)
            connection.execute("UPDATE banks SET head = ?, given = ? WHERE id = ?", (head, given, self._bank))
        return results

    def _checked(self, operation: Operation) -> Operation:
        reason = None if operation.error else refusal(operation, self._store.limits)
        return operation if reason is None else refused(operation, reason)

    def _carry_out(
        self, connection: sqlite3.Connection, operation: Operation, turn: int | None, head: int, given: int
    ) -> tuple[Operation, int, int]:
        verb, prior = VERBS[operation.verb], None
        after: Entry | None
        if verb is Verb.ADD:
            given += 1
            number = given
            operation = with_target(operation, entry_id(number))
            after = added(operation, operation.target, self.owner, turn)
        else:
            found = self._find(connection, operation.target)
            if found is None:
                return refused(operation, Refusal.UNKNOWN_ID), head, given
            number, prior = found[0], found[-1]
            after = updated(self._entry(found), operation, turn) if verb is Verb.UPDATE else None
        state: tuple[str | bytes | None, ...] = (None,) * 4
        if after is not None:
            # ensure_ascii would make one character of two halves of a surrogate pair that stand side by side
            tags = json.dumps(after.tags, ensure_ascii=False)
            state = tuple(map(encoded, (after.text, after.key, tags, after.time)))
        change = connection.execute(
            "INSERT INTO changes (owner, parent, prior, number, verb, turn, text, key, tags, time)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (self._scope, head, prior, number, verb.value, turn, *state),
        ).lastrowid
        assert change is not None
        connection.execute(
            "INSERT OR REPLACE INTO present VALUES (?, ?, ?, ?)", (self._bank, number, change, after is not None)
        )
        return operation, change, given

    def get(self, id: str) -> Entry | None:
        """The entry as it is now; None for an id that is not in the bank."""
        with self._store.guard("read"):
            found = self._find(self._store.connection(), id)
        return None if found is None else self._entry(found)

    def entries(self) -> Sequence[Entry]:
        """All entries in the order in which they were added."""
        query = f"{_PRESENT} WHERE bank = ? AND alive ORDER BY present.number"
        with self._store.guard("read"):
            return [self._entry(row) for row in self._store.connection().execute(query, (self._bank,))]

    def history(self, id: str) -> Sequence[Change]:
        """Every change of an entry, oldest first; also of one that was deleted."""
        number = entry_number(id)
        if number is None:
            return []
        query = f"""
            WITH RECURSIVE chain (id) AS (
                SELECT change FROM present WHERE bank = ? AND number = ?
                UNION ALL
                SELECT prior FROM chain JOIN changes USING (id) WHERE prior IS NOT NULL
            )
            SELECT {_ENTRY}, changes.verb FROM chain JOIN changes USING (id) ORDER BY id
        """
        found: list[Change] = []
        before: Entry | None = None
        with self._store.guard("read"):
            for *state, verb in self._store.connection().execute(query, (self._bank, number)):
                after = None if state[1] is None else self._entry(state)
                found.append(Change(VERBS[verb], before, after, state[5]))
                before = after
        return found

    def difference(self, head: int = 0) -> Difference:
        """What became of the entries since the state whose newest change was `head`; 0 is the empty bank.

        For an index that follows the bank: also what other processes wrote, and ways back by `restore`, are seen. No
        time where nothing changed, else in proportion to the changes between the two states.

        Raises:
            StoreError: the bank is gone, `head` is no change of its owner, or the storage failed.
        """
        with self._store.guard("read"):
            if self._place(self._store.connection())[0] == head:
                return Difference(head, [], [])
            with self._store.reading() as connection:
                now, _ = self._place(connection)
                if head == 0:
                    query = f"{_PRESENT} WHERE bank = ? AND alive ORDER BY present.number"
                    return Difference(now, [self._entry(row) for row in connection.execute(query, (self._bank,))], [])
                undo, redo = self._way(connection, head, now)
                numbers = sorted({number for number, _ in undo} | {number for number, *_ in redo})
                found = {entry_id(number): self._find(connection, entry_id(number)) for number in numbers}
        entries = [self._entry(row) for row in found.values() if row is not None]
        return Difference(now, entries, [id for id, row in found.items() if row is None])

    def shares_changes(self, other: SqliteBank) -> bool:
        """Whether `other` is this bank or a fork of the same owner in the same file."""
        return (self._store.id, self._scope) == (other._store.id, other._scope)

    @property
    def vectors(self) -> VectorTable:
        """The vectors of this owner's texts, for search by meaning; forks share them."""
        return VectorTable(self._store, self._scope)

    def match(self, query: str, k: int) -> list[tuple[Entry, float]]:
        """The `k` entries that match words of `query` best, best first, with their score (larger is better).

        BM25 of SQLite's FTS5 over text and key; an entry without any word of the query is not among them. `query`
        is data: nothing in it is read as syntax. How rare a word is, is counted over the whole file, old
        versions and other owners included: they can shift the order of results, never appear in them.
        """
        words = _words(query)
        if not words or k <= 0:
            return []
        terms = " OR ".join(f'"{word}"' for word in words)
        with self._store.guard("read"):
            rows = self._store.connection().execute(
                f"SELECT {_ENTRY}, -bm25(words, 0.0, 1.0, 1.0) AS score FROM words"
                " JOIN changes ON changes.id = words.rowid"
                " JOIN present ON present.bank = ? AND present.number = changes.number AND present.change = changes.id"
                " WHERE words MATCH ? AND alive ORDER BY score DESC, changes.number LIMIT ?",
                (self._bank, f"scope : o{self._scope} AND {{text key}} : ({terms})", k),
            )
            return [(self._entry(row), row[6]) for row in rows]

    def snapshot(self) -> SqliteSnapshot:
        """The state now, in constant time; nothing is written."""
        with self._store.guard("read"):
            head, given = self._place(self._store.connection())
        return SqliteSnapshot(self._store.id, self.owner, head, given)

    def restore(self, snapshot: SqliteSnapshot) -> None:
        """Go to `snapshot`, taken by this bank or a fork of the same owner, earlier or later than now.

        Takes time in proportion to the changes between the two states. What is left behind stays on disk, so that
        later snapshots stay valid; only `SqliteStore.forget` removes it.

        Raises:
            StoreError: `snapshot` is of another owner, file or kind of bank; or the storage failed.
        """
        if not isinstance(snapshot, SqliteSnapshot) or (snapshot.store, snapshot.owner) != (
            self._store.id,
            self.owner,
        ):
            raise StoreError(
                f"the bank of {self.owner!r} in {self._store.path} cannot be restored",
                "the snapshot is of another owner, another file or another kind of bank",
                "restore a snapshot that this bank, or a fork of it, has taken",
            )
        with self._store.guard("written"), self._store.transaction() as connection:
            head, given = self._place(connection)
            undo, redo = self._way(connection, head, snapshot.change)
            for number, prior in undo:
                if prior is None:
                    connection.execute("DELETE FROM present WHERE bank = ? AND number = ?", (self._bank, number))
                else:  # a change that others follow is never DELETE: deleted entries do not come back
                    self._set_present(connection, number, prior, True)
            for number, change, alive in redo:
                self._set_present(connection, number, change, alive)
            connection.execute(
                "UPDATE banks SET head = ?, given = ? WHERE id = ?",
                (snapshot.change, max(given, snapshot.given), self._bank),
            )

    def _way(
        self, connection: sqlite3.Connection, start: int, goal: int
    ) -> tuple[list[tuple[int, int | None]], list[tuple[int, int, bool]]]:
        """What to undo, newest first, and what to carry out again, oldest first, to come from `start` to `goal`."""
        undo: list[tuple[int, int | None]] = []
        redo: list[tuple[int, int, bool]] = []
        query = "SELECT parent, number, prior, text IS NOT NULL FROM changes WHERE id = ? AND owner = ?"
        # a change is newer than its parent, so the newer of two places is the one that is not yet common to both
        while start != goal:
            change = max(start, goal)
            row = connection.execute(query, (change, self._scope)).fetchone()
            if row is None:
                raise StoreError(
                    f"the bank of {self.owner!r} in {self._store.path} cannot be restored",
                    f"change {change} of the snapshot is gone",
                    "the owner was forgotten since: begin from the present state",
                )
            parent, number, prior, alive = row
            if change == start:
                undo.append((number, prior))
                start = parent
            else:
                redo.append((number, change, bool(alive)))
                goal = parent
        return undo, redo[::-1]

    def _set_present(self, connection: sqlite3.Connection, number: int, change: int, alive: bool) -> None:
        connection.execute("INSERT OR REPLACE INTO present VALUES (?, ?, ?, ?)", (self._bank, number, change, alive))

    def fork(self) -> SqliteBank:
        """An independent bank of the same owner that begins in this state. It stays in the file until `discard`.

        History and texts are shared. What is copied is the index of what is present: a few bytes an entry, in SQL.
        """
        name = secrets.token_hex(8)
        with self._store.guard("written"), self._store.transaction() as connection:
            head, given = self._place(connection)
            bank = connection.execute(
                "INSERT INTO banks (owner, name, head, given) VALUES (?, ?, ?, ?)", (self._scope, name, head, given)
            ).lastrowid
            assert bank is not None
            connection.execute(
                "INSERT INTO present SELECT ?, number, change, alive FROM present WHERE bank = ?", (bank, self._bank)
            )
        return SqliteBank(self._store, self.owner, name, bank, self._scope)

    def discard(self) -> None:
        """Remove this fork. What it changed stays in the log of its owner until `SqliteStore.forget`.

        Raises:
            StoreError: this is the owner's own bank, not a fork; or the storage failed.
        """
        if not self.name:
            raise StoreError(
                f"the bank of {self.owner!r} cannot be discarded", "it is not a fork", "use SqliteStore.forget(owner)"
            )
        with self._store.guard("written"), self._store.transaction() as connection:
            connection.execute("DELETE FROM present WHERE bank = ?", (self._bank,))
            connection.execute("DELETE FROM banks WHERE id = ?", (self._bank,))

    def __len__(self) -> int:
        with self._store.guard("read"):
            query = "SELECT COUNT(*) FROM present WHERE bank = ? AND alive"
            return int(self._store.connection().execute(query, (self._bank,)).fetchone()[0])

    def __repr__(self) -> str:
        return f"SqliteBank({self._store.path!r}, owner={self.owner!r}, name={self.name!r})"

    def _place(self, connection: sqlite3.Connection) -> tuple[int, int]:
        found = connection.execute("SELECT head, given FROM banks WHERE id = ?", (self._bank,)).fetchone()
        if found is None:
            raise StoreError(
                f"the bank of {self.owner!r} in {self._store.path} is gone",
                "it was discarded, or its owner forgotten",
                "open it again with store.bank(owner)",
            )
        return int(found[0]), int(found[1])

    def _find(self, connection: sqlite3.Connection, id: str) -> Any:
        number = entry_number(id)
        if number is None:
            return None
        query = f"{_PRESENT} WHERE bank = ? AND present.number = ? AND alive"
        return connection.execute(query, (self._bank, number)).fetchone()

    def _entry(self, row: Sequence[Any]) -> Entry:
        number, text, key, tags, time, turn = row[:6]
        # most entries have no tags, and a bank that is read as a whole has many entries
        labels = decoded(key), () if tags == "[]" else tuple(json.loads(decoded(tags))), decoded(time)
        return Entry(entry_id(number), decoded(text), *labels, self.owner, turn)


def encoded(text: str) -> str | bytes:
    """`text` as SQLite takes it. Half of a surrogate pair, which JSON can spell, is not UTF-8: then as bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")
    return text


def decoded(stored: str | bytes) -> str:
    """The text that was `encoded`."""
    return stored if isinstance(stored, str) else stored.decode("utf-8", "surrogatepass")


def _words(query: str) -> list[str]:
    """The distinct words of a query: letters and digits only, so that nothing in them is syntax."""
    return list(dict.fromkeys(re.findall(r"[^\W_]+", query)))[:QUERY_WORDS]


def _switch_to_wal(connection: sqlite3.Connection, seconds: float) -> str:
    """Set the journal to WAL. SQLite does not wait where two processes do this to a new file at once, so we do."""
    end = clock.monotonic() + seconds
    while True:
        try:
            return str(connection.execute("PRAGMA journal_mode = WAL").fetchone()[0])
        except sqlite3.OperationalError as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF != sqlite3.SQLITE_BUSY or clock.monotonic() > end:
                raise
            clock.sleep(0.01)

"""Verdicts on disk, shared by processes and kept between runs.

SQLite in WAL mode: readers never wait for a writer. Reading and writing have a thread and a connection each,
so that the event loop never waits for the disk and a write held up by another process holds up no read; what
piles up meanwhile is written as one transaction. Only the key (a hash), label and reason are stored, no prompts.

A cache that cannot be used costs money, not the run: it warns once and does without.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Lock

from memfactory.reward.judge.prompt import Question, Verdict

SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE verdicts (
    key TEXT PRIMARY KEY, label TEXT NOT NULL, reason TEXT NOT NULL,
    model TEXT NOT NULL, rubric TEXT NOT NULL, version TEXT NOT NULL, created REAL NOT NULL
) WITHOUT ROWID
"""
BUSY = 10.0
"""Seconds to wait for another process that writes."""


class CacheWarning(UserWarning):
    """The verdict cache is not used, or not written to."""


class VerdictCache:
    """One cache file. `get` and `put` belong into an event loop, `close` into any thread.

    Args:
        path: the file, made with its folders when first used. Not on a network file system: WAL needs shared
            memory.
        model: noted with each verdict, to look at later; the key covers it.
    """

    def __init__(self, path: str | Path, model: str = "") -> None:
        self.path, self.model = Path(path), model
        self._lock = Lock()
        self._warned = False
        self._readable = self._writable = True
        self._pending: dict[str, tuple[Question, Verdict]] = {}
        self._threads: dict[str, ThreadPoolExecutor] = {}
        self._connections: dict[str, sqlite3.Connection] = {}

    async def get(self, key: str) -> Verdict | None:
        """The verdict stored under `key`."""
        with self._lock:
            waiting = self._pending.get(key)
        if waiting is not None:
            return waiting[1]
        if not self._readable:
            return None
        try:
            reading = asyncio.get_running_loop().run_in_executor(self._thread("read"), self._read, key)
        except RuntimeError:  # closed in this moment, or the interpreter is shutting down
            return None
        return await reading

    def put(self, key: str, question: Question, verdict: Verdict) -> None:
        """Store `verdict` soon. The verdict that is stored first stays."""
        if not self._writable:
            return
        with self._lock:
            self._pending[key] = (question, verdict)
        with suppress(RuntimeError):  # the interpreter is shutting down
            self._thread("write").submit(self._write)

    def close(self) -> None:
        """Write what is waiting and close the file. The next `get` or `put` opens it again."""
        with self._lock:
            threads, self._threads = self._threads, {}
        for thread in threads.values():
            thread.shutdown(wait=True)
        self._write()  # again what a busy file refused
        with self._lock:
            connections, self._connections = self._connections, {}
        for connection in connections.values():
            connection.close()

    def _thread(self, use: str) -> ThreadPoolExecutor:
        with self._lock:
            if use not in self._threads:
                self._threads[use] = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"judge-cache-{use}")
            return self._threads[use]

    def _read(self, key: str) -> Verdict | None:
        try:
            found = (
                self._connection("read").execute("SELECT label, reason FROM verdicts WHERE key = ?", (key,)).fetchone()
            )
        except (sqlite3.Error, OSError) as error:
            self._readable = self._readable and _is_busy(error)
            self._warn("not read", error)
            return None
        return Verdict(*found) if found else None

    def _write(self) -> None:
        with self._lock:
            batch = dict(self._pending)
        if not batch:  # taken along by an earlier write
            return
        now = time.time()
        rows = [(key, v.label, v.reason, self.model, q.rubric, q.version, now) for key, (q, v) in batch.items()]
        try:
            with _transaction(self._connection("write")) as connection:
                connection.executemany("INSERT OR IGNORE INTO verdicts VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        except (sqlite3.Error, OSError) as error:
            self._warn("not written", error)
            if _is_busy(error):  # another process holds it; the next write takes these along
                return
            self._writable = False
        with self._lock:
            for key in batch:
                self._pending.pop(key, None)

    def _connection(self, use: str) -> sqlite3.Connection:
        with self._lock:
            connection = self._connections.get(use)
        if connection is None:
            connection = _open(self.path)
            with self._lock:
                self._connections[use] = connection
        return connection

    def _warn(self, what: str, error: Exception) -> None:
        with self._lock:
            warned, self._warned = self._warned, True
        if not warned:
            text = f"judge cache {self.path} {what}: {error}. The run goes on and pays for verdicts again."
            warnings.warn(f"{text}\n  fix: set judge.cache to another file, or to null", CacheWarning, stacklevel=2)


class _transaction:
    """``with`` one write transaction: all of it, or nothing."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection

    def __enter__(self) -> sqlite3.Connection:
        self.connection.execute("BEGIN IMMEDIATE")
        return self.connection

    def __exit__(self, kind: object, *_: object) -> None:
        self.connection.execute("COMMIT" if kind is None else "ROLLBACK")


def _open(path: Path) -> sqlite3.Connection:
    """A connection to `path`, the table made if the file is new.

    Raises:
        sqlite3.Error, OSError: the file cannot be used, or is something else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path, timeout=BUSY, isolation_level=None, check_same_thread=False)
    try:
        new = _is_new(connection)  # before anything is changed: the file may be somebody else's
        _switch_to_wal(connection)
        connection.execute("PRAGMA synchronous = NORMAL")
        if new:
            with _transaction(connection):
                if _is_new(connection):  # no other process was faster
                    connection.execute(SCHEMA)
                    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    except BaseException:
        connection.close()
        raise
    return connection


def _is_new(connection: sqlite3.Connection) -> bool:
    """Whether the file is still empty.

    Raises:
        sqlite3.DatabaseError: it is not, and holds no cache of this format.
    """
    # in this order: another process makes both at once, so a table without a version is not ours
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version == SCHEMA_VERSION:
        return False
    if version:
        raise sqlite3.DatabaseError(f"its format is {version}, and {SCHEMA_VERSION} is needed")
    if tables:
        raise sqlite3.DatabaseError("it is a database of something else")
    return True


def _switch_to_wal(connection: sqlite3.Connection) -> None:
    """Turn WAL on. Two processes that do so at once on a new file can be told "locked" without having waited."""
    until = time.monotonic() + BUSY
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if not _is_busy(error) or time.monotonic() > until:
                raise
            time.sleep(0.02)


def _is_busy(error: Exception) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)

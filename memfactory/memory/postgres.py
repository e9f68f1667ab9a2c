"""`PostgresStore`: the banks of many owners in a PostgreSQL database, for serving from several machines.

What `apply` has returned is committed, with ``synchronous_commit`` on, so it survives kill -9 of the client, and of
the server as far as the server's own settings promise. Writers of one bank take turns; banks do not wait for each
other, readers for nobody. The driver is psycopg (LGPL-3.0, used as a library, unchanged).
"""

from __future__ import annotations

import json
import os
import re
import secrets
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from memfactory.memory.postgres_schema import prepare
from memfactory.search.base import Hit, content
from memfactory.search.tokens import words

try:
    import psycopg
    from psycopg.conninfo import conninfo_to_dict
    from psycopg_pool import ConnectionPool, PoolTimeout
except ImportError as missing:
    raise StoreError("PostgresStore needs psycopg", str(missing), 'pip install "memfactory[postgres]"') from missing

QUERY_WORDS = 64
"""Different words of a query that `match` looks for; more are left out: the time of a search grows with them."""
WORD = 255
"""Characters of a word that are compared; Postgres indexes no word beyond 2 kB."""
WORDS_BYTES = 1_000_000
"""Of one entry's words that are indexed; a tsvector ends at 1 MiB."""

_FIXES = {
    "08": "see that the server runs and can be reached, then try again",
    "22": "the server cannot hold a value: pass smaller `limits`",
    "22000": "vectors of two embedders lie under one name: give each a `model` of its own",
    "23": "the owner was forgotten meanwhile: open the bank again",
    "25006": "connect to the primary; this server takes no writes",
    "28": "check user and password of the DSN, and the server's pg_hba.conf",
    "3D": "create the database, or name another in the DSN",
    "40": "try again: two transactions got in each other's way, and this one was undone",
    "42501": "let the role create the schema and write its tables: GRANT CREATE ON DATABASE ... TO ...",
    "53100": "free space on the server's disk; what was written before is intact",
    "53200": "give the server more memory; what was written before is intact",
    "53300": "raise the server's max_connections, or pass fewer `connections`",
    "54": "the server cannot hold a value: pass smaller `limits`",
    "55P03": "end the transaction that holds the bank (see pg_stat_activity), or pass a longer lock_seconds",
    "57014": "the server's statement_timeout, or somebody, ended it: raise the timeout of the role",
    "57P": "the server is stopping or starting: try again when it is up",
    "58": "the server's disk or files failed: see its log",
    "XX": "the server's data is damaged, or it has a fault: see its log",
}
"""By the beginning of SQLSTATE (https://www.postgresql.org/docs/current/errcodes-appendix.html); longest first."""

_INHERITED: list[Any] = []
"""Pools of the parent process, kept from being collected."""

_CONFIGURE = """SELECT
    set_config('search_path', concat_ws(', ', quote_ident(%s), nullif(current_setting('search_path'), '')), false),
    set_config('lock_timeout', %s, false),
    set_config('synchronous_commit', CASE current_setting('synchronous_commit')
        WHEN 'off' THEN 'on' ELSE current_setting('synchronous_commit') END, false)"""

ENTRY = "c.number, c.text, c.key, c.tags::text, c.time, c.turn, c.exact"
PRESENT = f"SELECT {ENTRY}, c.id FROM present p JOIN changes c ON c.id = p.change WHERE p.bank = %s AND p.alive"

_WRITE = """
    WITH new AS (
        SELECT * FROM unnest(
            %s::bigint[], %s::bigint[], %s::bigint[], %s::bigint[], %s::text[], %s::bigint[],
            %s::text[], %s::text[], %s::text[], %s::text[], %s::bytea[], %s::text[], %s::int[]
        ) AS new (id, parent, prior, number, verb, turn, text, key, tags, time, exact, words, length)
    ), written AS (
        INSERT INTO changes (id, owner, parent, prior, number, verb, turn, text, key, tags, time, exact, words, length)
        SELECT id, %s, parent, prior, number, verb, turn, text, key, tags::jsonb, time, exact, words::tsvector, length
        FROM new
    )
    INSERT INTO present (bank, number, change, alive, length)
    SELECT DISTINCT ON (number) %s, number, id, text IS NOT NULL, length FROM new ORDER BY number, id DESC
    ON CONFLICT (bank, number) DO UPDATE
        SET change = excluded.change, alive = excluded.alive, length = excluded.length"""

# A change is newer than its parent, so the newer of two places is the one that is not yet common to both.
_WAY = """
    WITH RECURSIVE way (step, here, goal, undo, id, number, prior, alive) AS (
        SELECT 0, %s::bigint, %s::bigint, NULL::boolean, NULL::bigint, NULL::bigint, NULL::bigint, NULL::boolean
        UNION ALL
        SELECT step + 1,
            CASE WHEN here > goal THEN c.parent ELSE here END,
            CASE WHEN here > goal THEN goal ELSE c.parent END,
            here > goal, c.id, c.number, c.prior, c.text IS NOT NULL
        FROM way JOIN changes c ON c.id = greatest(here, goal) AND c.owner = %s WHERE here <> goal
    )
    SELECT here = goal, undo, id, number, prior, alive FROM way ORDER BY step"""

_HISTORY = f"""
    WITH RECURSIVE chain (id) AS (
        SELECT change FROM present WHERE bank = %s AND number = %s
        UNION ALL
        SELECT prior FROM chain JOIN changes USING (id) WHERE prior IS NOT NULL
    )
    SELECT {ENTRY}, c.verb FROM chain JOIN changes c USING (id) ORDER BY c.id"""

# BM25 as in memfactory/search/bm25.py, counted over the entries of this bank alone. The numbers are float8 throughout:
# a bare .5 would be `numeric`, which is slow.
_MATCH = f"""
    WITH asked AS MATERIALIZED (SELECT * FROM unnest(%s::text[], %s::float8[]) AS asked (word, times)),
    size AS MATERIALIZED (
        SELECT count(*)::float8 AS n, avg(length)::float8 AS mean FROM present WHERE bank = %s AND alive
    ),
    found AS MATERIALIZED (
        SELECT c.id, c.number, asked.word, asked.times * f / (f + k1 * (1 - b + b * c.length / mean)) AS weight
        FROM (SELECT 1.2::float8 AS k1, .75::float8 AS b) AS usual, size, changes c
        JOIN present p ON p.bank = %s AND p.number = c.number AND p.change = c.id AND p.alive
        CROSS JOIN LATERAL (SELECT lexeme, cardinality(positions)::float8 AS f FROM unnest(c.words)) AS held
        JOIN asked ON asked.word = held.lexeme
        WHERE c.words @@ %s::tsquery
    ),
    rare AS MATERIALIZED (
        SELECT word, ln(1 + (n - held + .5::float8) / (held + .5::float8)) AS idf
        FROM (SELECT word, count(*)::float8 AS held FROM found GROUP BY word) AS counted, size
    ),
    best AS (
        -- rounded, so that entries with the same words tie whatever the order of the sum
        SELECT id, number, round(sum(weight * idf) * 1e9::float8) / 1e9::float8 AS score
        FROM found JOIN rare USING (word) GROUP BY id, number ORDER BY score DESC, number LIMIT %s
    )
    SELECT {ENTRY}, best.score FROM best JOIN changes c USING (id) ORDER BY best.score DESC, c.number"""


@dataclass(frozen=True, slots=True)
class PostgresSnapshot:
    """State of a :class:`PostgresBank`: a place in the tree of its owner's changes. Stays valid after a restart."""

    store: str
    """Id of the schema."""
    owner: str
    change: int
    """The newest change in this state; 0 for none."""
    given: int
    """How many ids the bank had given out."""


class PostgresStore:
    """The banks of many owners in one schema of a PostgreSQL database (encoding UTF-8; tested with 15 and 16).

    Args:
        dsn: as libpq takes it, ``postgresql://user@host/database``; what it leaves out comes from PGHOST and so on.
        schema: of the tables; created where there is none.
        connections: most that this process opens at once; further threads wait their turn.
        wait_seconds: for the server, and for a free connection, before giving up.
        lock_seconds: for another writer of the same bank before giving up.
        limits: longest text, key, time and tags of an operation.

    Raises:
        StoreError: the server cannot be reached, or the schema is no memory bank, or of a newer version. Its text
            ends with the fix, and never holds the DSN, which may hold a password.
    """

    def __init__(
        self,
        dsn: str,
        *,
        schema: str = "memfactory",
        connections: int = 8,
        wait_seconds: float = 10.0,
        lock_seconds: float = 30.0,
        limits: Limits | None = None,
    ) -> None:
        self.schema, self.limits = schema, limits or Limits()
        if not schema or len(schema.encode("utf-8", "replace")) > 63:  # the server would cut it, and not find it again
            raise StoreError(f"no schema {schema!r}", "its name has no or more than 63 bytes", "give a shorter name")
        self.connections, self.wait_seconds, self.lock_seconds = connections, wait_seconds, lock_seconds
        try:
            named = conninfo_to_dict(dsn)
        except psycopg.Error:  # its text quotes the DSN
            raise StoreError(
                "the DSN cannot be read", "it is not one of libpq's forms", "write postgresql://user@host/database"
            ) from None
        host = named.get("host") or os.environ.get("PGHOST") or "this machine"
        self.where = f"database {named.get('dbname') or os.environ.get('PGDATABASE', '')!r} on {host}"
        """What errors call it."""
        # at least 2: libpq takes whole seconds, and reads 1 as 2
        self._arguments: dict[str, Any] = {"connect_timeout": max(2, round(wait_seconds)), **named}
        self._arguments |= {"autocommit": True, "client_encoding": "utf8"}
        self._pool: Any = None
        self._pid = 0
        self._lock = threading.Lock()
        self._closed = False
        # by a connection of its own: a pool tries again in the background, and does not say what was wrong
        with self.guard("opened"), psycopg.connect(**self._arguments) as connection:
            encoding = connection.info.parameter_status("server_encoding")
            if encoding != "UTF8":
                raise StoreError(
                    f"{self.where} cannot be used", f"its encoding is {encoding}", "create one with ENCODING 'UTF8'"
                )
            self._configure(connection)
            self.id = prepare(connection, schema)

    def bank(self, owner: str, *, fork: str = "") -> PostgresBank:
        """The bank of `owner`, made at first use; or the fork of it that is called `fork`.

        Raises:
            StoreError: there is no such fork, or the storage fails.
        """
        query = (
            "SELECT banks.id, owners.id FROM banks JOIN owners ON owners.id = banks.owner"
            " WHERE sha256(owners.owner) = sha256(%s) AND name = %s"
        )
        place = (_bytes(owner), fork)
        with self.guard("opened"):
            with self.connection() as connection:
                found = connection.execute(query, place).fetchone()
            if found is None and fork:
                raise StoreError(
                    f"no fork {fork!r} of the bank of {owner!r} in {self.where}", fix="use the `name` of the fork"
                )
            if found is None:
                with self.transaction() as connection:
                    # DO UPDATE rather than NOTHING: it locks the row, so that `forget` cannot come between
                    (scope,) = connection.execute(
                        "INSERT INTO owners (owner) VALUES (%s)"
                        " ON CONFLICT (sha256(owner)) DO UPDATE SET owner = excluded.owner RETURNING id",
                        place[:1],
                    ).fetchone()
                    connection.execute(
                        "INSERT INTO banks (owner, name) VALUES (%s, '') ON CONFLICT DO NOTHING", (scope,)
                    )
                    found = connection.execute(query, place).fetchone()
        return PostgresBank(self, owner, fork, *found)

    def owners(self) -> list[str]:
        """Everyone who has a bank here, in the order of their first use."""
        with self.guard("read"), self.connection() as connection:
            rows = connection.execute("SELECT owner FROM owners ORDER BY id").fetchall()
        return [owner.decode("utf-8", "surrogatepass") for (owner,) in rows]

    def forget(self, owner: str) -> None:
        """Remove everything of `owner`: bank, forks, history, words, vectors. Banks still held become unusable.

        The server's own backups and its log (WAL) keep the bytes for as long as it is set up to.
        """
        with self.guard("written"), self.transaction() as connection:
            query = "SELECT id FROM owners WHERE sha256(owner) = sha256(%s) FOR UPDATE"
            found = connection.execute(query, (_bytes(owner),)).fetchone()
            if found is None:
                return
            # lock all banks; a fork that was being made meanwhile turns up in the next round
            query, banks, before = "SELECT id FROM banks WHERE owner = %s ORDER BY id FOR UPDATE", None, None
            while before is None or banks != before:
                before, banks = banks, connection.execute(query, found).fetchall()
            connection.execute("DELETE FROM present WHERE bank IN (SELECT id FROM banks WHERE owner = %s)", found)
            connection.execute("DELETE FROM banks WHERE owner = %s", found)
            connection.execute("DELETE FROM changes WHERE owner = %s", found)
            connection.execute("DELETE FROM owners WHERE id = %s", found)

    def close(self) -> None:
        """Close all connections. Nothing is lost without it."""
        with self._lock:
            pool, self._pool, self._closed = self._pool, None, True
        if pool is not None and self._pid == os.getpid():
            pool.close()

    def __enter__(self) -> PostgresStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def connection(self) -> Iterator[Any]:
        """A connection of this process, for one statement or for a `transaction`."""
        with self._opened().connection() as connection:
            yield connection

    def _opened(self) -> Any:
        with self._lock:
            if self._closed:
                raise StoreError(f"the store in {self.where} is closed", "close() was called", "open a new one")
            if self._pool is not None and self._pid != os.getpid():
                # a pool that came through os.fork() must not be used in the child, and not even be closed
                _INHERITED.append(self._pool)
                self._pool = None
            if self._pool is None:
                self._pid = os.getpid()
                self._pool = ConnectionPool(
                    kwargs=self._arguments,
                    min_size=1,
                    max_size=self.connections,
                    timeout=self.wait_seconds,
                    configure=self._configure,
                    check=ConnectionPool.check_connection,  # a server that was restarted is not noticed otherwise
                    open=True,
                )
            return self._pool

    def _configure(self, connection: Any) -> None:
        connection.execute(_CONFIGURE, (self.schema, f"{round(self.lock_seconds * 1e3)}ms"))

    @contextmanager
    def transaction(self) -> Iterator[Any]:
        """One transaction: all of what is done inside is kept, or nothing."""
        done = False
        with self.connection() as connection:
            try:
                with connection.transaction():
                    yield connection
                    done = True
            except psycopg.OperationalError as error:
                if done and connection.closed:
                    raise StoreError(
                        f"it is not known whether {self.where} was written",
                        f"the connection was lost while the server was asked to commit: {_said(error)}",
                        "look at the bank before the operation is tried again",
                    ) from error
                raise

    @contextmanager
    def guard(self, done: str) -> Iterator[None]:
        """Turn what the driver throws into a StoreError with the fix; `done` completes "could not be ..."."""
        try:
            yield
        except PoolTimeout as error:
            raise StoreError(f"{self.where} could not be {done}", *self._why_no_connection()) from error
        except UnicodeError as error:  # texts of entries never lead here, see `_UNSTORABLE`
            raise StoreError(f"{self.where} could not be {done}", str(error), "give names that are UTF-8") from error
        except psycopg.Error as error:
            # a connection that was refused or lost has no SQLSTATE
            state = error.sqlstate or ("08" if isinstance(error, psycopg.OperationalError) else "")
            fix = next((_FIXES[state[:n]] for n in (5, 3, 2) if state[:n] in _FIXES), "see the server's log")
            raise StoreError(f"{self.where} could not be {done}", _said(error), fix) from error

    def _why_no_connection(self) -> tuple[str, str]:
        """The pool only says that it waited, so ask the server once more."""
        try:
            psycopg.connect(**self._arguments | {"connect_timeout": 2}).close()
        except psycopg.Error as error:
            return f"no connection within {self.wait_seconds:g} s: {_said(error)}", _FIXES["08"]
        return (
            f"all {self.connections} connections of this process were in use for {self.wait_seconds:g} s",
            "pass more `connections`, or a longer wait_seconds",
        )


class PostgresBank:
    """One bank in a :class:`PostgresStore`; keeps the contract of :class:`~memfactory.memory.entries.Bank`.

    Same operations, ids and errors as :class:`~memfactory.memory.bank.EntryBank`. Several objects, threads, processes
    and machines may hold the same bank; each call sees what was committed before it.
    """

    def __init__(self, store: PostgresStore, owner: str, name: str, bank: int, scope: int) -> None:
        self.owner = owner
        self.name = name
        """Empty for the owner's own bank; of a fork, what ``store.bank(owner, fork=name)`` finds it by."""
        self.store, self.number, self._scope = store, bank, scope

    def apply(self, operation: Operation, *, turn: int | None = None) -> Operation:
        """As :meth:`EntryBank.apply`. Committed when it returns.

        Raises:
            StoreError: the storage failed; nothing was changed, unless its text says that this is not known.
        """
        return self.apply_all([operation], turn=turn)[0]

    def apply_all(self, operations: Iterable[Operation], *, turn: int | None = None) -> list[Operation]:
        """Each as by `apply`, in order, in one transaction. A refused one does not stop the rest.

        Raises:
            StoreError: as for `apply`; none or all of them were carried out.
        """
        # what cannot be carried out in any state is sorted out before other writers are made to wait
        checked = [self._checked(operation) for operation in operations]
        todo = [operation for operation in checked if not operation.error and operation.verb != Verb.NONE]
        if not todo:
            return checked
        with self.store.guard("written"), self.store.transaction() as connection:
            head, given = self._place(connection, lock=True)
            present = self._find(connection, [op.target for op in todo if op.verb != Verb.ADD])
            # asked for while the bank is locked, so they are larger than every change it has
            query = "SELECT nextval('change_ids') FROM generate_series(1, %s)"
            ids = iter(sorted(id for (id,) in connection.execute(query, (len(todo),)).fetchall()))
            results, rows = list[Operation](), list[tuple[Any, ...]]()
            for operation in checked:
                if not operation.error and operation.verb != Verb.NONE:
                    verb, prior = VERBS[operation.verb], None
                    after: Entry | None
                    if verb is Verb.ADD:
                        given += 1
                        number: int | None = given
                        operation = with_target(operation, entry_id(given))
                        after = added(operation, operation.target, self.owner, turn)
                    else:
                        number = entry_number(operation.target)
                        if number not in present:
                            results.append(refused(operation, Refusal.UNKNOWN_ID))
                            continue
                        before, prior = present[number]
                        after = updated(before, operation, turn) if verb is Verb.UPDATE else None
                    assert number is not None
                    change = next(ids)
                    rows.append((change, head, prior, number, verb.value, turn, *self._columns(after)))
                    head = change
                    if after is None:
                        del present[number]
                    else:
                        present[number] = (after, change)
                results.append(operation)
            step = max(1, min(1000, 10_000_000 // self.store.limits.text))  # a message to the server ends at 1 GB
            for at in range(0, len(rows), step):
                columns = [list(column) for column in zip(*rows[at : at + step], strict=True)]
                connection.execute(_WRITE, (*columns, self._scope, self.number))
            self._move(connection, head, given)
        return results

    def _checked(self, operation: Operation) -> Operation:
        reason = None if operation.error else refusal(operation, self.store.limits)
        return operation if reason is None else refused(operation, reason)

    def _columns(self, entry: Entry | None) -> tuple[Any, ...]:
        """text, key, tags, time, exact, words and length, as `_WRITE` takes them."""
        if entry is None:
            return (None,) * 6 + (0,)
        exact = None
        if _UNSTORABLE.search("".join((entry.text, entry.key, entry.time, *entry.tags))):
            fields = (entry.text, entry.key, entry.tags, entry.time)
            exact = _bytes(json.dumps(fields, ensure_ascii=False))
        text, key, time = (_UNSTORABLE.sub("\ufffd", field) for field in (entry.text, entry.key, entry.time))
        tags = json.dumps([_UNSTORABLE.sub("\ufffd", tag) for tag in entry.tags])
        counted = Counter(word[:WORD] for word in words(content(entry)))
        return text, key, tags, time, exact, _tsvector(counted, self._scope), counted.total()

    def get(self, id: str) -> Entry | None:
        """The entry as it is now; None for an id that is not in the bank."""
        with self.store.guard("read"), self.store.connection() as connection:
            found = self._find(connection, [id])
        return next((entry for entry, _ in found.values()), None)

    def entries(self) -> Sequence[Entry]:
        """All entries in the order in which they were added."""
        with self.store.guard("read"), self.store.connection() as connection:
            rows = connection.execute(f"{PRESENT} ORDER BY p.number", (self.number,)).fetchall()
        return [self.entry(row) for row in rows]

    def history(self, id: str) -> Sequence[Change]:
        """Every change of an entry, oldest first; also of one that was deleted."""
        number, found, before = entry_number(id), list[Change](), None
        if number is None:
            return found
        with self.store.guard("read"), self.store.connection() as connection:
            rows = connection.execute(_HISTORY, (self.number, number)).fetchall()
        for *state, verb in rows:
            after = None if state[1] is None else self.entry(state)
            found.append(Change(VERBS[verb], before, after, state[5]))
            before = after
        return found

    def match(self, query: str, k: int) -> list[Hit]:
        """The `k` entries that match words of `query` best, best first; equal scores in the order of the entries.

        The scores of :class:`~memfactory.search.BM25Searcher` over key, text and tags, counted over this bank alone.
        An entry without any word of the query is not among them. `query` is data: nothing in it is read as syntax.
        """
        asked = Counter(word[:WORD] for word in words(query))
        terms = list(asked)[:QUERY_WORDS]
        if not terms or k < 1:
            return []
        # words are letters, digits and marks, so quotes are all that is needed around them
        either = " | ".join(f"'{word}'" for word in terms)
        wanted = f"':{self._scope}' & ({either})"
        times = [float(asked[word]) for word in terms]
        with self.store.guard("read"), self.store.connection() as connection:
            values = (terms, times, self.number, self.number, wanted, k)
            rows = connection.execute(_MATCH, values).fetchall()
        return [Hit(self.entry(row), row[-1]) for row in rows]

    def snapshot(self) -> PostgresSnapshot:
        """The state now, in constant time; nothing is written."""
        with self.store.guard("read"), self.store.connection() as connection:
            head, given = self._place(connection)
        return PostgresSnapshot(self.store.id, self.owner, head, given)

    def restore(self, snapshot: PostgresSnapshot) -> None:
        """Go to `snapshot`, taken by this bank or a fork of the same owner, earlier or later than now.

        Takes time in proportion to the changes between the two states. What is left behind stays in the database, so
        that later snapshots stay valid; only `PostgresStore.forget` removes it.

        Raises:
            StoreError: `snapshot` is of another owner, schema or kind of bank; or the storage failed.
        """
        place = (self.store.id, self.owner)
        if not isinstance(snapshot, PostgresSnapshot) or (snapshot.store, snapshot.owner) != place:
            raise StoreError(
                f"the bank of {self.owner!r} in {self.store.where} cannot be restored",
                "the snapshot is of another owner, another database or another kind of bank",
                "restore a snapshot that this bank, or a fork of it, has taken",
            )
        with self.store.guard("written"), self.store.transaction() as connection:
            head, given = self._place(connection, lock=True)
            way = connection.execute(_WAY, (head, snapshot.change, self._scope)).fetchall()
            if not way[-1][0]:
                raise StoreError(
                    f"the bank of {self.owner!r} in {self.store.where} cannot be restored",
                    "a change of the snapshot is gone",
                    "the owner was forgotten since: begin from the present state",
                )
            steps = way[1:]
            # newest change of each entry, and whether it is alive; None where the entry was not yet added
            goes: dict[int, tuple[int, bool] | None] = {}
            for _, undo, _, number, prior, _ in steps:
                if undo:  # a change that others follow is never DELETE: deleted entries do not come back
                    goes[number] = None if prior is None else (prior, True)
            for _, undo, change, number, _, alive in reversed(steps):
                if not undo:
                    goes[number] = (change, alive)
            self._set_present(connection, goes)
            self._move(connection, snapshot.change, max(given, snapshot.given))

    def _set_present(self, connection: Any, goes: dict[int, tuple[int, bool] | None]) -> None:
        gone = [number for number, to in goes.items() if to is None]
        connection.execute("DELETE FROM present WHERE bank = %s AND number = ANY(%s::bigint[])", (self.number, gone))
        there = [(number, *to) for number, to in goes.items() if to is not None]
        columns = [list(column) for column in zip(*there, strict=True)] or [[], [], []]
        connection.execute(
            "INSERT INTO present (bank, number, change, alive, length)"
            " SELECT %s, at.number, at.change, at.alive, c.length"
            " FROM unnest(%s::bigint[], %s::bigint[], %s::boolean[]) AS at (number, change, alive)"
            " JOIN changes c ON c.id = at.change"
            " ON CONFLICT (bank, number) DO UPDATE"
            " SET change = excluded.change, alive = excluded.alive, length = excluded.length",
            (self.number, *columns),
        )

    def fork(self) -> PostgresBank:
        """An independent bank of the same owner that begins in this state. It stays in the database until `discard`.

        History and texts are shared. What is copied is the index of what is present: a small row an entry.
        """
        name = secrets.token_hex(8)
        with self.store.guard("written"), self.store.transaction() as connection:
            head, given = self._place(connection, lock=True)
            (bank,) = connection.execute(
                "INSERT INTO banks (owner, name, head, given) VALUES (%s, %s, %s, %s) RETURNING id",
                (self._scope, name, head, given),
            ).fetchone()
            connection.execute(
                "INSERT INTO present SELECT %s, number, change, alive, length FROM present WHERE bank = %s",
                (bank, self.number),
            )
        return PostgresBank(self.store, self.owner, name, bank, self._scope)

    def discard(self) -> None:
        """Remove this fork. What it changed stays in the log of its owner until `PostgresStore.forget`.

        Raises:
            StoreError: this is the owner's own bank, not a fork; or the storage failed.
        """
        if not self.name:
            raise StoreError(
                f"the bank of {self.owner!r} cannot be discarded",
                "it is not a fork",
                "use PostgresStore.forget(owner)",
            )
        with self.store.guard("written"), self.store.transaction() as connection:
            self._place(connection, lock=True)
            connection.execute("DELETE FROM present WHERE bank = %s", (self.number,))
            connection.execute("DELETE FROM banks WHERE id = %s", (self.number,))

    def __len__(self) -> int:
        with self.store.guard("read"), self.store.connection() as connection:
            query = "SELECT count(*) FROM present WHERE bank = %s AND alive"
            return int(connection.execute(query, (self.number,)).fetchone()[0])

    def __repr__(self) -> str:
        return f"PostgresBank({self.store.where!r}, owner={self.owner!r}, name={self.name!r})"

    def entry(self, row: Sequence[Any]) -> Entry:
        """The entry in the columns `ENTRY`."""
        number, text, key, tags, time, turn, exact = row[:7]
        if exact is not None:
            text, key, held, time = json.loads(bytes(exact).decode("utf-8", "surrogatepass"))
        else:
            held = json.loads(tags) if tags != "[]" else ()  # most have none, and a parser takes its time
        return Entry(entry_id(number), text, key, tuple(held), time, self.owner, turn)

    def _place(self, connection: Any, lock: bool = False) -> tuple[int, int]:
        query = "SELECT head, given FROM banks WHERE id = %s" + (" FOR UPDATE" if lock else "")
        found = connection.execute(query, (self.number,)).fetchone()
        if found is None:
            raise StoreError(
                f"the bank of {self.owner!r} in {self.store.where} is gone",
                "it was discarded, or its owner forgotten",
                "open it again with store.bank(owner)",
            )
        return int(found[0]), int(found[1])

    def _move(self, connection: Any, head: int, given: int) -> None:
        connection.execute("UPDATE banks SET head = %s, given = %s WHERE id = %s", (head, given, self.number))

    def _find(self, connection: Any, ids: Iterable[str]) -> dict[int, tuple[Entry, int]]:
        """By number: what is present of `ids`, and the change that wrote it."""
        numbers = list({number for id in ids if (number := entry_number(id)) is not None})
        if not numbers:
            return {}
        rows = connection.execute(f"{PRESENT} AND p.number = ANY(%s::bigint[])", (self.number, numbers)).fetchall()
        return {row[0]: (self.entry(row), row[-1]) for row in rows}


_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
"""What Postgres holds in no text: NUL, and halves of surrogate pairs, which JSON can spell and UTF-8 cannot."""


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _said(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _tsvector(counted: Counter[str], scope: int) -> str:
    """Words with as many positions as they occur: only the count is read. Postgres keeps 255 of a word."""
    parts, room = [f"':{scope}'"], WORDS_BYTES
    for word, count in counted.items():
        part = f"'{word}':{','.join(map(str, range(1, min(count, 255) + 1)))}"
        room -= len(part.encode()) + 1
        if room < 0:
            break
        parts.append(part)
    return " ".join(parts)

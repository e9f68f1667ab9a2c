"""The tables of a :class:`~memfactory.memory.postgres.PostgresStore`, their version, and how a database gets there.

The same tree of changes as in SQLite (see sqlite_schema.py): changes are only added, each names the one before it,
and a bank is a place in the tree with an index of what is present there.
"""

from __future__ import annotations

import secrets
from typing import Any

from memfactory.errors import StoreError

VERSION = 1
"""Version of the tables below, and of how :func:`memfactory.search.tokens.words` cuts text, which stands in them.

It grows with every change of either, with the way there in `MIGRATIONS`."""

MIGRATION_LOCK = 0x4D464231
"""Key of the advisory lock under which tables are made and changed, one process at a time."""

TABLES = (
    "CREATE TABLE about (version int NOT NULL, store text NOT NULL)",
    # UTF-8, where half of a surrogate pair is let through; read it with convert_from(owner, 'UTF8')
    "CREATE TABLE owners (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, owner bytea NOT NULL)",
    # the digest, because an index takes no value beyond 2.7 kB
    "CREATE UNIQUE INDEX owners_by_name ON owners (sha256(owner))",
    # No foreign keys to owners: their hidden locks on the owner's row would let `forget` and a writer wait for each
    # other. `forget` removes from all tables in one transaction.
    """CREATE TABLE banks (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        owner bigint NOT NULL,
        name text NOT NULL,              -- empty for the owner's own bank, else the name of a fork
        head bigint NOT NULL DEFAULT 0,  -- newest change; 0 before the first
        given bigint NOT NULL DEFAULT 0, -- how many ids were given out
        UNIQUE (owner, name)
    )""",
    "CREATE SEQUENCE change_ids",
    """CREATE TABLE changes (
        id bigint PRIMARY KEY,           -- from change_ids; always larger than parent and prior
        owner bigint NOT NULL,
        parent bigint NOT NULL,          -- the change before this one; 0 for the first
        prior bigint,                    -- the change before this one of the same entry; NULL for ADD
        number bigint NOT NULL,          -- of the entry: 12 for e12
        verb text NOT NULL,
        turn bigint,
        text text,                       -- the entry afterwards; all NULL after DELETE
        key text,
        tags jsonb,
        time text,
        exact bytea,                     -- the four above as JSON, where Postgres cannot hold them as they are
        words tsvector,                  -- its words, and its owner as ':12', so that one index finds both at once
        length int NOT NULL DEFAULT 0    -- how many words
    )""",
    "CREATE INDEX changes_of_owner ON changes (owner)",
    "CREATE INDEX changes_by_word ON changes USING gin (words)",
    # the newest change of every entry in a bank, DELETE (alive = false) included
    """CREATE TABLE present (
        bank bigint NOT NULL,
        number bigint NOT NULL,
        change bigint NOT NULL,
        alive boolean NOT NULL,
        length int NOT NULL,             -- of the change, kept here so that the mean costs no join
        PRIMARY KEY (bank, number)
    )""",
)

MIGRATIONS: dict[int, tuple[str, ...]] = {}
"""By version: the statements that turn tables of that version into those of the next."""

VECTORS = (
    """CREATE TABLE IF NOT EXISTS vectors (
        change bigint NOT NULL REFERENCES changes (id) ON DELETE CASCADE,
        model text NOT NULL,
        vector vector NOT NULL,
        PRIMARY KEY (change, model)
    )""",
    # in the row itself while it fits a page: every search reads all of a bank, and a look-up each is what takes time
    "ALTER TABLE vectors ALTER COLUMN vector SET STORAGE MAIN",
)
"""Made by the first search by meaning: a server without pgvector has no type `vector`, and may get it later."""


_TABLES_OF = "SELECT 1 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = %s"


def prepare(connection: Any, schema: str) -> str:
    """Create the tables in the first schema of the search path, or bring older ones to `VERSION`; all or nothing.

    Returns:
        the random id that the tables were given when they were created.

    Raises:
        StoreError: the schema holds something else, or tables of a newer version, or of one that cannot be brought up.
    """
    # most openings find tables that are ready, and then wait for nobody
    if _has(connection, schema, "about"):
        version, store = _about(connection, schema)
        if version == VERSION:
            return store
    with connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(%s)", (MIGRATION_LOCK,))
        if not _has(connection, schema, "about"):
            _create(connection, schema)
        _migrate(connection, schema)
        return _about(connection, schema)[1]


def _create(connection: Any, schema: str) -> None:
    if connection.execute(_TABLES_OF, (schema,)).fetchone():
        raise StoreError(
            f"the schema {schema!r} is not a memory bank",
            "it holds tables of another program",
            "name another schema, or a new one: PostgresStore(dsn, schema=...)",
        )
    if connection.execute("SELECT 1 FROM pg_namespace WHERE nspname = %s", (schema,)).fetchone() is None:
        connection.execute(_quoted(connection, "CREATE SCHEMA ", schema))
    for statement in TABLES:
        connection.execute(statement)
    connection.execute("INSERT INTO about VALUES (%s, %s)", (VERSION, secrets.token_hex(16)))


def _migrate(connection: Any, schema: str) -> None:
    version, _ = _about(connection, schema)
    if version > VERSION:
        raise StoreError(
            f"the schema {schema!r} cannot be opened",
            f"its tables are version {version}, this memfactory knows versions up to {VERSION}",
            "update memfactory",
        )
    for step in range(version, VERSION):
        if step not in MIGRATIONS:
            raise StoreError(
                f"the schema {schema!r} cannot be opened",
                f"its tables are version {version}, and there is no way from {step} to {step + 1}",
                "open it with the memfactory that wrote it, or begin a new schema",
            )
        for statement in MIGRATIONS[step]:
            connection.execute(statement)
    if version < VERSION:
        connection.execute("UPDATE about SET version = %s", (VERSION,))


def _has(connection: Any, schema: str, table: str) -> bool:
    # not to_regclass: that may answer from a cache of before the lock was ours
    return connection.execute(f"{_TABLES_OF} AND c.relname = %s", (schema, table)).fetchone() is not None


def _about(connection: Any, schema: str) -> tuple[int, str]:
    try:
        version, store = connection.execute("SELECT version, store FROM about").fetchone()
        return int(version), str(store)
    except (TypeError, ValueError) as error:  # no row, or not ours
        raise StoreError(
            f"the schema {schema!r} is not a memory bank", "its table `about` is another program's", "name another"
        ) from error


def _quoted(connection: Any, statement: str, name: str) -> str:
    """`statement` with an identifier, which cannot be a parameter, quoted by the server."""
    return statement + str(connection.execute("SELECT quote_ident(%s)", (name,)).fetchone()[0])

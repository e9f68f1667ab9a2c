"""The tables of a :class:`~memfactory.memory.sqlite.SqliteStore`, their version, and how a file gets there.

Changes are only ever added: each names the one before it (`parent`), so the changes of an owner form a tree and a
state is a place in it. A bank is such a place (`head`) with an index of what is present there. Restoring walks from
one place to another; a fork is a second place. No text is moved or copied by either.
"""

from __future__ import annotations

import secrets
import sqlite3

from memfactory.errors import StoreError

VERSION = 2
"""Version of the tables below. It grows with every change of them, with the way there in `MIGRATIONS`."""

APPLICATION = 0x4D464231
"""In the header of the file (PRAGMA application_id), so that no other program's database is written into."""

VECTORS = (
    # `probe` tells two models of one name apart: the vector of a text that never changes
    """CREATE TABLE embedders (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        name TEXT NOT NULL,
        probe BLOB NOT NULL                   -- float32, little-endian; as long as all vectors of this embedder
    )""",
    # Of each owner apart, although two may say the same: what is forgotten must be gone, and a vector tells its text.
    """CREATE TABLE vectors (
        embedder INTEGER NOT NULL REFERENCES embedders (id),
        owner INTEGER NOT NULL REFERENCES owners (id),
        digest BLOB NOT NULL,                 -- of the text, 16 bytes
        vector BLOB NOT NULL,                 -- float32, little-endian, unit norm
        UNIQUE (owner, embedder, digest)
    )""",
    # a trigger, so that also a process of version 1 that still holds the file forgets all of an owner
    """CREATE TRIGGER owner_removed AFTER DELETE ON owners BEGIN
        DELETE FROM vectors WHERE owner = old.id;
    END""",
)
"""New in version 2: vectors of what entries say, for search by meaning. They can be computed again at any time."""

TABLES = (
    "CREATE TABLE about (version INTEGER NOT NULL, store TEXT NOT NULL)",
    # owner is TEXT, or BLOB where it holds what UTF-8 cannot (see `encoded` in sqlite.py); so are text, key, time
    "CREATE TABLE owners (id INTEGER PRIMARY KEY AUTOINCREMENT, owner TEXT NOT NULL UNIQUE)",
    """CREATE TABLE banks (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        owner INTEGER NOT NULL REFERENCES owners (id),
        name TEXT NOT NULL,              -- empty for the owner's own bank, else the name of a fork
        head INTEGER NOT NULL DEFAULT 0, -- newest change; 0 before the first
        given INTEGER NOT NULL DEFAULT 0,-- how many ids were given out
        UNIQUE (owner, name)
    )""",
    """CREATE TABLE changes (
        id INTEGER PRIMARY KEY AUTOINCREMENT, -- always larger than `parent` and `prior`
        owner INTEGER NOT NULL REFERENCES owners (id),
        parent INTEGER NOT NULL,              -- the change before this one; 0 for the first
        prior INTEGER,                        -- the change before this one of the same entry; NULL for ADD
        number INTEGER NOT NULL,              -- of the entry: 12 for e12
        verb TEXT NOT NULL,
        turn INTEGER,
        text TEXT,                            -- the entry afterwards; all NULL after DELETE
        key TEXT,
        tags TEXT,                            -- JSON list
        time TEXT
    )""",
    "CREATE INDEX changes_of_owner ON changes (owner)",
    # the newest change of every entry in a bank, DELETE (alive = 0) included
    """CREATE TABLE present (
        bank INTEGER NOT NULL REFERENCES banks (id),
        number INTEGER NOT NULL,
        change INTEGER NOT NULL REFERENCES changes (id),
        alive INTEGER NOT NULL,
        PRIMARY KEY (bank, number)
    ) WITHOUT ROWID""",
    # CAST, because text is a BLOB where it holds what UTF-8 cannot. `scope` keeps the search within one owner
    # inside the index itself, instead of finding everyone's entries and throwing most away.
    """CREATE VIEW searchable AS
        SELECT id, 'o' || owner AS scope, CAST(text AS TEXT) AS text, CAST(key AS TEXT) AS key
        FROM changes WHERE text IS NOT NULL""",
    """CREATE VIRTUAL TABLE words USING fts5 (
        scope, text, key, content = 'searchable', content_rowid = 'id', tokenize = 'unicode61'
    )""",
    """CREATE TRIGGER change_added AFTER INSERT ON changes WHEN new.text IS NOT NULL BEGIN
        INSERT INTO words (rowid, scope, text, key)
        VALUES (new.id, 'o' || new.owner, CAST(new.text AS TEXT), CAST(new.key AS TEXT));
    END""",
    """CREATE TRIGGER change_removed AFTER DELETE ON changes WHEN old.text IS NOT NULL BEGIN
        INSERT INTO words (words, rowid, scope, text, key)
        VALUES ('delete', old.id, 'o' || old.owner, CAST(old.text AS TEXT), CAST(old.key AS TEXT));
    END""",
    *VECTORS,
)

MIGRATIONS: dict[int, tuple[str, ...]] = {1: VECTORS}
"""By version: the statements that turn a file of that version into one of the next."""


def prepare(connection: sqlite3.Connection, path: str) -> str:
    """Create the tables in an empty file, or bring an older file to `VERSION`; all in one transaction.

    Returns:
        the random id that the file was given when it was created.

    Raises:
        StoreError: the file is another program's, or of a newer version, or of one that cannot be brought up.
    """
    # most openings find a file that is ready, and then wait for no writer
    if _application(connection) == APPLICATION:
        version, store = _about(connection)
        if version == VERSION:
            return store
    connection.execute("BEGIN IMMEDIATE")
    try:
        if _application(connection) == 0 and not _tables(connection):
            _create(connection)
        elif _application(connection) != APPLICATION:
            raise StoreError(
                f"{path} is not a memory bank",
                "it is a database of another program",
                "name another file, or a new one",
            )
        _migrate(connection, path)
        _, store = _about(connection)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    return store


def _create(connection: sqlite3.Connection) -> None:
    for statement in TABLES:
        connection.execute(statement)
    connection.execute("INSERT INTO about VALUES (?, ?)", (VERSION, secrets.token_hex(16)))
    connection.execute(f"PRAGMA application_id = {APPLICATION}")


def _migrate(connection: sqlite3.Connection, path: str) -> None:
    version, _ = _about(connection)
    if version > VERSION:
        raise StoreError(
            f"{path} cannot be opened",
            f"its schema is version {version}, this memfactory knows versions up to {VERSION}",
            "update memfactory",
        )
    for step in range(version, VERSION):
        if step not in MIGRATIONS:
            raise StoreError(
                f"{path} cannot be opened",
                f"its schema is version {version}, and there is no way from {step} to {step + 1}",
                "open it with the memfactory that wrote it, or begin a new file",
            )
        for statement in MIGRATIONS[step]:
            connection.execute(statement)
    if version < VERSION:
        connection.execute("UPDATE about SET version = ?", (VERSION,))


def _application(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA application_id").fetchone()[0])


def _about(connection: sqlite3.Connection) -> tuple[int, str]:
    version, store = connection.execute("SELECT version, store FROM about").fetchone()
    return int(version), str(store)


def _tables(connection: sqlite3.Connection) -> int:
    return int(connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0])

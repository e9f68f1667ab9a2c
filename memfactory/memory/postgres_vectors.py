"""Search by meaning inside PostgreSQL, by the extension pgvector (https://github.com/pgvector/pgvector).

Exact: the vectors of the bank's entries are all compared, those of other owners never read. An approximate index
over all owners would find the nearest of everybody first and then throw most away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from memfactory.errors import StoreError
from memfactory.memory.postgres import ENTRY, PRESENT, PostgresBank
from memfactory.memory.postgres_schema import MIGRATION_LOCK, VECTORS
from memfactory.search.base import Hit, content
from memfactory.search.embedding import CachedEmbedder, Embedder

_FIX = (
    "install it on the server (Debian: apt-get install postgresql-15-pgvector, with the server's version), then let"
    " its administrator run CREATE EXTENSION vector; or search here: sync(DenseSearcher(...), bank.entries())"
)

_NEAREST = f"""
    WITH best AS (
        SELECT p.change AS id, -(v.vector <#> %s::vector) AS score
        FROM present p JOIN vectors v ON v.change = p.change AND v.model = %s
        WHERE p.bank = %s AND p.alive
        ORDER BY v.vector <#> %s::vector, p.number LIMIT %s
    )
    SELECT {ENTRY}, best.score FROM best JOIN changes c USING (id) ORDER BY best.score DESC, c.number"""


class PostgresVectors:
    """The entries of a bank by meaning; a score is a cosine, from -1 to 1.

    A vector belongs to a change and never goes stale, so forks and restored states need no new ones. It is made by
    the first search after the change, or by `refresh`: `apply` never waits for an embedder, nor fails with one.

    Args:
        bank: whose entries are searched.
        embedder: any of :mod:`memfactory.search`.
        model: the name under which its vectors are kept. Another embedder, or another prefix, needs another name.
        query_prefix: what the model wants before a query, e.g. ``query: `` for E5.
        entry_prefix: what it wants before an entry, e.g. ``passage: ``.

    Raises:
        StoreError: the server has no pgvector; the text says how to get it.
    """

    def __init__(
        self, bank: PostgresBank, embedder: Embedder, *, model: str, query_prefix: str = "", entry_prefix: str = ""
    ) -> None:
        self.bank, self.model = bank, model
        self.query_prefix, self.entry_prefix = query_prefix, entry_prefix
        self.embedder = embedder if isinstance(embedder, CachedEmbedder) else CachedEmbedder(embedder)
        with bank.store.guard("opened"), bank.store.connection() as connection:
            if connection.execute("SELECT to_regclass('vectors')").fetchone()[0] is None:
                self._create(connection)

    def _create(self, connection: Any) -> None:
        query = "SELECT 1 FROM pg_available_extensions WHERE name = 'vector'"
        if connection.execute(query).fetchone() is None:
            raise StoreError("search by meaning is not possible", "the server has no pgvector", _FIX)
        with connection.transaction():
            connection.execute("SELECT pg_advisory_xact_lock(%s)", (MIGRATION_LOCK,))
            if connection.execute("SELECT 1 FROM pg_extension WHERE extname = 'vector'").fetchone() is None:
                # not into our schema: other programs of the database share it
                connection.execute("CREATE EXTENSION vector SCHEMA public")
            for statement in VECTORS:
                connection.execute(statement)

    def refresh(self, batch: int = 256) -> int:
        """Embed what is present and has no vector yet, `batch` entries at a time; how many that were.

        Raises:
            EngineError: the embedder failed; what was embedded before stays.
            StoreError: the storage failed.
        """
        missing = f"{PRESENT} AND NOT EXISTS (SELECT 1 FROM vectors WHERE change = p.change AND model = %s) LIMIT %s"
        done = 0
        while True:
            with self.bank.store.guard("read"), self.bank.store.connection() as connection:
                rows = connection.execute(missing, (self.bank.number, self.model, batch)).fetchall()
            if not rows:
                return done
            # no connection is held here: an embedder may take seconds
            texts = [self.entry_prefix + content(self.bank.entry(row)) for row in rows]
            values = [_literal(vector) for vector in self.embedder.embed(texts)]
            with self.bank.store.guard("written"), self.bank.store.connection() as connection:
                connection.execute(
                    "INSERT INTO vectors SELECT at.change, %s, at.vector::vector"
                    " FROM unnest(%s::bigint[], %s::text[]) AS at (change, vector) ON CONFLICT DO NOTHING",
                    (self.model, [row[-1] for row in rows], values),
                )
            done += len(rows)

    def search(self, query: str, k: int) -> list[Hit]:
        """The `k` nearest, however far, equal scores in the order of the entries; none for a blank query.

        Raises:
            EngineError: the embedder failed.
            StoreError: the storage failed, or the vectors kept under `model` are another model's.
        """
        if k < 1 or not query.strip():
            return []
        self.refresh()
        asked = _literal(self.embedder.embed([self.query_prefix + query])[0])
        values = (asked, self.model, self.bank.number, asked, k)
        with self.bank.store.guard("read"), self.bank.store.connection() as connection:
            rows = connection.execute(_NEAREST, values).fetchall()
        return [Hit(self.bank.entry(row), row[-1]) for row in rows]


def _literal(vector: Sequence[float] | np.ndarray) -> str:
    """As pgvector reads it; nine digits are all that float32 has."""
    return f"[{','.join(f'{value:.9g}' for value in vector)}]"

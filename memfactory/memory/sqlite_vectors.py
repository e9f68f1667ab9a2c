"""Vectors of texts, kept in the file of a :class:`~memfactory.memory.sqlite.SqliteStore`.

A vector belongs to an embedder, an owner and a text. It is no part of what was remembered: whoever searches computes
what is missing, and nothing is lost where a process dies between writing a text and writing its vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from memfactory.memory.sqlite import SqliteStore

STORED = np.dtype("<f4")
"""How numbers lie in the file, whatever the machine."""

SAME = 1e-3
"""How far apart the probes of one model may lie, a number of a unit vector: other processors sum in another order."""

_AT_ONCE = 500
"""Digests in one query: SQLite takes 999 parameters in its oldest builds."""


def digest(text: str) -> bytes:
    """What a text is found by, 16 bytes. `text` must be UTF-8."""
    return blake2b(text.encode(), digest_size=16).digest()


class VectorTable:
    """The vectors of one owner's texts.

    Raises:
        StoreError: the storage failed.
    """

    def __init__(self, store: SqliteStore, owner: int) -> None:
        self._store, self._owner = store, owner

    def embedder(self, name: str, probe: np.ndarray) -> int:
        """The number of an embedder in this file, given at first use.

        Args:
            name: which model it is.
            probe: (d,) what it makes of a text that never changes. A model that was replaced under its name makes
                something else of it, and gets a number of its own.
        """
        query, mine = "SELECT id, probe FROM embedders WHERE name = ? ORDER BY id", probe.astype(STORED)

        def known() -> int | None:
            for id, blob in self._store.connection().execute(query, (name,)):
                other = np.frombuffer(blob, dtype=STORED)
                if len(other) == len(mine) and np.abs(other - mine).max(initial=0) <= SAME:
                    return int(id)
            return None

        with self._store.guard("written"):
            if (found := known()) is not None:
                return found
            with self._store.transaction() as connection:
                if (found := known()) is not None:  # another process was faster
                    return found
                row = (name, mine.tobytes())
                id = connection.execute("INSERT INTO embedders (name, probe) VALUES (?, ?)", row).lastrowid
                assert id is not None
                return id

    def find(self, embedder: int, digests: Sequence[bytes], width: int) -> Iterator[tuple[list[bytes], np.ndarray]]:
        """The vectors that are there, in any order, some hundred at a time: digests (n,), and (n, `width`).

        One that is damaged counts as one that is missing.
        """
        for at in range(0, len(digests), _AT_ONCE):
            part = digests[at : at + _AT_ONCE]
            marks = ", ".join("?" * len(part))
            query = f"SELECT digest, vector FROM vectors WHERE owner = ? AND embedder = ? AND digest IN ({marks})"
            with self._store.guard("read"):
                rows = self._store.connection().execute(query, (self._owner, embedder, *part)).fetchall()
            rows = [(key, blob) for key, blob in rows if len(blob) == width * STORED.itemsize]
            vectors = np.frombuffer(b"".join(blob for _, blob in rows), dtype=STORED).reshape(len(rows), width)
            whole = np.asarray(np.isfinite(vectors).all(axis=1))  # (n,)
            if not whole.all():
                rows, vectors = [row for row, good in zip(rows, whole.tolist(), strict=True) if good], vectors[whole]
            if rows:
                yield [key for key, _ in rows], vectors

    def keep(self, embedder: int, digests: Sequence[bytes], vectors: np.ndarray) -> None:
        """Write `vectors` (n, d) in one transaction. What an owner who was forgotten meanwhile said is not written."""
        rows = zip(digests, vectors.astype(STORED), strict=True)
        with self._store.guard("written"), self._store.transaction() as connection:
            connection.executemany(
                "INSERT OR REPLACE INTO vectors (embedder, owner, digest, vector) SELECT ?, id, ?, ? FROM owners"
                " WHERE id = ?",
                [(embedder, key, row.tobytes(), self._owner) for key, row in rows],
            )

"""`DenseSearcher`: search by meaning, exact.

One matrix holds a vector per entry; a query is one product with it. At the size of a bank (up to some 100,000
entries) this is faster than what an approximate index would save, and it finds what it should.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from memfactory.errors import EngineError
from memfactory.memory.entries import Entry
from memfactory.search.base import Hit, content
from memfactory.search.embedding import CachedEmbedder, Embedder
from memfactory.search.slots import Slots

ROUNDING = 1e-5
"""More than float32 products of unit vectors of a few thousand numbers differ by order of summation."""


class DenseSearcher:
    """Entries by inner product with the query; a score is a cosine, from -1 to 1.

    Args:
        embedder: shared by the searchers of all banks. Wrapped in a cache unless it is one.
        owner: whose entries these are.
        query_prefix: what the model wants before a query, e.g. ``query: `` for E5.
        entry_prefix: what it wants before an entry, e.g. ``passage: ``.
    """

    def __init__(self, embedder: Embedder, owner: str = "", *, query_prefix: str = "", entry_prefix: str = "") -> None:
        self.embedder = embedder if isinstance(embedder, CachedEmbedder) else CachedEmbedder(embedder)
        self.owner, self.query_prefix, self.entry_prefix = owner, query_prefix, entry_prefix
        self._slots = Slots(owner)
        self._vectors = np.zeros((0, 0), dtype=np.float32)
        """(room, d): a row per slot, zeros where the slot is free or the text blank; `room` grows by half."""
        self._shared = False
        """Whether a fork reads the same matrix: then it is copied before it is written."""

    def put(self, entries: Iterable[Entry]) -> None:
        todo = self._slots.checked(entries)
        vectors = self._embed([content(entry) for entry in todo], self.entry_prefix)  # (n, d); may raise
        self._check_width(vectors)
        if not todo:
            return
        new = sum(entry.id not in self._slots.of for entry in todo)
        self._make_room(len(self._slots) + new, vectors.shape[1])
        for entry, vector in zip(todo, vectors, strict=True):
            slot = self._slots.put(entry)
            self._vectors[slot] = vector if len(vector) else 0

    def remove(self, ids: Iterable[str]) -> None:
        known = [id for id in ids if id in self._slots.of]
        if known:
            self._make_room(0, 0)
        for id in dict.fromkeys(known):
            self._vectors[self._slots.remove(id)] = 0

    def arrange(self, ids: Sequence[str]) -> None:
        self._slots.arrange(ids)

    def search(self, query: str, k: int) -> list[Hit]:
        """The `k` nearest, however far; none for a blank query. Entries without text are never found."""
        if k < 1 or not self._slots.of or not self._vectors.shape[1] or not query.strip():
            return []
        asked = self._embed([query], self.query_prefix)
        self._check_width(asked)
        used = self._vectors[: len(self._slots.held)]  # (slots, d)
        near = used @ asked[0]  # (slots,)
        slots = np.flatnonzero(near)  # free slots and blank texts are exactly 0
        if not len(slots):
            return []
        near = near[slots]
        if len(slots) > k:
            kth = np.partition(near, len(near) - k)[len(near) - k]
            slots = slots[near >= kth - ROUNDING]
        # The product's last bits depend on the row's place in the matrix. Those in question are computed again row
        # by row, so that equal texts tie and the same entries rank the same after any history.
        scores = (used[slots].astype(np.float64) * asked[0]).sum(axis=1)
        return self._slots.best(slots, scores, k)

    def entries(self) -> list[Entry]:
        return self._slots.entries()

    def fork(self) -> DenseSearcher:
        copy = DenseSearcher(self.embedder, self.owner, query_prefix=self.query_prefix, entry_prefix=self.entry_prefix)
        copy._slots, copy._vectors = self._slots.fork(), self._vectors
        copy._shared = self._shared = True
        return copy

    def __len__(self) -> int:
        return len(self._slots)

    def _embed(self, texts: list[str], prefix: str) -> np.ndarray:
        # a prefix does not turn blank text into something to embed
        return self.embedder.embed([prefix + text if text.strip() else "" for text in texts])

    def _check_width(self, vectors: np.ndarray) -> None:
        had, has = self._vectors.shape[1], vectors.shape[1]
        if had and has and had != has:
            raise EngineError(
                "vectors do not fit the index",
                f"{has} numbers, the index has {had}",
                "use one embedder for a searcher",
            )

    def _make_room(self, rows: int, width: int) -> None:
        """Make the matrix writable by this searcher alone, with at least `rows` rows."""
        room, width = len(self._vectors), width or self._vectors.shape[1]
        if rows > room or width != self._vectors.shape[1]:
            # small at first: in training there are thousands of banks with a few entries each
            grown = np.zeros((max(rows, room + room // 2 if rows > room else room, 4), width), dtype=np.float32)
            grown[:room, : self._vectors.shape[1]] = self._vectors
            self._vectors, self._shared = grown, False
        elif self._shared:
            self._vectors, self._shared = self._vectors.copy(), False

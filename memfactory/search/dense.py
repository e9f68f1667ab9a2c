"""`DenseSearcher`: search by meaning.

One matrix holds a vector per entry; a query is one product with it, which is exact. In large banks a shorter matrix
(:mod:`memfactory.search.coarse`) first says which entries to compare; those are compared exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from memfactory.errors import EngineError
from memfactory.memory.entries import Entry
from memfactory.search.base import Hit, content
from memfactory.search.coarse import Coarse
from memfactory.search.embedding import CachedEmbedder, Embedder
from memfactory.search.slots import Slots

ROUNDING = 1e-5
"""More than float32 products of unit vectors of a few thousand numbers differ by order of summation."""


EXACT_UP_TO = 20_000
"""Entries. A product with 20,000 times 512 numbers takes 2 to 4 ms on one core."""


class DenseSearcher:
    """Entries by inner product with the query; a score is a cosine, from -1 to 1.

    Args:
        embedder: shared by the searchers of all banks. Wrapped in a cache unless it is one.
        owner: whose entries these are.
        query_prefix: what the model wants before a query, e.g. ``query: `` for E5.
        entry_prefix: what it wants before an entry, e.g. ``passage: ``.
        exact_up_to: entries. In a larger bank some of the nearest may be missed; `recall` measures how many.
    """

    def __init__(
        self,
        embedder: Embedder,
        owner: str = "",
        *,
        query_prefix: str = "",
        entry_prefix: str = "",
        exact_up_to: int = EXACT_UP_TO,
    ) -> None:
        self.embedder = embedder if isinstance(embedder, CachedEmbedder) else CachedEmbedder(embedder)
        self.entry_embedder: Embedder = self.embedder
        """What entries go through: `embedder`, or something before it that has kept their vectors."""
        self.exact_up_to = exact_up_to
        self.owner, self.query_prefix, self.entry_prefix = owner, query_prefix, entry_prefix
        self._slots = Slots(owner)
        self._vectors = np.zeros((0, 0), dtype=np.float32)
        """(room, d): a row per slot, zeros where the slot is free or the text blank; `room` grows by half."""
        self._shared = False
        """Whether a fork reads the same matrix: then it is copied before it is written."""
        self._coarse: Coarse | None = None
        self._coarse_for = 0
        """Slots for which `_coarse` was last made, or found to be of no use."""
        self._stale = set[int]()
        """Slots that were written since `_coarse` was brought up to date."""

    def put(self, entries: Iterable[Entry]) -> None:
        todo = self._slots.checked(entries)
        texts = [content(entry) for entry in todo]
        vectors = self._embed(self.entry_embedder, texts, self.entry_prefix)  # (n, d); may raise
        self._check_width(vectors)
        if not todo:
            return
        if not self._slots.held and len(todo) > 4 and vectors.flags.writeable:
            # a whole bank at once: its vectors are the matrix, which must not be held twice
            self._vectors, self._shared = vectors, False
            for entry in todo:
                self._slots.put(entry)
            return
        new = sum(entry.id not in self._slots.of for entry in todo)
        self._make_room(len(self._slots) + new, vectors.shape[1])
        for entry, vector in zip(todo, vectors, strict=True):
            slot = self._slots.put(entry)
            self._vectors[slot] = vector if len(vector) else 0
            self._stale_at(slot)

    def remove(self, ids: Iterable[str]) -> None:
        known = [id for id in ids if id in self._slots.of]
        if known:
            self._make_room(0, 0)
        for id in dict.fromkeys(known):
            slot = self._slots.remove(id)
            self._vectors[slot] = 0
            self._stale_at(slot)

    def arrange(self, ids: Sequence[str]) -> None:
        self._slots.arrange(ids)

    def search(self, query: str, k: int) -> list[Hit]:
        """The `k` nearest, however far; none for a blank query. Entries without text are never found."""
        if k < 1 or not self._slots.of or not self._vectors.shape[1] or not query.strip():
            return []
        asked = self._embed(self.embedder, [query], self.query_prefix)
        self._check_width(asked)
        used = self._vectors[: len(self._slots.held)]  # (slots, d)
        if (coarse := self._up_to_date(used)) is not None:
            slots = coarse.candidates(asked[0], len(used), k)
            near = used[slots] @ asked[0]
        else:
            slots, near = np.arange(len(used)), used @ asked[0]
        real = near != 0  # free slots and blank texts are exactly 0
        if not real.all():
            slots, near = slots[real], near[real]
        if not len(slots):
            return []
        if len(slots) > k:
            kth = np.partition(near, len(near) - k)[len(near) - k]
            slots = slots[near >= kth - ROUNDING]
        # The product's last bits depend on the row's place in the matrix. Those in question are computed again row
        # by row, so that equal texts tie and the same entries rank the same after any history.
        scores = (used[slots].astype(np.float64) * asked[0]).sum(axis=1)
        return self._slots.best(slots, scores, k)

    def prepare(self) -> None:
        """Do now what the next search would have to do first. Some tenths of a second for a large bank that is new."""
        self._up_to_date(self._vectors[: len(self._slots.held)])

    def entries(self) -> list[Entry]:
        return self._slots.entries()

    def fork(self) -> DenseSearcher:
        copy = DenseSearcher(
            self.embedder,
            self.owner,
            query_prefix=self.query_prefix,
            entry_prefix=self.entry_prefix,
            exact_up_to=self.exact_up_to,
        )
        copy.entry_embedder = self.entry_embedder
        copy._slots, copy._vectors = self._slots.fork(), self._vectors
        copy._shared = self._shared = True
        copy._coarse, copy._coarse_for, copy._stale = self._coarse, self._coarse_for, self._stale.copy()
        if self._coarse is not None:
            self._coarse.shared = True
        return copy

    def __len__(self) -> int:
        return len(self._slots)

    @staticmethod
    def _embed(embedder: Embedder, texts: list[str], prefix: str) -> np.ndarray:
        # a prefix does not turn blank text into something to embed
        return embedder.embed([prefix + text if text.strip() else "" for text in texts])

    def _stale_at(self, slot: int) -> None:
        if self._coarse is not None:  # thousands of small banks never have one
            self._stale.add(slot)

    def _up_to_date(self, used: np.ndarray) -> Coarse | None:
        """What narrows the search in `used` (slots, d); None where the whole matrix is to be read."""
        if len(used) <= self.exact_up_to:
            return None
        if len(used) > 2 * self._coarse_for:  # what is remembered may be of another kind by now
            self._coarse, self._coarse_for = Coarse.of(used), len(used)
            self._stale.clear()
        if self._coarse is not None and self._stale:
            stale = sorted(self._stale)
            self._coarse = self._coarse.write(stale, used[stale])
            self._stale.clear()
        return self._coarse

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

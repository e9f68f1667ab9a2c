"""Where entries stand in an index: a slot number each, kept until the entry goes, then used again."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

import numpy as np

from memfactory.errors import StoreError
from memfactory.memory.entries import Entry
from memfactory.search.base import Hit


class Slots:
    """Entries by slot, and their order. A fork copies a few flat lists."""

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.of: dict[str, int] = {}
        """Slot of an entry by its id."""
        self.held: list[Entry | None] = []
        """Entry by slot; None where the slot is free."""
        self._order = array("q")
        """By slot: entries compare by this number where scores are equal."""
        self._next = 0
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self.of)

    @property
    def order(self) -> np.ndarray:
        """(slots,) int64. A view that must not outlive the next change."""
        return np.frombuffer(self._order, dtype=np.int64)

    def checked(self, entries: Iterable[Entry]) -> list[Entry]:
        """The entries to put, the last of each id.

        Raises:
            StoreError: one belongs to somebody else. Nothing that a model writes leads here; a bank given to the
                wrong index does.
        """
        last = {entry.id: entry for entry in entries}
        for entry in last.values():
            if entry.owner != self.owner:
                raise StoreError(
                    f"entry {entry.id!r} not indexed",
                    f"it belongs to {entry.owner!r}, the index to {self.owner!r}",
                    "make one searcher per bank, with the bank's owner",
                )
        return list(last.values())

    def put(self, entry: Entry) -> int:
        """The slot of `entry`, which from now on holds it."""
        slot = self.of.get(entry.id)
        if slot is not None:
            self.held[slot] = entry
            return slot
        if self._free:
            slot = self._free.pop()
            self.held[slot], self._order[slot] = entry, self._next
        else:
            slot = len(self.held)
            self.held.append(entry)
            self._order.append(self._next)
        self.of[entry.id] = slot
        self._next += 1
        return slot

    def remove(self, id: str) -> int:
        """Free the slot of `id` and name it."""
        slot = self.of.pop(id)
        self.held[slot] = None
        self._free.append(slot)
        return slot

    def arrange(self, ids: Sequence[str]) -> None:
        for position, id in enumerate(ids):
            self._order[self.of[id]] = position
        self._next = len(ids)

    def entries(self) -> list[Entry]:
        slots = sorted(self.of.values(), key=self._order.__getitem__)
        return [entry for slot in slots if (entry := self.held[slot]) is not None]

    def best(self, slots: np.ndarray, scores: np.ndarray, k: int) -> list[Hit]:
        """The `k` best of `slots` (n,) by `scores` (n,); equal scores by order."""
        if len(slots) > k:
            # keep everything that equals the k-th score, so that order alone decides among equals
            keep = scores >= np.partition(scores, len(scores) - k)[len(scores) - k]
            slots, scores = slots[keep], scores[keep]
        ranking = np.lexsort((self.order[slots], -scores))[:k]
        found = zip(slots[ranking].tolist(), scores[ranking].tolist(), strict=True)
        return [Hit(entry, score) for slot, score in found if (entry := self.held[slot]) is not None]

    def fork(self) -> Slots:
        copy = Slots(self.owner)
        copy.of, copy.held, copy._order = self.of.copy(), self.held.copy(), self._order[:]
        copy._next, copy._free = self._next, self._free.copy()
        return copy

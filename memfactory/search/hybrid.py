"""`HybridSearcher`: what words and meaning agree on, by reciprocal rank fusion.

The score of an entry is the sum over the rankings that hold it of weight / (k0 + rank), ranks from 1, k0 = 60
(Cormack, Clarke and Buettcher, Reciprocal Rank Fusion outperforms Condorcet and individual rank learning methods,
SIGIR 2009). Only ranks count, so the scales of the two searchers need not be brought together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from memfactory.memory.entries import Entry
from memfactory.search.base import Hit, Searcher

K0 = 60


def fuse(rankings: Sequence[Sequence[str]], weights: Sequence[float], k0: float = K0) -> dict[str, float]:
    """Score of every id that stands in one of `rankings` (ids, best first)."""
    scores: dict[str, float] = {}
    for ranking, weight in zip(rankings, weights, strict=True):
        for rank, id in enumerate(ranking, start=1):
            scores[id] = scores.get(id, 0.0) + weight / (k0 + rank)
    return scores


class HybridSearcher:
    """Several searchers over the same entries, asked together.

    Args:
        parts: at least one, all empty or with the same entries, of one owner. Those that may fail (dense) first: a
            change that one of them refuses then reaches none.
        weights: one per part, >= 0; all 1 by default.
        k0: how little the first ranks stand out.
        depth: how far down each part's ranking counts; the paper fuses whole rankings, which for a dense part
            means a term for every entry however unlike.
    """

    def __init__(
        self, parts: Sequence[Searcher], weights: Sequence[float] | None = None, *, k0: float = K0, depth: int = 100
    ) -> None:
        self.parts, self.k0, self.depth = list(parts), k0, depth
        self.weights = [1.0] * len(self.parts) if weights is None else list(weights)
        if not self.parts or len({part.owner for part in self.parts}) > 1 or len(self.weights) != len(self.parts):
            raise ValueError("a hybrid searcher takes parts of one owner, and a weight for each")
        self.owner = self.parts[0].owner
        self._order: dict[str, int] = {entry.id: at for at, entry in enumerate(self.parts[0].entries())}
        self._next = len(self._order)

    def put(self, entries: Iterable[Entry]) -> None:
        given = list(entries)
        for part in self.parts:
            part.put(given)
        for entry in given:
            if entry.id not in self._order:
                self._order[entry.id] = self._next
                self._next += 1

    def remove(self, ids: Iterable[str]) -> None:
        given = list(ids)
        for part in self.parts:
            part.remove(given)
        for id in given:
            self._order.pop(id, None)

    def arrange(self, ids: Sequence[str]) -> None:
        for part in self.parts:
            part.arrange(ids)
        self._order, self._next = {id: at for at, id in enumerate(ids)}, len(ids)

    def search(self, query: str, k: int) -> list[Hit]:
        if k < 1:
            return []
        found = [part.search(query, max(k, self.depth)) for part in self.parts]
        entries = {hit.entry.id: hit.entry for hits in found for hit in hits}
        scores = fuse([[hit.entry.id for hit in hits] for hits in found], self.weights, self.k0)
        kth = sorted(scores.values())[-k:][0] if scores else 0.0
        ranking = sorted(
            (id for id, score in scores.items() if score >= kth), key=lambda id: (-scores[id], self._order[id])
        )
        return [Hit(entries[id], scores[id]) for id in ranking[:k]]

    def entries(self) -> list[Entry]:
        return self.parts[0].entries()

    def fork(self) -> HybridSearcher:
        copy = HybridSearcher.__new__(HybridSearcher)
        copy.parts, copy.weights = [part.fork() for part in self.parts], self.weights.copy()
        copy.owner, copy.k0, copy.depth = self.owner, self.k0, self.depth
        copy._order, copy._next = self._order.copy(), self._next
        return copy

    def __len__(self) -> int:
        return len(self.parts[0])

"""`BM25Searcher`: search by words, without a model.

The score of an entry for a query is the sum over the query's words t, counted as often as they stand in it, of

    ln(1 + (N - n_t + .5) / (n_t + .5)) * f_t / (f_t + k1 (1 - b + b L / L_mean))

with N entries, n_t of them with t, f_t occurrences of t in the entry, and L the length of the entry in words. This
is Okapi BM25 (Robertson and Zaragoza, The Probabilistic Relevance Framework, 2009) with the idf of Lucene, which is
never negative, and without the factor k1 + 1, which changes no ranking.

Why our own: bm25s, the library of choice, computes all scores at indexing time, so any change of N rebuilds the
index, and a bank changes after every turn. The tests hold these scores against it.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence, Set

import numpy as np

from memfactory.memory.entries import Entry
from memfactory.search.base import Hit, content
from memfactory.search.slots import Slots
from memfactory.search.tokens import words


class _Postings:
    """The entries that hold one word: slots, ascending, and how often each holds it.

    Shared between forks until one of them writes: `writer` is the only index that may change it in place.
    """

    __slots__ = ("counts", "slots", "writer")

    def __init__(self, writer: object, slots: array[int], counts: array[int]) -> None:
        self.writer, self.slots, self.counts = writer, slots, counts


class BM25Searcher:
    """An inverted index that changes in place.

    Args:
        owner: whose entries these are.
        k1: how slowly repeats of a word stop counting; > 0.
        b: how much long entries are held back, from 0 (not) to 1.
        stopwords: words to leave out, lower-case; none by default.
    """

    def __init__(
        self, owner: str = "", *, k1: float = 1.2, b: float = 0.75, stopwords: Set[str] = frozenset()
    ) -> None:
        self.owner, self.k1, self.b, self.stopwords = owner, k1, b, stopwords
        self._slots = Slots(owner)
        self._postings: dict[str, _Postings] = {}
        self._lengths = array("i")
        """Words by slot."""
        self._total = 0
        self._writer = object()

    def put(self, entries: Iterable[Entry]) -> None:
        for entry in self._slots.checked(entries):
            known = self._slots.of.get(entry.id)
            if known is not None:
                self._forget_words(known)
            slot = self._slots.put(entry)
            if slot == len(self._lengths):
                self._lengths.append(0)
            counted = Counter(words(content(entry), self.stopwords))
            for word, count in counted.items():
                postings = self._own(word)
                if not postings.slots or postings.slots[-1] < slot:  # a new slot, which most are
                    postings.slots.append(slot)
                    postings.counts.append(count)
                    continue
                place = bisect_left(postings.slots, slot)
                postings.slots.insert(place, slot)
                postings.counts.insert(place, count)
            self._lengths[slot] = counted.total()
            self._total += counted.total()

    def remove(self, ids: Iterable[str]) -> None:
        for id in ids:
            slot = self._slots.of.get(id)
            if slot is not None:
                self._forget_words(slot)
                self._slots.remove(id)

    def arrange(self, ids: Sequence[str]) -> None:
        self._slots.arrange(ids)

    def search(self, query: str, k: int) -> list[Hit]:
        """Entries that share a word with `query`, so often fewer than `k`."""
        asked = Counter(words(query, self.stopwords))
        if k < 1 or not any(word in self._postings for word in asked):
            return []
        lengths = np.frombuffer(self._lengths, dtype=np.intc)
        mean = self._total / len(self._slots)
        scores = np.zeros(len(lengths))  # (slots,)
        for word, times in asked.items():
            postings = self._postings.get(word)
            if postings is None:
                continue
            slots = np.frombuffer(postings.slots, dtype=np.intc)  # (n_t,)
            counts = np.frombuffer(postings.counts, dtype=np.intc)  # (n_t,)
            idf = math.log1p((len(self._slots) - len(slots) + 0.5) / (len(slots) + 0.5))
            held_back = self.k1 * (1 - self.b + self.b * lengths[slots] / mean)
            scores[slots] += times * idf * counts / (counts + held_back)
        found = np.flatnonzero(scores)
        return self._slots.best(found, scores[found], k)

    def entries(self) -> list[Entry]:
        return self._slots.entries()

    def fork(self) -> BM25Searcher:
        copy = BM25Searcher(self.owner, k1=self.k1, b=self.b, stopwords=self.stopwords)
        copy._slots, copy._postings = self._slots.fork(), self._postings.copy()
        copy._lengths, copy._total = self._lengths[:], self._total
        # what both now hold belongs to neither: each copies the postings of a word before it changes them
        self._writer = object()
        return copy

    def __len__(self) -> int:
        return len(self._slots)

    def _own(self, word: str) -> _Postings:
        """The postings of `word`, safe to change."""
        postings = self._postings.get(word)
        if postings is None:
            postings = self._postings[word] = _Postings(self._writer, array("i"), array("i"))
        elif postings.writer is not self._writer:
            postings = _Postings(self._writer, postings.slots[:], postings.counts[:])
            self._postings[word] = postings
        return postings

    def _forget_words(self, slot: int) -> None:
        entry = self._slots.held[slot]
        assert entry is not None
        for word in set(words(content(entry), self.stopwords)):
            postings = self._own(word)
            place = bisect_left(postings.slots, slot)
            del postings.slots[place], postings.counts[place]
            if not postings.slots:
                del self._postings[word]
        self._total -= self._lengths[slot]
        self._lengths[slot] = 0

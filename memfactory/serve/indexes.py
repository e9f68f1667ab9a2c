"""`Indexes`: the drafts of owners who asked last, with what was indexed of their banks, for their next request.

To fork a bank, and to read it into an index, takes time in proportion to all that an owner has ever told. A draft that
was kept is the same as its owner's bank, so it serves the next request as it is, and its index lacks nothing.
"""

from __future__ import annotations

from memfactory.search.stored import IndexedBank

EACH = 20
"""Entries that a draft counts as by itself: what its objects take when it holds none."""


class Indexes:
    """What is kept between requests; who asked longest ago goes first. A draft that is in use is not in here.

    Args:
        limit: entries of all owners together; a draft with more is not kept at all. Memory: about 1 KB for an entry
            of ten words, and what its vector takes (2 KB at 512 numbers) where a model searches by meaning.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: dict[str, tuple[IndexedBank, int]] = {}
        """By owner, with what it counts; last used last."""
        self._total = 0

    def take(self, owner: str) -> IndexedBank | None:
        """The draft of `owner`, to be brought back; None where there is none."""
        bank, size = self._kept.pop(owner, (None, 0))
        self._total -= size
        return bank

    def bring(self, bank: IndexedBank) -> list[IndexedBank]:
        """Keep a draft; returns those that have to go for it, perhaps itself."""
        gone = [other] if (other := self.take(bank.owner)) is not None and other is not bank else []
        size = EACH + bank.indexed
        self._kept[bank.owner] = bank, size
        self._total += size
        while self._total > self.limit:
            oldest = self.take(next(iter(self._kept)))
            assert oldest is not None
            gone.append(oldest)
        return gone

    def empty(self) -> list[IndexedBank]:
        """Let go of all; returns them."""
        kept = [bank for bank, _ in self._kept.values()]
        self._kept.clear()
        self._total = 0
        return kept

    def __len__(self) -> int:
        """Entries that are held, by the count that is limited."""
        return self._total

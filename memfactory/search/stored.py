"""`StoredSearcher`: search in a bank on disk.

The file holds texts and vectors; the index is in memory, made at the first search and brought up to date at each
later one, by the newest change it has seen. So it answers like an index that followed every operation, also of what
other processes did, and it is the index that agents are trained with: a bank that is served ranks the same.

`IndexedBank`: such a bank that keeps its index, for who works with it again and again.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from memfactory.errors import StoreError
from memfactory.memory.operations import entry_number
from memfactory.memory.sqlite import SqliteBank
from memfactory.search.base import Hit, Searcher
from memfactory.search.build import SearchOptions, build_searcher
from memfactory.search.dense import DenseSearcher
from memfactory.search.embedding import Embedder
from memfactory.search.hybrid import HybridSearcher
from memfactory.search.kept import KeptEmbedder


class StoredSearcher:
    """The entries of a :class:`~memfactory.memory.sqlite.SqliteBank`, searched by words, by meaning, or by both.

    Threads may share it; they take turns. After a fork of the process, parent and child each have their own.

    Args:
        bank: what is searched, a fork of it included.
        options: as for :func:`~memfactory.search.build.build_searcher`; None is BM25.
        embedder: one of your own, instead of the one that `options` names.

    Raises:
        RecipeError: `options` are wrong.
        EngineError: the embedder could not be loaded.
    """

    def __init__(
        self,
        bank: SqliteBank,
        options: SearchOptions | Mapping[str, Any] | None = None,
        *,
        embedder: Embedder | None = None,
    ) -> None:
        self.bank = bank
        self._index = build_searcher(options, owner=bank.owner, embedder=embedder)
        for part in self.parts:
            if isinstance(part, DenseSearcher):
                part.entry_embedder = KeptEmbedder(part.embedder, bank.vectors)
        self._head = 0
        """Newest change that the index has seen."""
        self._last = 0
        """The largest number of an entry that the index has had."""
        self._lock = threading.Lock()

    @property
    def owner(self) -> str:
        return self.bank.owner

    @property
    def parts(self) -> list[Searcher]:
        """What is asked together: two searchers of a hybrid, else one. To look at; they change with the bank."""
        return list(self._index.parts) if isinstance(self._index, HybridSearcher) else [self._index]

    def search(self, query: str, k: int) -> list[Hit]:
        """At most `k` hits, best first; equal scores in the order of the entries. Any text is a query.

        What was committed before the call is seen. The first call reads the bank; a bank whose vectors are not there
        yet is embedded then, unless `refresh` was called before.

        Raises:
            EngineError: an embedder failed (dense and hybrid). The next call tries again.
            StoreError: the bank is gone, or the storage failed.
        """
        with self._lock:
            self._catch_up()
            return self._index.search(query, k)

    def refresh(self) -> None:
        """Take over what is new in the bank, and embed it. After writing, it saves the next question the time.

        Raises:
            EngineError, StoreError: as `search`.
        """
        with self._lock:
            self._catch_up()
            for part in self.parts:
                if isinstance(part, DenseSearcher):
                    part.prepare()

    def fork(self, bank: SqliteBank) -> StoredSearcher:
        """A searcher of `bank`, a fork of this one's or the bank it was forked from, that need not load it again.

        Raises:
            StoreError: `bank` is of another owner or file.
        """
        if not bank.shares_changes(self.bank):
            raise StoreError(
                f"{bank!r} is not searched with the index of {self.bank!r}",
                "it is of another owner or another file",
                "make a StoredSearcher of its own",
            )
        copy = StoredSearcher.__new__(StoredSearcher)
        copy.bank, copy._lock = bank, threading.Lock()
        with self._lock:
            copy._index, copy._head, copy._last = self._index.fork(), self._head, self._last
        return copy

    @property
    def embeds(self) -> bool:
        """Whether a model turns texts into vectors here."""
        return any(isinstance(part, DenseSearcher) for part in self.parts)

    @property
    def held(self) -> int:
        """Entries in the index as it is, without a look at the bank."""
        return len(self._index)

    def __len__(self) -> int:
        with self._lock:
            self._catch_up()
            return len(self._index)

    def _catch_up(self) -> None:
        new = self.bank.difference(self._head)
        if new.head == self._head:
            return
        self._index.put(new.entries)  # may fail, and then changes nothing
        self._index.remove(new.gone)
        numbers = [entry_number(entry.id) or 0 for entry in new.entries]
        if numbers and self._head and min(numbers) <= self._last:
            # some may have come back after a `restore`: to their old place, not to the end
            ids = [entry.id for entry in self._index.entries()]
            ordered = sorted(ids, key=lambda id: entry_number(id) or 0)
            if ordered != ids:
                self._index.arrange(ordered)
        self._last = max(self._last, *numbers, 0)
        self._head = new.head


class IndexedBank(SqliteBank):
    """A bank on disk that keeps the index of its entries: who searches it again need not read it again.

    Args:
        bank: which one; this is a second object for it.
        before: of the same owner and file, perhaps gone by now. Its index is taken over, and brought up to date.
    """

    def __init__(self, bank: SqliteBank, before: IndexedBank | None = None) -> None:
        super().__init__(bank._store, bank.owner, bank.name, bank._bank, bank._scope)
        self._asked: SearchOptions | None = None
        self._searcher: StoredSearcher | None = None
        if before is not None and before.shares_changes(self):
            self._asked, self._searcher = before._asked, before._searcher

    def searcher(self, options: SearchOptions) -> StoredSearcher:
        """Its index, made at the first call, and anew where `options` are others. `search` brings it up to date.

        Takes time in proportion to the bank where the index comes from `before`, and is not safe for two threads.

        Raises:
            EngineError: the embedder could not be loaded.
        """
        if self._searcher is None or self._asked != options:
            self._searcher, self._asked = StoredSearcher(self, options), options
        elif self._searcher.bank is not self:
            self._searcher = self._searcher.fork(self)  # whoever searched there may not have ended yet
        return self._searcher

    @property
    def indexed(self) -> int:
        """Entries in its index, which lies in memory."""
        return self._searcher.held if self._searcher is not None else 0

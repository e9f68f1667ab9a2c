"""Retrieval: which entries of a bank a question, or a new fact, is shown beside."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any, TypeVar

from memfactory.errors import RecipeErrors
from memfactory.memory.entries import Bank, Entry
from memfactory.memory.sqlite import SqliteBank
from memfactory.search.base import Searcher, sync
from memfactory.search.build import SearchOptions, build_searcher, check_search
from memfactory.search.stored import IndexedBank, StoredSearcher

ResultT = TypeVar("ResultT")


class Control(StrEnum):
    """Control experiments on what is retrieved for a question. An honest task then scores as if it had no memory."""

    NONE = "none"
    RANDOM = "random"
    """Entries drawn at random, as many as would have been found."""
    EMPTY = "empty"
    """No entry at all: the memory is wiped before the question."""


@dataclass(frozen=True)
class Retriever:
    """Searches a bank. `related` entries stand beside new facts in an update, `k` beside a question."""

    k: int = 60
    """Entries for a question, at most. Memory-R1: 60, 30 for each of two speakers."""
    related: int = 10
    """Entries beside a new fact, at most."""
    per_speaker: bool = False
    """Share `k` equally among the speakers (the tags of entries) instead of taking the best whoever said them. Entries
    of nobody fill what is left."""
    search: Mapping[str, Any] = field(default_factory=dict)
    """How: the options of :class:`memfactory.search.build.SearchOptions`. Default BM25."""
    control: Control = Control.NONE
    name: str = "retrieve"

    def __post_init__(self) -> None:
        try:
            self._options  # noqa: B018 - wrong options are refused with the recipe
        except RecipeErrors as several:
            raise RecipeErrors("agent.retrieve.search", several.errors) from several

    @cached_property
    def _options(self) -> SearchOptions:
        return check_search(self.search)

    def open(self, bank: Bank) -> Retrieval:
        """An index over `bank` that follows it."""
        if isinstance(bank, IndexedBank):
            return Retrieval(self, bank, bank.searcher(self._options))
        if isinstance(bank, SqliteBank):
            return Retrieval(self, bank, StoredSearcher(bank, self._options))
        searcher = build_searcher(self._options, owner=bank.owner)
        sync(searcher, bank.entries())
        return Retrieval(self, bank, searcher)

    async def opened(self, bank: Bank) -> Retrieval:
        """As `open`, with an index that is up to date. A bank on disk is read in another thread: it may be large, and
        others in this loop go on meanwhile.

        Raises:
            EngineError: an embedder failed.
            StoreError: the bank is gone, or the storage failed.
        """
        if not isinstance(bank, SqliteBank):
            return self.open(bank)

        def indexed() -> Retrieval:
            retrieval = self.open(bank)
            if self.control is Control.NONE and isinstance(retrieval.searcher, StoredSearcher):
                retrieval.searcher.refresh()
            return retrieval

        return await asyncio.to_thread(indexed)


class Retrieval:
    """A bank under search. `follow` after each change keeps the index in step with it."""

    def __init__(self, options: Retriever, bank: Bank, searcher: Searcher | StoredSearcher) -> None:
        self.options, self.bank, self.searcher = options, bank, searcher

    def follow(self, ids: Sequence[str]) -> None:
        """Take over what became of the entries `ids`; those that arrive together are embedded together."""
        if isinstance(self.searcher, StoredSearcher):
            return  # it reads what is new in the file when it is asked
        now = {id: self.bank.get(id) for id in ids}
        self.searcher.put([entry for entry in now.values() if entry is not None])
        self.searcher.remove([id for id, entry in now.items() if entry is None])

    async def aside(self, search: Callable[[], ResultT]) -> ResultT:
        """What `search` finds here; from another thread where it embeds for a bank on disk, which takes its time."""
        searcher = self.searcher
        if isinstance(searcher, StoredSearcher) and searcher.embeds:
            return await asyncio.to_thread(search)
        return search()

    def related(self, texts: Sequence[str]) -> tuple[Entry, ...]:
        """Entries that resemble any of `texts`, in rounds: everybody's best first; at most `related` for each text."""
        rankings = [[hit.entry for hit in self.searcher.search(text, self.options.related)] for text in texts]
        found: dict[str, Entry] = {}
        for place in range(max(map(len, rankings), default=0)):
            for ranking in rankings:
                if place < len(ranking):
                    found.setdefault(ranking[place].id, ranking[place])
        return tuple(found.values())

    def answering(self, question: str, speakers: Sequence[str] = (), seed: str = "") -> tuple[Entry, ...]:
        """Entries for `question`, best first.

        Args:
            speakers: whose entries share `k`, under `per_speaker`.
            seed: decides the draw of the random control, so that a run can be repeated.
        """
        options = self.options
        if options.control is Control.EMPTY:
            return ()
        if options.control is Control.RANDOM:
            entries = list(self.bank.entries())
            return tuple(random.Random(f"{seed}/{question}").sample(entries, min(options.k, len(entries))))
        if not options.per_speaker or len(speakers) < 2:
            return tuple(hit.entry for hit in self.searcher.search(question, options.k))
        each = -(-options.k // len(speakers))
        ranking = [hit.entry for hit in self.searcher.search(question, len(self.searcher))]
        left = dict.fromkeys(speakers, each)
        places: list[int] = []
        nobodys: list[int] = []
        for place, entry in enumerate(ranking):
            owner = next((tag for tag in entry.tags if tag in left), None)
            if owner is None:
                nobodys.append(place)
            elif left[owner]:
                left[owner] -= 1
                places.append(place)
        places = places[: options.k]
        places += nobodys[: options.k - len(places)]
        return tuple(ranking[place] for place in sorted(places))

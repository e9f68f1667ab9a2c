"""What every searcher keeps to, and how a searcher follows a bank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from memfactory.memory.entries import Change, Entry


@dataclass(frozen=True, slots=True)
class Hit:
    """An entry that was found. Scores compare only within one search: each kind of searcher has its own scale."""

    entry: Entry
    score: float


@runtime_checkable
class Searcher(Protocol):
    """An index over the entries of one owner, changed together with the bank and never rebuilt for a query.

    Not safe for threads that write: one bank, one task. Calls are synchronous; an embedder behind a network blocks
    its caller, so async code calls through ``asyncio.to_thread``.
    """

    owner: str

    def put(self, entries: Iterable[Entry]) -> None:
        """Add entries; one whose id is known replaces what stood there and keeps its place in the order.

        Give entries that arrive together in one call: a dense index embeds them as one batch. When this raises
        the index is as it was.

        Raises:
            StoreError: an entry belongs to another owner.
            EngineError: an embedder failed (dense and hybrid); ServiceError where it is behind an endpoint.
        """
        ...

    def remove(self, ids: Iterable[str]) -> None:
        """Forget entries. Ids that are not there are passed over."""
        ...

    def arrange(self, ids: Sequence[str]) -> None:
        """Set the order that settles ties; `ids` names every entry once."""
        ...

    def search(self, query: str, k: int) -> list[Hit]:
        """At most `k` hits, best first; equal scores in the order of the entries.

        Any text is a query: what holds nothing to search for finds nothing. `k` below 1 gives nothing.

        Raises:
            EngineError: an embedder failed (dense and hybrid).
        """
        ...

    def entries(self) -> list[Entry]:
        """What is indexed, in order."""
        ...

    def fork(self) -> Searcher:
        """An independent index that begins in this state. Cheap: what is large is copied at the first change."""
        ...

    def __len__(self) -> int: ...


def follow(searcher: Searcher, change: Change) -> None:
    """Carry one change of the bank over into its index."""
    if change.after is not None:
        searcher.put([change.after])
    elif change.before is not None:
        searcher.remove([change.before.id])


def sync(searcher: Searcher, entries: Sequence[Entry]) -> None:
    """Make the index hold exactly `entries` in their order, touching only what differs.

    For after ``Bank.restore``, or where changes were not seen one by one. Costs a comparison per entry, and no
    embedding for those that are the same.
    """
    known = {entry.id: entry for entry in searcher.entries()}
    # what may fail comes first, so that a failing embedder leaves the index as it was
    searcher.put([entry for entry in entries if known.get(entry.id) != entry])
    wanted = {entry.id for entry in entries}
    searcher.remove([id for id in known if id not in wanted])
    ids = [entry.id for entry in entries]
    if [entry.id for entry in searcher.entries()] != ids:
        searcher.arrange(ids)


def content(entry: Entry) -> str:
    """The text of an entry that is searched: its key as words, what it says, its tags."""
    key = entry.key.replace(".", " ").replace("_", " ").strip()
    head = f"{key}: {entry.text}" if key else entry.text
    return f"{head} ({', '.join(entry.tags)})" if entry.tags else head

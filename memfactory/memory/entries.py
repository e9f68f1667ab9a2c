"""Entries: what a memory bank is made of, and the contract that every bank keeps.

A bank belongs to one owner (a user, or one episode in training). It changes only by operations that a module
asked for; an operation that cannot be carried out comes back with its reason and changes nothing, so that
rewards can see it and no output of a model can raise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

from memfactory.episode import Operation


class Verb(StrEnum):
    """What an operation does. Other spellings (INSERT, NOOP, DEL ...) are for parsers to map, not for banks."""

    ADD = "ADD"
    UPDATE = "UPDATE"
    DELETE = "DELETE"
    NONE = "NONE"


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that is remembered."""

    id: str
    """Unique in its bank, given by the bank at ADD, kept by UPDATE, never given twice."""
    text: str
    key: str = ""
    """What it is about, e.g. ``anna.city``; empty where the module names none."""
    tags: tuple[str, ...] = ()
    time: str = ""
    """When what it says was said or true, as ISO 8601; empty where unknown."""
    owner: str = ""
    turn: int | None = None
    """Index of the turn that wrote its present text; None where it was not written by a turn."""


@dataclass(frozen=True, slots=True)
class Change:
    """One step in the history of an entry: the operation that was carried out, and by which turn."""

    verb: Verb
    before: Entry | None
    """None for ADD."""
    after: Entry | None
    """None for DELETE."""
    turn: int | None = None


@runtime_checkable
class Bank(Protocol):
    """The entries of one owner.

    Raises:
        StoreError: only where the storage itself fails (disk full, locked, away). Never for what an operation says.
    """

    owner: str

    def apply(self, operation: Operation, *, turn: int | None = None) -> Operation:
        """Carry out `operation`; all of it or nothing.

        Returns:
            the operation with `target` filled in after ADD, and `error` empty; or with `error` saying why it was not
            carried out (unknown verb, unknown id, missing text) and the bank as it was.
        """
        ...

    def get(self, id: str) -> Entry | None: ...

    def entries(self) -> Sequence[Entry]:
        """All entries in the order in which they were added."""
        ...

    def history(self, id: str) -> Sequence[Change]:
        """Every change of an entry, oldest first; also of one that was deleted. Empty for an id never given."""
        ...

    def snapshot(self) -> Any:
        """The present state, to restore later; taking it copies no entries."""
        ...

    def restore(self, snapshot: Any) -> None:
        """Go back to `snapshot` of this bank, history included."""
        ...

    def fork(self) -> Bank:
        """An independent bank that begins in this state: changes of either are not seen by the other."""
        ...

    def __len__(self) -> int: ...

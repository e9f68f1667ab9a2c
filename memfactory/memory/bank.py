"""`EntryBank`: entries in memory, for training, where thousands of episodes each have their own.

The state is three persistent values (hash tries of `immutables`), so a snapshot or a fork is the same three
references, whatever the size; only what changes afterwards takes room.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from immutables import Map

from memfactory.episode import Operation
from memfactory.errors import StoreError
from memfactory.memory.entries import Change, Entry, Verb
from memfactory.memory.operations import (
    VERBS,
    Limits,
    Refusal,
    added,
    entry_id,
    entry_number,
    refusal,
    refused,
    updated,
    with_target,
)

Step = tuple[Verb, Entry | None, int | None]
"""A change as it is kept: verb, entry afterwards, turn. What was before is in the step before; `history` puts them
together, because far more changes are made than are looked at."""


@dataclass(frozen=True, slots=True)
class BankSnapshot:
    """State of an :class:`EntryBank`. It never changes, can be restored any number of times, and pickles."""

    owner: str
    present: Map[int, tuple[Entry, int]]
    """By number of the entry: the entry, and how many changes it has had."""
    changes: Map[tuple[int, int], Step]
    """By number of the entry and index of the change, also for entries that were deleted."""
    given: int
    """How many ids were given out."""


class EntryBank:
    """The entries of one owner, in memory. Keeps the contract of :class:`~memfactory.memory.entries.Bank`.

    Ids are ``e1``, ``e2`` ... in the order of ADD. `restore` does not take ids back: what is added afterwards gets
    new ones, so an id in a record never means two entries of one bank. Two forks of one state go on counting
    alike. One thread at a time; forks may live in different threads.

    Args:
        owner: whose entries these are; the banks of two owners share nothing.
        limits: longest text, key, time and tags; what is longer is refused.
    """

    __slots__ = ("_changes", "_given", "_ordered", "_present", "limits", "owner")

    def __init__(self, owner: str = "", *, limits: Limits | None = None) -> None:
        self.owner = owner
        self.limits = limits or Limits()
        self._present: Map[int, tuple[Entry, int]] = Map()
        self._changes: Map[tuple[int, int], Step] = Map()
        self._given = 0
        self._ordered: tuple[Entry, ...] | None = ()
        """The answer of `entries`, until the next change."""

    def apply(self, operation: Operation, *, turn: int | None = None) -> Operation:
        """Carry out `operation`, or hand it back with a :class:`Refusal` in `error` and change nothing.

        An operation that already carries an error (its parser could not read it) comes back as it is. An id that ADD
        names is replaced by the one it gets. UPDATE with the text that was there is carried out and stands in the
        history: the turn confirmed it, and a reward can see that nothing was new.
        """
        if operation.error:
            return operation
        reason = refusal(operation, self.limits)
        if reason is not None:
            return refused(operation, reason)
        verb = VERBS[operation.verb]
        if verb is Verb.NONE:
            return operation
        if verb is Verb.ADD:
            return self._add(operation, turn)
        number = entry_number(operation.target)
        found = self._present.get(number) if number is not None else None
        if number is None or found is None:
            return refused(operation, Refusal.UNKNOWN_ID)
        before, steps = found
        after = updated(before, operation, turn) if verb is Verb.UPDATE else None
        self._changes = self._changes.set((number, steps), (verb, after, turn))
        self._present = (
            self._present.delete(number) if after is None else self._present.set(number, (after, steps + 1))
        )
        self._ordered = None
        return operation

    def _add(self, operation: Operation, turn: int | None) -> Operation:
        number = self._given + 1
        entry = added(operation, entry_id(number), self.owner, turn)
        self._changes = self._changes.set((number, 0), (Verb.ADD, entry, turn))
        self._present = self._present.set(number, (entry, 1))
        self._given = number
        self._ordered = None
        return with_target(operation, entry.id)

    def get(self, id: str) -> Entry | None:
        """The entry as it is now; None for an id that is not in the bank."""
        number = entry_number(id)
        found = self._present.get(number) if number is not None else None
        return found[0] if found else None

    def entries(self) -> Sequence[Entry]:
        """All entries in the order in which they were added. Sorted once after each change, then kept."""
        if self._ordered is None:
            self._ordered = tuple(entry for _, (entry, _) in sorted(self._present.items(), key=lambda item: item[0]))
        return self._ordered

    def history(self, id: str) -> Sequence[Change]:
        """Every change of an entry, oldest first; empty for an id that was never given, or not yet in this state."""
        number, found = entry_number(id), list[Change]()
        if number is not None:
            while (step := self._changes.get((number, len(found)))) is not None:
                verb, after, turn = step
                found.append(Change(verb, found[-1].after if found else None, after, turn))
        return found

    def snapshot(self) -> BankSnapshot:
        """The state now, in constant time and memory."""
        return BankSnapshot(self.owner, self._present, self._changes, self._given)

    def restore(self, snapshot: BankSnapshot) -> None:
        """Go to `snapshot`, taken by this bank or by a fork of the same owner, in constant time.

        Raises:
            StoreError: `snapshot` is not one of an EntryBank, or belongs to another owner.
        """
        if not isinstance(snapshot, BankSnapshot) or snapshot.owner != self.owner:
            whose = f"owner {snapshot.owner!r}" if isinstance(snapshot, BankSnapshot) else type(snapshot).__name__
            raise StoreError(
                f"the bank of {self.owner!r} cannot be restored",
                f"the snapshot is of {whose}",
                "restore a snapshot that this bank, or a fork of it, has taken",
            )
        self._present, self._changes = snapshot.present, snapshot.changes
        self._given = max(self._given, snapshot.given)
        self._ordered = None

    def fork(self) -> EntryBank:
        """An independent bank of the same owner in the same state, in constant time and memory."""
        other = EntryBank(self.owner, limits=self.limits)
        other._present, other._changes, other._given = self._present, self._changes, self._given
        other._ordered = self._ordered
        return other

    def __len__(self) -> int:
        return len(self._present)

    def __repr__(self) -> str:
        return f"EntryBank(owner={self.owner!r}, {len(self)} entries)"

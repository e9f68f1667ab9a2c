"""`EntryBank`: entries in memory, for training, where thousands of episodes each have their own.

The state is three persistent values (hash tries of `immutables`), so a snapshot or a fork is the same three
references, whatever the size; only what changes afterwards takes room. An ADD touches one of them and makes few
objects: thousands of banks grow at once in training, and Python's garbage collector walks over all there is.
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

_ADD, _UPDATE, _NONE = Verb.ADD, Verb.UPDATE, Verb.NONE  # members of an enum are slow to look up


@dataclass(frozen=True, slots=True)
class _Deleted:
    """The end of an entry."""

    turn: int | None


@dataclass(frozen=True, slots=True)
class BankSnapshot:
    """State of an :class:`EntryBank`. It never changes, can be restored any number of times, and pickles."""

    owner: str
    present: Map[int, tuple[Entry, int]]
    """By number of the entry: the entry, and how many versions it had before."""
    past: Map[int, Entry | _Deleted]
    """By :func:`_version`: what entries were before. Of one that was deleted all versions, and that it was. `history`
    tells changes from it, because far more changes are made than are looked at."""
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

    __slots__ = ("_given", "_ordered", "_past", "_present", "limits", "owner")

    def __init__(self, owner: str = "", *, limits: Limits | None = None) -> None:
        self.owner = owner
        self.limits = limits or Limits()
        self._present: Map[int, tuple[Entry, int]] = Map()
        self._past: Map[int, Entry | _Deleted] = Map()
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
        if verb is _NONE:
            return operation
        if verb is _ADD:
            return self._add(operation, turn)
        number = entry_number(operation.target)
        found = self._present.get(number) if number is not None else None
        if number is None or found is None:
            return refused(operation, Refusal.UNKNOWN_ID)
        before, earlier = found
        self._past = self._past.set(_version(number, earlier), before)
        if verb is _UPDATE:
            self._present = self._present.set(number, (updated(before, operation, turn), earlier + 1))
        else:
            self._past = self._past.set(_version(number, earlier + 1), _Deleted(turn))
            self._present = self._present.delete(number)
        self._ordered = None
        return operation

    def _add(self, operation: Operation, turn: int | None) -> Operation:
        number = self._given + 1
        entry = added(operation, entry_id(number), self.owner, turn)
        self._present = self._present.set(number, (entry, 0))
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
        number = entry_number(id)
        if number is None:
            return []
        versions: list[Entry | _Deleted] = []
        while (version := self._past.get(_version(number, len(versions)))) is not None:
            versions.append(version)
        if number in self._present:
            versions.append(self._present[number][0])
        changes, before = list[Change](), None
        for version in versions:
            after = version if isinstance(version, Entry) else None
            verb = _ADD if before is None else _UPDATE if after is not None else Verb.DELETE
            changes.append(Change(verb, before, after, version.turn))
            before = after
        return changes

    def snapshot(self) -> BankSnapshot:
        """The state now, in constant time and memory."""
        return BankSnapshot(self.owner, self._present, self._past, self._given)

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
        self._present, self._past = snapshot.present, snapshot.past
        self._given = max(self._given, snapshot.given)
        self._ordered = None

    def fork(self) -> EntryBank:
        """An independent bank of the same owner in the same state, in constant time and memory."""
        other = EntryBank(self.owner, limits=self.limits)
        other._present, other._past, other._given = self._present, self._past, self._given
        other._ordered = self._ordered
        return other

    def __len__(self) -> int:
        return len(self._present)

    def __repr__(self) -> str:
        return f"EntryBank(owner={self.owner!r}, {len(self)} entries)"


def _version(number: int, index: int) -> int:
    """Key of the `index`-th version of entry `number`. A number, because tuples would be walked by the collector."""
    return number << 32 | index

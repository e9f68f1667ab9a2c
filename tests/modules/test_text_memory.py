"""`TextMemory`: snapshots are immutable and can be restored in any order, any number of times."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from memfactory.memory import TextMemory


class Machine(RuleBasedStateMachine):
    """Writes, snapshots and restores in any order, against a list of what must be there."""

    def __init__(self):
        super().__init__()
        self.memory = TextMemory()
        self.expected = ("", [])
        self.snapshots = []
        self.turn = 0

    @rule(text=st.text(max_size=20))
    def write(self, text):
        self.memory.write(text, turn=self.turn)
        self.expected = (text, [*self.expected[1], self.turn])
        self.turn += 1

    @rule()
    def snapshot(self):
        self.snapshots.append((self.memory.snapshot(), (self.expected[0], list(self.expected[1]))))

    @rule(data=st.data())
    def restore(self, data):
        if self.snapshots:
            taken, state = data.draw(st.sampled_from(self.snapshots))
            self.memory.restore(taken)
            self.expected = (state[0], list(state[1]))

    @invariant()
    def holds(self):
        assert (self.memory.text, self.memory.writes) == self.expected
        for taken, (text, writes) in self.snapshots:
            assert (taken.text, list(taken.writes)) == (text, writes)


TestTextMemory = Machine.TestCase


def test_a_snapshot_cannot_be_changed():
    memory = TextMemory()
    memory.write("a", turn=0)
    taken = memory.snapshot()
    with pytest.raises(dataclasses.FrozenInstanceError):
        taken.text = "b"
    memory.writes.append(9)
    assert taken.writes == (0,)


def test_two_memories_share_nothing():
    one, other = TextMemory(), TextMemory()
    one.write("a", turn=0)
    assert (other.text, other.writes) == ("", [])

"""Functions of turns that see the episode once and share something out over its turns."""

from __future__ import annotations

import pytest

from memfactory import Episode, Score, StopReason, Task, Turn, reward
from memfactory.reward.catalogue import WeightedDimension
from memfactory.reward.measure import measure


def episode(*modules):
    turns = [Turn(module, [1], [2], [-1.0], "", StopReason.STOP) for module in modules]
    return Episode(Task("t", (), ()), turns, group="t")


def test_one_value_for_each_turn_from_one_call():
    calls = []

    @reward(scope="turn")
    def shares(episode):
        calls.append(episode)
        return [Score(1 / len(episode.turns)) for _ in episode.turns]

    one = episode("write", "write", "answer", "answer")
    measure([one], [WeightedDimension("shares", shares)])
    assert len(calls) == 1
    assert [turn.scores["shares"].value for turn in one.turns] == [0.25] * 4
    assert one.scores["shares"].value == 0.25
    assert shares(one).value == 0.25


def test_with_a_module_only_its_turns_are_counted():
    @reward(module="write")
    def gains(episode, *, scale: float = 0.5):
        return [scale, 0.0]

    one = episode("write", "answer", "write")
    measure([one], [WeightedDimension("gains", gains)])
    assert [turn.scores["gains"].value if turn.scores else None for turn in one.turns] == [0.5, None, 0.0]


@pytest.mark.parametrize("wrong", [[1.0], [1.0, 1.0, 1.0], "ab", 1.0, None])
def test_another_number_of_values_is_a_fault(wrong):
    @reward(scope="turn")
    def two(episode):
        return wrong

    one = episode("write", "answer")
    faults = measure([one], [WeightedDimension("two", two)])
    assert faults.count == {"reward": 1}
    assert faults.by_dimension == {"two": 1}
    assert [turn.scores["two"].value for turn in one.turns] == [None, None]
    assert "one value per turn" in faults.examples[0]


def test_an_episode_without_such_turns_is_not_called():
    @reward(module="write")
    def never(episode):
        raise AssertionError

    one = episode("answer")
    assert measure([one], [WeightedDimension("never", never)]).count == {}
    assert one.scores["never"].value is None

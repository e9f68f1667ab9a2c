"""Comparators: win rates in a group, by hand and with verdicts missing."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfactory import Episode, Task
from memfactory.errors import JudgeError
from memfactory.reward import comparison
from memfactory.reward.catalogue import WeightedDimension
from memfactory.reward.comparison import win_rates
from memfactory.reward.measure import measure
from memfactory.reward.system import RewardSystem


def episodes(*sizes, group="g"):
    return [Episode(Task(group, (), ()), memory="x" * size, group=group) for size in sizes]


@comparison
def shorter(first, second):
    """The shorter memory is better."""
    a, b = len(first.memory), len(second.memory)
    return (a < b) - (a > b)


def rates(batch, dimension):
    faults = measure(batch, [WeightedDimension("own", dimension)])
    return [episode.scores["own"].value for episode in batch], faults


def test_win_rates_by_hand():
    """Of four members the shortest beats three; two that tie share their point."""
    assert rates(episodes(1, 2, 2, 5), shorter)[0] == pytest.approx([1.0, 1.5 / 3, 1.5 / 3, 0.0])


def test_groups_are_compared_each_by_itself():
    batch = [*episodes(1, 9, group="a"), *episodes(5, 6, group="b")]
    assert rates(batch, shorter)[0] == [1.0, 0.0, 1.0, 0.0]


@given(st.lists(st.integers(0, 5), min_size=2, max_size=7))
def test_all_points_are_given_out(sizes):
    """Every pair gives one point in all, so the mean win rate is one half, and order does not matter."""
    values, _ = rates(episodes(*sizes), shorter)
    assert sum(values) / len(values) == pytest.approx(0.5)
    backwards, _ = rates(episodes(*reversed(sizes)), shorter)
    assert backwards[::-1] == pytest.approx(values)


def test_an_async_comparator_asks_for_the_judge_and_a_failed_pair_is_left_out():
    class Judge:
        def __init__(self):
            self.asked = []

        async def compare(self, first, second):
            self.asked.append((first, second))
            if "xxx" in (first, second) and "x" in (first, second):
                raise JudgeError("judge", "timed out")
            return (len(first) < len(second)) - (len(first) > len(second))

        def metrics(self):
            return {}

    @comparison
    async def better(first, second, *, judge):
        return await judge.compare(first.memory, second.memory)

    judge, batch = Judge(), episodes(1, 2, 3)
    system = RewardSystem([WeightedDimension("better", better)], judge=judge)
    system.score(batch)
    assert [episode.scores["better"].value for episode in batch] == [1.0, 0.5, 0.0]
    assert len(judge.asked) == 3  # each pair once


def test_without_any_verdict_an_episode_is_not_measured():
    @comparison
    def nothing(first, second):
        return None

    batch = episodes(1, 2)
    assert rates(batch, nothing)[0] == [None, None]
    assert batch[0].scores["own"].reason == "no comparison had a verdict"
    assert rates(episodes(4), shorter)[0] == [None]  # alone


@pytest.mark.parametrize("verdict", [0.5, "first", 2])
def test_a_wrong_verdict_is_a_fault(verdict):
    @comparison
    def wrong(first, second):
        return verdict

    values, faults = rates(episodes(1, 2), wrong)
    assert values == [None, None]
    assert faults.count == {"reward": 1}
    assert "1, 0, -1" in faults.examples[0]


def test_an_error_of_the_comparator_is_not_hidden():
    pairs = dict.fromkeys(itertools.combinations(range(3), 2), 0)
    with pytest.raises(ZeroDivisionError):
        win_rates(3, {**pairs, (0, 1): ZeroDivisionError("x")})

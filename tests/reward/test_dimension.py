"""Reward functions as people write them: right ones, wrong ones, and how their scores become a reward."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memfactory import Answer, Episode, Probe, Score, StopReason, Task, Turn, reward
from memfactory.errors import RecipeError, RewardError
from memfactory.reward.aggregate import WeightedSum
from memfactory.reward.catalogue import WeightedDimension, load_dimension
from memfactory.reward.dimension import RewardDimension, Role
from memfactory.reward.system import RewardSystem


def episode(text="Paris", gold=("Paris",), task="task-7"):
    probe = Probe("Where?", tuple(gold))
    turn = Turn("answer", [1], [2], [-1.0], text or "", StopReason.STOP)
    return Episode(Task(task, (), (probe,)), [turn], [Answer(probe, text, text or "")])


def dimension(result, **options):
    def measure(episode):
        if isinstance(result, Exception):
            raise result
        return result

    return RewardDimension("measure", measure, **options)


@pytest.mark.parametrize(
    ("result", "value"),
    [
        (0.5, 0.5),
        (1, 1.0),
        (True, 1.0),
        (np.float32(0.25), 0.25),
        (torch.tensor(0.75), 0.75),
        (torch.tensor([0.75]), 0.75),
        (Score(0.5), 0.5),
    ],
)
def test_numbers_and_scores_are_taken(result, value):
    assert dimension(result)(episode()).value == value


@pytest.mark.parametrize("result", [None, Score(None, "judge timed out")])
def test_none_is_no_zero(result):
    score = dimension(result)(episode())
    assert score.value is None
    assert score.reason


@pytest.mark.parametrize(
    ("result", "says"),
    [
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (-float("inf"), "inf"),
        ("good", "'good'"),
        ([0.5], r"\[0.5\]"),
        ({}, "{}"),
        (torch.tensor([0.25, 0.75]), "0.25"),
        pytest.param(10**400, "1000", id="10**400"),
        (1.5, r"outside its range \[0.0, 1.0\]"),
        (-1e-9, "outside its range"),
        (KeyError("answer"), "KeyError: 'answer'"),
        (ZeroDivisionError("float division by zero"), "ZeroDivisionError"),
    ],
)
def test_wrong_results_name_function_file_and_task(result, says):
    with pytest.raises(RewardError, match=says) as error:
        dimension(result)(episode())
    message = str(error.value)
    assert "'measure'" in message
    assert "test_dimension.py:" in message
    assert "task-7" in message
    assert "fix:" in message


def test_declared_range():
    assert dimension(-3.0, low=-5.0, high=0.0)(episode()).value == -3.0
    with pytest.raises(RewardError, match="declare the true range"):
        dimension(0.1, low=-5.0, high=0.0)(episode())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_is_finite_and_none_has_a_reason(value):
    with pytest.raises(ValueError, match="finite"):
        Score(value)
    with pytest.raises(ValueError, match="reason"):
        Score(None)


def test_decorator_with_and_without_range():
    @reward
    def plain(episode):
        return 1.0

    @reward(low=-1.0, high=2.0)
    def ranged(episode):
        return 2.0

    assert (plain.name, plain.low, plain.high) == ("plain", 0.0, 1.0)
    assert (ranged.name, ranged.low, ranged.high) == ("ranged", -1.0, 2.0)
    assert ranged(episode()).value == 2.0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"low": 1.0, "high": 0.0}, "below"),
        ({"scope": "module"}, "names one"),
        ({"scope": "turn", "module": "write"}, "names one"),
        ({"scope": "turn", "batched": True}, "scope 'episode'"),
        ({"role": "shaping"}, "cancels out"),
        ({"role": "gate", "high": math.inf}, "finite range"),
        ({"role": "gatee"}, "gatee"),
        ({"scope": "episodes"}, "episodes"),
        ({"missing": "zero"}, "zero"),
    ],
)
def test_a_declaration_that_contradicts_itself_is_refused(options, says):
    with pytest.raises(ValueError, match=says):
        reward(lambda episode: 0.0, **options)


def test_naming_a_module_implies_the_scope():
    made = reward(lambda episode, turn: 0.0, module=("write", "answer"))
    assert (made.scope, made.modules) == ("module", ("write", "answer"))


# ---- from scores to one reward -----------------------------------------------------------------


def score(episodes, dimensions):
    """TRL's rule: the plain weighted sum."""
    return RewardSystem(dimensions, WeightedSum()).score(episodes)


def weighted(*pairs):
    return [WeightedDimension(f"d{i}", dimension(result), weight) for i, (result, weight) in enumerate(pairs)]


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(-3, 3)), min_size=1, max_size=5))
def test_reward_is_the_weighted_sum(pairs):
    one = episode()
    score([one], weighted(*pairs))
    assert one.reward == pytest.approx(sum(value * weight for value, weight in pairs), abs=1e-9)
    assert [one.scores[f"d{i}"].value for i in range(len(pairs))] == [value for value, _ in pairs]


def test_one_unmeasured_dimension_leaves_no_reward_and_weight_zero_does_not_count():
    one = episode()
    faults = score([one], weighted((1.0, 1.0), (None, 0.5)))
    assert one.reward is None
    assert faults.count == {}  # the function said so itself
    score([one], weighted((1.0, 1.0), (None, 0.0)))
    assert one.reward == 1.0
    assert one.scores["d1"].value is None


def test_a_function_that_raises_on_one_episode_costs_that_episode():
    def picky(episode):
        return 1 / len(episode.answers[0].text)

    episodes = [episode("abcd"), episode(""), episode("ab")]
    faults = score(episodes, [WeightedDimension("picky", RewardDimension("picky", picky), 2.0)])
    assert [e.reward for e in episodes] == [0.5, None, 1.0]
    assert faults.count == {"reward": 1}
    assert "ZeroDivisionError" in faults.examples[0]
    assert "ZeroDivisionError" in episodes[1].scores["picky"].reason


def test_examples_are_few_and_counts_are_all():
    faults = score([episode() for _ in range(50)], weighted((ValueError("no"), 1.0)))
    assert (faults.count, len(faults.examples)) == ({"reward": 50}, 3)
    assert faults.by_dimension == {"d0": 50}


def test_the_default_gates():
    """Without another aggregator utility is a weighted mean and a failed gate takes it all but away."""
    gate = WeightedDimension("gate", dimension(0.0, role=Role.GATE))
    one = episode()
    RewardSystem(weighted((1.0, 3.0), (0.0, 1.0))).score([one])
    assert one.reward == pytest.approx(0.75)
    RewardSystem([*weighted((1.0, 3.0), (0.0, 1.0)), gate]).score([one])
    assert one.reward == pytest.approx(0.75 * 0.01 / 1.01)


# ---- the shipped ones --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "gold", "value"),
    [
        ("answer.exact_match", "the Paris.", ["Paris"], 1.0),
        ("answer.exact_match", "in Paris", ["Paris"], 0.0),
        ("answer.exact_match", None, ["Paris"], 0.0),
        ("answer.containment", "in Paris", ["Paris"], 1.0),
        ("answer.token_f1", "in Paris", ["Paris"], 2 / 3),
        ("answer.token_f1", None, ["Paris"], 0.0),
        ("answer.number_match", "it is 42", ["42"], 1.0),
        ("answer.number_match", "41 or 42", ["42"], 0.0),
        ("answer.number_match", "none", ["42"], 0.0),
        ("format.answered", None, ["Paris"], 0.0),
        ("format.answered", "x", ["Paris"], 1.0),
        ("format.stopped", "x", ["Paris"], 1.0),
    ],
)
def test_shipped_rewards(name, text, gold, value):
    assert load_dimension(name)(episode(text, gold)).value == pytest.approx(value)


def test_an_unknown_reward_names_near_ones():
    with pytest.raises(RecipeError, match="exact_match"):
        load_dimension("answer.exact_mtach")
    with pytest.raises(RecipeError):
        load_dimension("nosuch.thing")

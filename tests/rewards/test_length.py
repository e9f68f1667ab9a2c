"""Rewards on length."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfactory import Answer, Episode, Probe, Score, StopReason, Task, Turn
from memfactory.errors import RecipeError
from memfactory.recipe import RewardSection
from memfactory.reward.aggregate import Gated, check_columns
from memfactory.reward.catalogue import build_dimensions, load_dimension
from memfactory.reward.dimension import Role
from memfactory.reward.table import Column


def episode(*lengths, right=True, words=False):
    probe = Probe("?", ("yes",))
    turns = [
        Turn("answer", [], [] if words else [1] * n, [], "w " * (n if words else 1), StopReason.STOP) for n in lengths
    ]
    return Episode(Task("t", (), (probe,)), turns, [Answer(probe, "Yes." if right else "no", "")])


def group_relative(episodes, **options):
    return load_dimension("length.group_relative").function(episodes, **options)


def within(*lengths, **options):
    return load_dimension("length.within").function(episode(*lengths), **options)


def test_hand_numbers():
    correct = [episode(60), episode(40, 100)]  # mean 100
    wrong = [episode(n, right=False) for n in (10, 50, 75, 100, 200)]
    assert group_relative([*correct, *wrong]) == pytest.approx([0, 0, -0.5, -0.5, -0.25, 0, 0])


def test_nobody_correct_and_everybody_correct():
    assert group_relative([episode(n, right=False) for n in (1, 5, 9)]) == [0, 0, 0]
    assert group_relative([episode(n) for n in (1, 5, 9)]) == [0, 0, 0]
    assert group_relative([]) == []
    assert group_relative([episode(0), episode(0, right=False)]) == [0, 0]


def test_options():
    episodes = [episode(100), episode(50, right=False), episode(99, right=False)]
    assert group_relative(episodes, p_max=1.0, tau_share=1.0) == pytest.approx([0, -0.5, -0.01])
    assert group_relative(episodes, tau_share=0.0) == [0, -0.5, -0.5]  # no tolerance


def test_correct_is_what_the_recipe_says():
    one, other = episode(100, right=False), episode(50, right=False)
    one.scores["answer.all_parts"], other.scores["answer.all_parts"] = Score(1.0), Score(0.5)
    assert group_relative([one, other], correct="answer.all_parts") == [0, -0.5]
    other.scores["answer.all_parts"] = Score(None, "judge timed out")
    values = group_relative([one, other], correct="answer.all_parts")
    assert values[0] == 0
    assert values[1].value is None
    assert "not measured" in group_relative([one], correct="answer.numeric")[0].reason


def test_a_measured_score_goes_before_our_own_comparison():
    one, other = episode(100), episode(50, right=False)
    one.scores["answer.exact_match"] = Score(0.0)
    assert group_relative([one, other]) == [0, 0]


def test_records_without_tokens_are_measured_in_words():
    assert group_relative([episode(10, words=True), episode(5, words=True, right=False)]) == [0, -0.5]


def test_short_wrong_answers_no_longer_pay():
    # a reward model that likes short answers (+.2): without the term short-wrong wins, with it it must not
    liked = {"short wrong": 0.2, "long wrong": 0.0}
    _, short, long = group_relative([episode(100), episode(20, right=False), episode(100, right=False)])
    assert liked["short wrong"] > liked["long wrong"]
    assert liked["short wrong"] + short < liked["long wrong"] + long


def test_the_range_is_said_and_the_gated_aggregator_refuses_it():
    dimension = load_dimension("length.group_relative")
    assert (dimension.low, dimension.high, dimension.scope, dimension.role) == (-1, 0, "group", "bonus")
    [plain] = build_dimensions([RewardSection(name="length.group_relative")])
    gate = Column("gate", Role.GATE)
    [error] = check_columns(Gated(), [plain.column, gate])
    assert isinstance(error, RecipeError)
    [scaled] = build_dimensions([RewardSection(name="length.group_relative", transform="unit")])
    assert check_columns(Gated(), [scaled.column, gate]) == []


MEMBERS = st.lists(st.tuples(st.integers(0, 200), st.booleans()), min_size=1, max_size=8)


@given(MEMBERS, st.floats(0, 1), st.floats(0, 2), st.randoms())
def test_group_relative_is_in_range_and_ignores_the_order(members, p_max, tau_share, rng):
    options = {"p_max": p_max, "tau_share": tau_share}
    values = group_relative([episode(n, right=ok) for n, ok in members], **options)
    assert all(-p_max <= value <= 0 for value in values)
    assert all(value == 0 for value, (_, ok) in zip(values, members, strict=True) if ok)
    pairs = list(zip(members, values, strict=True))
    rng.shuffle(pairs)
    again = group_relative([episode(n, right=ok) for (n, ok), _ in pairs], **options)
    assert again == pytest.approx([value for _, value in pairs])


@given(MEMBERS)
def test_a_longer_wrong_answer_is_never_worse(members):
    values = group_relative([episode(100), *(episode(n, right=False) for n, _ in members)])[1:]
    by_length = [value for _, value in sorted(zip([n for n, _ in members], values, strict=True))]
    assert by_length == sorted(by_length)


# ---- soft limit --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "value"),
    [(0, 1), (768, 1), (769, 255 / 256), (896, 0.5), (1024, 0), (5000, 0)],
)
def test_within(length, value):
    assert within(length) == pytest.approx(value)


@given(st.integers(0, 40_000))
def test_within_is_the_soft_overlong_punishment_plus_one(length):
    limit, cache = 20480, 4096
    if length <= limit - cache:
        punishment = 0.0
    elif length <= limit:
        punishment = ((limit - cache) - length) / cache
    else:
        punishment = -1.0
    assert within(length, limit=limit, margin=cache) == pytest.approx(punishment + 1)


def test_within_averages_turns_and_has_a_hard_edge_without_a_margin():
    assert within(0, 896, 1024, 2000) == pytest.approx(1.5 / 4)
    assert within(10, 11, limit=10, margin=0) == 0.5
    assert load_dimension("length.within").function(Episode(Task("t", (), ()))).value is None

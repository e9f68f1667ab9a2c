"""Scopes: whom a score speaks about is whom it moves, to the bit; and rows have no say in it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memfactory.episode import Episode, Score, StopReason, Task, Turn
from memfactory.recipe import CreditSection
from memfactory.reward.aggregate import Gated, WeightedSum
from memfactory.reward.catalogue import WeightedDimension
from memfactory.reward.dimension import RewardDimension, Role, Scope
from memfactory.reward.system import RewardSystem
from memfactory.train.rows import build_rows


def turn(module, score=None, prompt=(1,), size=1):
    """A turn whose own score, where one is asked for, stands in its text."""
    return Turn(module, list(prompt), [7] * size, [-1.0] * size, str(score), StopReason.STOP)


def episode(outcome, turns, group="g", name=""):
    return Episode(Task("t", (), ()), turns, id=name, group=group, memory=str(outcome))


def read(text):
    return Score(None, "not measured") if text == "None" else float(text)


def outcome():
    return WeightedDimension("outcome", RewardDimension("outcome", lambda e: read(e.memory)))


def of_turns(module=None, role=Role.OBJECTIVE, name="own", low=-9, high=9):
    where = Scope.MODULE if module else Scope.TURN
    modules = (module,) if isinstance(module, str) else tuple(module or ())
    made = RewardDimension(name, lambda e, t: read(t.text), low, high, scope=where, role=role, modules=modules)
    return WeightedDimension(name, made)


def assess(episodes, *dimensions, aggregator=None, scale="none", **credit):
    system = RewardSystem([outcome(), *dimensions], aggregator or WeightedSum(), CreditSection(**credit))
    system.begin().finish(episodes)
    return system.assess(episodes, scale_rewards=scale)


def credit(episodes):
    return [[t.advantage for t in e.turns] for e in episodes]


# ---- who is moved ------------------------------------------------------------------------------


def bank(*scores, outcomes=(1.0, 0.0, 0.0, 1.0)):
    """Extract, write, answer, with one score for the write."""
    return [
        episode(o, [turn("extract"), turn("write", s), turn("answer")], name=f"e{i}")
        for i, (o, s) in enumerate(zip(outcomes, scores, strict=True))
    ]


@pytest.mark.parametrize("scale", ["group", "none", "batch"])
@pytest.mark.parametrize("role", [Role.OBJECTIVE, Role.GATE, Role.BONUS])
def test_a_format_failure_of_one_module_leaves_the_others_untouched_to_the_bit(role, scale):
    fine, broken = bank(1, 1, 1, 1), bank(1, 0, 1, 1)
    for episodes in (fine, broken):
        assess(episodes, of_turns("write", role), scale=scale)
    for place in (0, 2):
        assert [e.turns[place].advantage for e in broken] == [e.turns[place].advantage for e in fine]
    assert [e.reward for e in broken] == [e.reward for e in fine]
    assert [e.advantage for e in broken] == [e.advantage for e in fine]
    assert broken[1].turns[1].advantage < fine[1].turns[1].advantage
    for i in (0, 2, 3):
        assert broken[i].turns[1].advantage > fine[i].turns[1].advantage


def test_the_outcome_moves_every_turn():
    before, after = bank(1, 1, 1, 1), bank(1, 1, 1, 1, outcomes=(1.0, 1.0, 0.0, 1.0))
    for episodes in (before, after):
        assess(episodes, of_turns("write"))
    assert all(b > a for a, b in zip(credit(before)[1], credit(after)[1], strict=True))


def test_alpha_mixes_the_outcome_and_the_turn():
    """A = alpha A_ep + (1 - alpha) A_turn: outcomes 1, 0 give +-.5, own scores .2 and .8 give -+.3."""
    for alpha in (1.0, 0.8, 0.25, 0.0):
        episodes = [
            episode(1.0, [turn("write", 0.2), turn("answer")]),
            episode(0.0, [turn("write", 0.8), turn("answer")]),
        ]
        assess(episodes, of_turns("write"), outcome_share=alpha)
        expected = alpha * 0.5 + (1 - alpha) * -0.3
        assert credit(episodes)[0] == pytest.approx([expected, alpha * 0.5])
        assert credit(episodes)[1] == pytest.approx([-expected, -alpha * 0.5])
        assert [e.advantage for e in episodes] == [0.5, -0.5]


def test_alpha_is_one_while_no_turn_is_rewarded():
    """A dimension of turns that is only watched, or a potential, does not shrink the outcome's share."""
    for own in ([], [of_turns("write")]):
        watched = [WeightedDimension(w.name, w.dimension, weight=0.0) for w in own]
        episodes = bank(1, 0, 1, 0)
        assess(episodes, *watched, outcome_share=0.25)
        assert credit(episodes) == [[a] * 3 for a in (0.5, -0.5, -0.5, 0.5)]


def test_a_turn_is_compared_with_the_same_step_of_the_same_question():
    """ReMemR1: one group per question and step. Two questions, two episodes each, three writes."""
    scores = {"q": [(0.1, 0.5, 0.9), (0.3, 0.5, 0.1)], "r": [(1.0, 0.0, 0.5), (0.0, 1.0, 0.7)]}
    episodes = [episode(0.5, [turn("write", s) for s in own], group) for group, both in scores.items() for own in both]
    assess(episodes, of_turns("write"), outcome_share=0.0)
    for place, group in ((0, "q"), (2, "r")):
        first, second = np.array(scores[group])
        expected = (first - second) / 2  # the mean of two is half way
        assert credit(episodes)[place] == pytest.approx(expected.tolist())
        assert credit(episodes)[place + 1] == pytest.approx((-expected).tolist())


def test_the_same_step_is_the_same_number_of_the_module():
    """A search more or less does not shift what a write is compared with; a step that one episode alone has is 0."""
    episodes = [
        episode(0.5, [turn("write", 0.2), turn("search"), turn("write", 0.4), turn("write", 0.9)]),
        episode(0.5, [turn("search"), turn("search"), turn("write", 0.6), turn("write", 0.4)]),
    ]
    assess(episodes, of_turns("write"), outcome_share=0.0)
    assert credit(episodes)[0] == pytest.approx([-0.2, 0.0, 0.0, 0.0])
    assert credit(episodes)[1] == pytest.approx([0.0, 0.0, 0.2, 0.0])


def test_a_longer_episode_is_not_worth_more():
    """Own scores are compared step by step, never summed: many poor turns do not beat one good one."""
    episodes = [
        episode(0.5, [turn("write", 0.9)]),
        episode(0.5, [turn("write", 0.3) for _ in range(5)]),
        episode(0.5, [turn("write", 0.3) for _ in range(5)]),
    ]
    assess(episodes, of_turns("write"), outcome_share=0.0)
    assert credit(episodes)[0] == pytest.approx([0.4])
    assert credit(episodes)[1] == pytest.approx([-0.2, 0, 0, 0, 0], abs=1e-12)
    assert [e.scores["own"].value for e in episodes] == pytest.approx([0.9, 0.3, 0.3])


def test_turn_scope_speaks_about_every_turn():
    episodes = [
        episode(0.5, [turn("extract", 0.0), turn("answer", 1.0)]),
        episode(0.5, [turn("extract", 1.0), turn("answer", 1.0)]),
    ]
    assess(episodes, of_turns(), outcome_share=0.0)
    assert credit(episodes) == [[-0.5, 0.0], [0.5, 0.0]]


def test_several_modules_and_several_dimensions():
    both = of_turns(("write", "answer"), name="both")
    write = of_turns("write", name="write")
    episodes = [
        episode(0.5, [turn("extract", 5), turn("write", 1.0), turn("answer", 1.0)]),
        episode(0.5, [turn("extract", 9), turn("write", 0.0), turn("answer", 0.0)]),
    ]
    assess(episodes, both, write, outcome_share=0.0)
    assert credit(episodes) == [[0.0, 1.0, 0.5], [0.0, -1.0, -0.5]]  # the write is spoken about twice


GOOD = WeightedDimension("good", RewardDimension("good", lambda e, t: 0.8, scope=Scope.MODULE, modules=("write",)))


def test_gates_of_turns_gate_turns():
    gate = of_turns("write", Role.GATE, "gate", 0, 1)
    episodes = [episode(0.5, [turn("write", s)]) for s in (1, 0)]
    assess(episodes, gate, GOOD, aggregator=Gated(gate="veto"), outcome_share=0.0)
    assert credit(episodes) == [[0.4], [-0.4]]


def test_a_gate_of_a_turn_without_a_value_is_closed():
    gate = of_turns("write", Role.GATE, "gate", 0, 1)
    unknown, closed = ([episode(0.5, [turn("write", s)]) for s in (1, last)] for last in (None, 0))
    for episodes in (unknown, closed):
        assess(episodes, gate, GOOD, aggregator=Gated(gate="veto"), outcome_share=0.0)
    assert credit(unknown) == credit(closed)


def test_a_turn_that_could_not_be_measured_has_the_outcome_alone_and_is_in_no_baseline():
    lost, pair = bank(0.9, 0.1, None, 0.5), bank(0.9, 0.1, 0.5, outcomes=(1.0, 0.0, 1.0))
    assess(lost, of_turns("write"))
    assess(pair, of_turns("write"))
    assert credit(lost)[2] == pytest.approx([0.8 * -0.5] * 3)
    own = [e.turns[1].advantage - 0.8 * e.advantage for e in lost]
    expected = [e.turns[1].advantage - 0.8 * e.advantage for e in pair]
    assert own == pytest.approx([*expected[:2], 0.0, expected[2]])


def test_an_episode_that_could_not_be_measured_still_has_its_turns_own():
    """The judge of the answer failed; what the rule says about the write holds all the same."""
    episodes = bank(1.0, 0.0, 1.0, 0.0, outcomes=(None, 1.0, 0.0, 1.0))
    assess(episodes, of_turns("write"))
    assert episodes[0].reward is None
    assert credit(episodes)[0] == pytest.approx([0.0, 0.2 * 0.5, 0.0])


def test_a_module_no_episode_has():
    episodes = bank(1, 1, 1, 1)
    assess(episodes, of_turns("rerank"), outcome_share=0.5)
    assert credit(episodes) == [[a / 2] * 3 for a in (0.5, -0.5, -0.5, 0.5)]
    assert episodes[0].scores["own"].value is None
    assert "no turn" in episodes[0].scores["own"].reason


def test_last_turn_with_rewards_of_turns_stays_untrained():
    episodes = bank(1, 0, 1, 0)
    assess(episodes, of_turns("write"), assigner="last_turn")
    for e in episodes:
        assert [t.trainable for t in e.turns] == [False, False, True]
        assert e.turns[1].advantage == 0.0


def test_a_frozen_turn_stays_frozen():
    episodes = bank(1, 0, 1, 0)
    episodes[0].turns[0].trainable = False
    assess(episodes, of_turns("write"))
    assert [t.trainable for t in episodes[0].turns] == [False, True, True]


def test_group_scope_sees_whole_groups():
    """Novelty: how many others said the same. Groups need not stand together."""
    seen = []

    def novelty(episodes):
        seen.append([e.id for e in episodes])
        return [sum(e.memory != other.memory for other in episodes) / len(episodes) for e in episodes]

    dimension = RewardDimension("novelty", novelty, scope=Scope.GROUP)
    episodes = [
        episode(0.1, [turn("write")], "g", "a"),
        episode(0.1, [turn("write")], "h", "b"),
        episode(0.2, [turn("write")], "g", "c"),
        episode(0.1, [turn("write")], "g", "d"),
    ]
    assess(episodes, WeightedDimension("novelty", dimension))
    assert sorted(seen) == [["a", "c", "d"], ["b"]]
    assert [e.scores["novelty"].value for e in episodes] == pytest.approx([1 / 3, 0, 2 / 3, 1 / 3])


# ---- rows have no say --------------------------------------------------------------------------

MODULES = ("extract", "write", "answer")
plans = st.lists(
    st.tuples(
        st.floats(0, 1).map(lambda x: round(x, 2)),  # outcome
        st.lists(
            st.tuples(
                st.sampled_from(MODULES),
                st.floats(-1, 1).map(lambda x: round(x, 2)),  # its own score
                st.integers(1, 4),  # tokens
                st.booleans(),  # whether its prompt continues the turn before
            ),
            min_size=1,
            max_size=5,
        ),
        st.sampled_from("gh"),
    ),
    min_size=2,
    max_size=6,
)


def make(plan, merged):
    """The episodes of a plan: with prompts that continue what stood before where the plan says so, or never."""
    episodes = []
    for number, (score, steps, group) in enumerate(plan):
        turns = []
        for place, (module, own, size, goes_on) in enumerate(steps):
            before = turns[-1].prompt_ids + turns[-1].completion_ids if turns else []
            prompt = [*before, 5] if merged and goes_on else [1000 + place]
            turns.append(turn(module, own, prompt, size))
        episodes.append(episode(score, turns, group, f"e{number}"))
    return episodes


@settings(max_examples=60)
@given(plans, st.sampled_from(["group", "none", "batch"]), st.floats(0, 1))
def test_splitting_into_rows_changes_no_credit(plan, scale, alpha):
    """The same turns as long rows and as one row each: per episode and over all, token sums are equal to the bit."""
    sums, rows = [], []
    for merged in (True, False):
        episodes = make(plan, merged)
        assess(episodes, of_turns("write"), scale=scale, outcome_share=alpha)
        cut = build_rows(episodes)
        rows.append(len(cut))
        per_episode = [
            math.fsum(a for row in cut if row.episode == i for a in row.advantages) for i in range(len(episodes))
        ]
        by_turn = [math.fsum(t.advantage for t in e.turns for _ in t.completion_ids) for e in episodes]
        assert per_episode == by_turn
        assert sum(row.trained_tokens for row in cut) == sum(size for _, steps, _ in plan for _, _, size, _ in steps)
        sums.append((per_episode, credit(episodes)))
    assert sums[0] == sums[1]
    assert rows[0] <= rows[1] == sum(len(steps) for _, steps, _ in plan)


@settings(max_examples=60)
@given(plans, st.randoms(use_true_random=False))
def test_the_order_of_episodes_does_not_matter(plan, order):
    places = list(range(len(plan)))
    order.shuffle(places)
    straight, mixed = make(plan, False), make([plan[i] for i in places], False)
    for episodes in (straight, mixed):
        assess(episodes, of_turns("write"), scale="group")
    for position, place in enumerate(places):
        assert credit(mixed)[position] == pytest.approx(credit(straight)[place], abs=1e-9)


@settings(max_examples=60)
@given(plans)
def test_module_scope_moves_that_module_alone(plan):
    changed = [
        (score, [(m, -own if m == "write" else own, size, on) for m, own, size, on in steps], group)
        for score, steps, group in plan
    ]
    before, after = make(plan, False), make(changed, False)
    for episodes in (before, after):
        assess(episodes, of_turns("write"), scale="group")
    for one, other in zip(before, after, strict=True):
        for a, b in zip(one.turns, other.turns, strict=True):
            if a.module != "write":
                assert a.advantage == b.advantage


def test_tokens_from_outside_get_nothing():
    """A merged row: what the environment put between two turns has no advantage and is not trained."""
    plan = [
        (1.0, [("write", 1.0, 2, False), ("answer", 0.0, 3, True)], "g"),
        (0.0, [("write", 0.0, 2, False), ("answer", 0.0, 3, True)], "g"),
    ]
    episodes = make(plan, merged=True)
    assess(episodes, of_turns("write"))
    row = build_rows(episodes)[0]
    assert row.trained == [1, 1, 0, 1, 1, 1]
    assert row.advantages == pytest.approx([0.5, 0.5, 0.0, 0.4, 0.4, 0.4])

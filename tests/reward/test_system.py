"""The whole system: what it sets, what a checkpoint keeps, its control experiment, one answer on any ranks."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memfactory.episode import Episode, Score, StopReason, Task, Turn
from memfactory.errors import RecipeErrors
from memfactory.recipe import CreditSection
from memfactory.reward.advantage import GroupState, group_advantages, shuffled
from memfactory.reward.aggregate import Aggregate, Gated, NormalizeThenSum, StagewiseProduct, WeightedSum
from memfactory.reward.batch import _together
from memfactory.reward.catalogue import WeightedDimension
from memfactory.reward.credit import broadcast
from memfactory.reward.dimension import RewardDimension, Role, Scope
from memfactory.reward.system import RewardSystem
from memfactory.reward.table import codes
from memfactory.reward.transform import Clip, Unit


def read(text):
    return Score(None, "not measured") if text == "None" else float(text)


def episode(scores, group="g", name="", turns=(0.5,)):
    """Scores of dimensions of episodes by name; of its turns in their texts."""
    made = [Turn("write", [1], [2], [-1.0], str(score), StopReason.STOP) for score in turns]
    return Episode(Task("t", (), (), dict(scores)), made, id=name, group=group)


def dimension(name, weight=1.0, **options):
    keys = {key: options.pop(key) for key in ("threshold", "stage", "transform") if key in options}
    made = RewardDimension(name, lambda e: e.task.metadata[name], **options)
    return WeightedDimension(name, made, weight, **keys)


def of_turns(name="own", weight=1.0, **options):
    made = RewardDimension(name, lambda e, t: read(t.text), scope=Scope.TURN, **options)
    return WeightedDimension(name, made, weight)


def system(*dimensions, aggregator=None, **credit):
    return RewardSystem(dimensions, aggregator, CreditSection(**credit))


def run(made, episodes, **options):
    return made.assess(episodes, made.begin().finish(episodes), **options)


def singles(*rewards, group="g"):
    return [episode({"a": r}, group, f"{group}{i}") for i, r in enumerate(rewards)]


# ---- what it sets ------------------------------------------------------------------------------


def test_scores_for_evaluation_have_no_credit():
    episodes = singles(0.25, None, 1.0)
    faults = system(dimension("a", 2.0), aggregator=WeightedSum()).score(episodes)
    assert [e.reward for e in episodes] == [0.5, None, 2.0]
    assert [e.advantage for e in episodes] == [0.0] * 3
    assert faults.count == {}


def test_evaluation_and_training_agree_on_the_reward():
    made = system(dimension("a"), dimension("gate", role=Role.GATE), of_turns())
    scores = [{"a": 0.9, "gate": 0.2}, {"a": 0.4, "gate": 1.0}, {"a": None, "gate": 1.0}, {"a": 0.5, "gate": None}]
    evaluated, trained = ([episode(s, name=f"{i}") for i, s in enumerate(scores)] for _ in range(2))
    made.score(evaluated)
    run(made, trained)
    assert [e.reward for e in evaluated] == [e.reward for e in trained]


def test_transforms_come_before_the_aggregator():
    made = system(
        dimension("a", low=-1.0, high=1.0, transform=Unit()),
        dimension("b", low=-math.inf, high=math.inf, transform=Clip(scale=10.0)),
    )
    one = episode({"a": 0.0, "b": 7.0})
    made.score([one])
    assert one.reward == pytest.approx((0.5 + 0.7) / 2)
    assert [one.scores[name].value for name in ("a", "b")] == [0.0, 7.0]  # what was measured stays as it was


def test_a_product_refuses_negative_ranges_at_once():
    gate = dimension("g", role=Role.GATE)
    with pytest.raises(RecipeErrors, match=r"rewards\.a: its range begins at -1"):
        system(dimension("a", low=-1.0), gate)
    with pytest.raises(RecipeErrors, match=r"rewards\.a: its range begins at -1"):
        system(dimension("a", low=-1.0), aggregator=StagewiseProduct())
    system(dimension("a", low=-1.0))  # without a gate nothing multiplies: a plain TRL function may stand there
    with pytest.raises(RecipeErrors, match=r"rewards\.a: weight -1"):
        system(dimension("a", -1.0))
    system(dimension("a", low=-1.0, transform=Unit()), gate)
    system(dimension("a", -1.0, low=-1.0), aggregator=WeightedSum())


def test_counts_and_reasons_of_what_is_missing():
    episodes = [episode({"a": a, "gate": g}) for a, g in ((0.5, 1.0), (None, 1.0), (None, None), (0.1, None))]
    result = run(system(dimension("a"), dimension("gate", role=Role.GATE)), episodes)
    assert result.failed == 2
    own = result.record["dimensions"]
    assert own["a"]["none_share"] == own["gate"]["none_share"] == 0.5
    assert own["gate"]["pass_rate"] == 0.5
    assert own["a"]["reasons"] == {"the function returned None": 2}
    assert result.metrics["rewards/a/none_share"] == 0.5
    assert result.metrics["rewards/a/mean"] == pytest.approx(0.3)
    assert result.record["faults"]["count"] == {}
    json.dumps(result.record)


def test_faults_are_in_metrics_and_record():
    def broken(e):
        raise ValueError("no")

    made = system(dimension("a"), WeightedDimension("b", RewardDimension("b", broken), 0.0))
    result = run(made, singles(0.1, 0.2))
    assert result.metrics["faults/reward"] == 2.0
    assert result.record["faults"]["count"] == {"reward": 2}
    assert "ValueError: no" in result.record["faults"]["examples"][0]
    assert "broken" in result.record["faults"]["tracebacks"][0]


def test_gate_and_utility_are_shown():
    episodes = [episode({"a": 0.5, "gate": g}) for g in (1.0, 0.0)]
    metrics = run(system(dimension("a"), dimension("gate", role=Role.GATE), aggregator=Gated(gate="veto")), episodes)
    assert metrics.metrics["reward/gate"] == 0.5
    assert metrics.metrics["reward/utility"] == 0.5


def test_a_batch_no_dimension_measures():
    result = run(system(dimension("a")), singles(None, None))
    assert result.failed == 2
    assert result.advantages.values.tolist() == [0.0, 0.0]
    assert result.advantages.states == [GroupState.UNMEASURED]
    json.dumps(result.record)


# ---- how rewards are compared ------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "estimator"), [("group", "standardized"), ("none", "centered"), ("batch", "batch")])
def test_scale_rewards_decides_unless_the_recipe_does(scale, estimator):
    rewards, groups = [0.0, 1.0, 0.5, 0.25, 0.3, 0.1], list("gghhii")
    episodes = [episode({"a": r}, g) for r, g in zip(rewards, groups, strict=True)]
    result = run(system(dimension("a")), episodes, scale_rewards=scale)
    assert result.advantages.values == pytest.approx(group_advantages(rewards, groups, estimator).values)
    for own in ("standardized", "centered", "rloo", "batch", "none"):
        result = run(system(dimension("a"), advantage=own), episodes, scale_rewards=scale)
        assert result.advantages.values == pytest.approx(group_advantages(rewards, groups, own).values)


def test_an_aggregator_may_have_an_estimator_of_its_own():
    made = system(dimension("a"), aggregator=NormalizeThenSum())
    assert made.estimator("group") == "batch"
    assert system(dimension("a"), aggregator=NormalizeThenSum(), advantage="rloo").estimator("group") == "rloo"


def test_normalised_per_dimension_the_reward_shown_is_still_the_plain_sum():
    episodes = [episode({"a": a, "b": b}) for a, b in ((1.0, 0.0), (0.0, 0.5), (0.0, 1.0))]
    result = run(system(dimension("a"), dimension("b"), aggregator=NormalizeThenSum()), episodes)
    assert result.rewards.tolist() == [1.0, 0.5, 1.0]
    assert episodes[0].advantage != pytest.approx(episodes[2].advantage)


def test_solved_and_failed_groups_are_told_apart_whatever_is_compared():
    """z-scores of a group without spread are 0, solved or not: which it is, the rewards say."""
    for aggregator in (WeightedSum(), NormalizeThenSum()):
        made = system(dimension("a"), aggregator=aggregator)
        solved, failed = singles(1.0, 1.0, group="g"), singles(0.0, 0.0, group="h")
        signal, tied = singles(1.0, 0.0, group="i"), singles(0.5, 0.5, group="j")
        states = run(made, [*solved, *failed, *signal, *tied]).advantages.states
        assert states == [GroupState.SOLVED, GroupState.FAILED, GroupState.SIGNAL, GroupState.TIED]
        assert run(made, solved).advantages.states == [GroupState.SOLVED]
        assert run(made, failed).advantages.states == [GroupState.FAILED]


def test_rounding_does_not_hide_that_a_group_is_solved():
    rewards, groups = [0.1 + 0.2, 0.3, 0.3, 0.3, 0.0, 0.3], list("gghhii")
    states = group_advantages(rewards, groups).states
    assert states == [GroupState.SOLVED, GroupState.SOLVED, GroupState.SIGNAL]


# ---- the control experiment --------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=4), st.integers(0, 2**62))
def test_a_shuffle_stays_inside_groups(groups, seed):
    values = np.array([x for own in groups for x in own], dtype=float)
    names = codes([i for i, own in enumerate(groups) for _ in own])
    result = shuffled(values, names, seed)
    for i, own in enumerate(groups):
        assert Counter(result[names == i]) == Counter(map(float, own))
    assert shuffled(values, names, seed).tolist() == result.tolist()


def test_shuffled_rewards_move_together_with_what_is_learned_from():
    made = system(dimension("a"), dimension("b"), aggregator=NormalizeThenSum(), shuffle_rewards=True)
    scores = [(1.0, 0.0), (0.0, 0.5), (0.3, 0.3), (0.2, 0.9)]
    plain, mixed = ([episode({"a": a, "b": b}) for a, b in scores] for _ in range(2))
    run(system(dimension("a"), dimension("b"), aggregator=NormalizeThenSum()), plain)
    result = run(made, mixed, seed=3)
    pairs = {e.reward: e.advantage for e in plain}
    assert len(pairs) == 4
    assert [e.reward for e in mixed] != [e.reward for e in plain]
    assert {e.reward: pytest.approx(e.advantage) for e in mixed} == pairs
    assert result.rewards.tolist() == [e.reward for e in mixed]


def test_rewards_of_turns_are_shuffled_too_among_the_same_step():
    turns = [[0.1, 0.5], [0.9, 0.6], [0.3, 0.7], [0.4, 0.8]]
    plain, mixed = ([episode({"a": 0.5}, turns=own) for own in turns] for _ in range(2))
    run(system(dimension("a"), of_turns(), outcome_share=0.0), plain, scale_rewards="none")
    shuffle = system(dimension("a"), of_turns(), outcome_share=0.0, shuffle_rewards=True)
    run(shuffle, mixed, scale_rewards="none", seed=1)
    assert [[t.advantage for t in e.turns] for e in mixed] != [[t.advantage for t in e.turns] for e in plain]
    for step in (0, 1):
        before, after = (sorted(e.turns[step].advantage for e in episodes) for episodes in (plain, mixed))
        assert after == pytest.approx(before)
    assert [e.turns[0].scores["own"].value for e in mixed] == [own[0] for own in turns]  # scores stay true


# ---- checkpoints -------------------------------------------------------------------------------


class Memory:
    """Something with a state, and how often it was told of a batch."""

    def __init__(self):
        self.tables, self.number = [], 0.0

    def update(self, table):
        self.tables.append(table)
        self.number = float(np.nanmean(table.values))

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, state):
        self.number = state["number"]


class Running(Memory):
    """An aggregator: the first dimension above its mean in the batch before."""

    needs_positive, scale_free, stateful = False, False, True

    def __call__(self, table):
        return Aggregate(table.values[:, 0] - self.number)


class Damped(Memory):
    """An assigner."""

    def __call__(self, batch):
        return broadcast(batch) * (1 - self.number)


class Novel(Memory):
    """A dimension: distance from what it saw last."""

    def __call__(self, e):
        return abs(e.task.metadata["a"] - self.number)


class Scaled(Memory):
    """A transform."""

    def __call__(self, values, low, high):
        return values * (1 + self.number)

    def bounds(self, low, high):
        return low, high


def stateful():
    made = RewardSystem(
        [
            dimension("a", 0.5, transform=Scaled()),
            WeightedDimension("novel", RewardDimension("novel", Novel())),
        ],
        Running(),
        CreditSection(),
    )
    made.assigner = Damped()
    return made


def parts_of(made):
    return {
        "aggregator": made.aggregator,
        "assigner": made.assigner,
        "dimension": made.dimensions[1].dimension.function,
        "transform": made.dimensions[0].transform,
    }


def test_each_part_with_a_state_hears_of_each_batch_once():
    made = stateful()
    for batches in (1, 2):
        run(made, singles(0.25, 0.75))
        for name, part in parts_of(made).items():
            assert len(part.tables) == batches, name
            assert [column.name for column in part.tables[-1].columns] == ["a", "novel"]
            assert part.tables[-1].values.shape == (2, 2)
    made.score(singles(0.1, 0.2))  # evaluation teaches nothing
    assert {len(part.tables) for part in parts_of(made).values()} == {2}


def test_one_object_under_two_names_hears_of_a_batch_once():
    shared = Novel()
    made = system(
        *[WeightedDimension(n, RewardDimension(n, shared)) for n in ("one", "two")], aggregator=WeightedSum()
    )
    run(made, singles(0.25, 0.75))
    assert len(shared.tables) == 1


def test_a_checkpoint_brings_everything_back():
    first, second = stateful(), stateful()
    run(first, singles(0.25, 0.75, 0.5))
    first.dimensions = [WeightedDimension(w.name, w.dimension, 0.125, transform=w.transform) for w in first.dimensions]
    state = json.loads(json.dumps(first.state_dict()))  # plain data
    assert state["weights"] == {"a": 0.125, "novel": 0.125}
    assert set(state["parts"]) == {"aggregator", "assigner", "dimension/novel", "transform/a"}
    second.load_state_dict(state)
    assert second.state_dict() == first.state_dict()
    for name, part in parts_of(second).items():
        assert part.number == parts_of(first)[name].number != 0.0, name

    one, other = singles(0.1, 0.9, 0.4), singles(0.1, 0.9, 0.4)
    run(first, one)
    run(second, other)
    assert [(e.reward, e.advantage, e.turns[0].advantage) for e in other] == [
        (e.reward, e.advantage, e.turns[0].advantage) for e in one
    ]
    fresh = singles(0.1, 0.9, 0.4)
    run(stateful(), fresh)
    assert [e.reward for e in fresh] != [e.reward for e in one]  # the state did matter


def test_a_checkpoint_of_another_recipe_changes_what_they_share():
    made = system(dimension("a", 2.0), dimension("b", 3.0))
    made.load_state_dict({"weights": {"a": 0.5, "gone": 9.0}, "parts": {"dimension/gone": {}}})
    assert [w.weight for w in made.dimensions] == [0.5, 3.0]


def test_a_stateless_system_has_a_small_state():
    made = system(dimension("a", 2.0), aggregator=StagewiseProduct())
    assert made.state_dict() == {"weights": {"a": 2.0}, "parts": {}}


# ---- one answer on any number of ranks ---------------------------------------------------------


cell = st.one_of(st.none(), st.integers(0, 8).map(lambda x: x / 8))
plans = st.integers(1, 3).flatmap(
    lambda half: st.lists(
        st.tuples(cell, cell, st.sampled_from("gh"), st.lists(cell, max_size=3)), min_size=2 * half, max_size=2 * half
    )
)


def everything(aggregator):
    spread = RewardDimension("size", lambda es: [len(es) / 9] * len(es), scope=Scope.GROUP)
    return RewardSystem(
        [
            dimension("a"),
            dimension("gate", role=Role.GATE),
            WeightedDimension("size", spread),
            of_turns("own"),
            of_turns("phi", role=Role.SHAPING),
        ],
        aggregator,
        CreditSection(shuffle_rewards=True),
    )


@settings(max_examples=40)
@given(plans, st.sampled_from([Gated(), NormalizeThenSum()]), st.sampled_from(["group", "batch"]))
def test_two_ranks_come_to_what_one_does(on_ranks, plan, aggregator, scale):
    def make():
        return [episode({"a": a, "gate": b}, g, f"e{i}", turns) for i, (a, b, g, turns) in enumerate(plan)]

    alone, spread = make(), make()
    made = everything(aggregator)
    expected = made.assess(alone, made.begin().finish(alone), scale_rewards=scale, seed=7)

    def work(rank, own, gather):
        mine = everything(aggregator)
        faults = mine.begin().finish(own, gather)
        return mine.assess(own, faults, scale_rewards=scale, seed=7, gather=gather, rank=rank)

    half = len(spread) // 2
    results = on_ranks([spread[:half], spread[half:]], work)
    for result in results:
        assert np.array_equal(result.rewards, expected.rewards, equal_nan=True)
        assert result.advantages.values.tolist() == expected.advantages.values.tolist()
        assert json.dumps(result.record) == json.dumps(expected.record)
    for one, other in zip(alone, spread, strict=True):
        assert (other.reward, other.advantage) == (one.reward, one.advantage)
        assert [(t.advantage, t.trainable) for t in other.turns] == [(t.advantage, t.trainable) for t in one.turns]


def test_ranks_stop_together(on_ranks):
    def broken(e):
        if e.id == "e3":
            raise ValueError("only here")
        return 1.0

    made = WeightedDimension("b", RewardDimension("b", broken))
    episodes = [episode({"a": 1.0}, name=f"e{i}") for i in range(4)]
    messages = []

    def work(rank, own, gather):
        mine = RewardSystem([made], WeightedSum())
        faults = mine.begin().finish(own, gather)
        try:
            mine.assess(own, faults, gather=gather, rank=rank, max_failed_share=0.2)
        except Exception as error:
            messages.append(str(error))

    on_ranks([episodes[:2], episodes[2:]], work)
    assert len(messages) == 2
    assert messages[0] == messages[1]
    assert "1 of 4 episodes could not be scored" in messages[0]
    assert "only here" in messages[0]


def test_the_judges_numbers_of_two_ranks_are_added_or_averaged():
    first = {"asked": 10.0, "requests": 5.0, "cost": 1.0, "cache_hit_rate": 0.5, "latency": 2.0}
    second = {"asked": 30.0, "requests": 15.0, "cost": 3.0, "cache_hit_rate": 0.1, "latency": 1.0, "failures/429": 2.0}
    together = _together([first, second, {}])
    assert together == pytest.approx(
        {"asked": 40, "requests": 20, "cost": 4, "cache_hit_rate": 0.2, "latency": 1.25, "failures/429": 2}
    )


def test_a_huge_reward_elsewhere_leaves_a_group_its_signal():
    result = group_advantages([0.0, 1.0, 1e10, 2e10], ["a", "a", "b", "b"])
    assert result.states == [GroupState.SIGNAL, GroupState.SIGNAL]
    assert result.values[:2] == pytest.approx([-(0.5**0.5), 0.5**0.5], abs=1e-3)

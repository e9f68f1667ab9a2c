"""Aggregators: what each does with a score that is missing, hand numbers, TRL's arithmetic, and laws all obey."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from trl.trainer.utils import nanstd

from memfactory.errors import RecipeError
from memfactory.recipe import AggregateSection
from memfactory.reward.advantage import GroupState, advantages
from memfactory.reward.aggregate import (
    AGGREGATORS,
    Aggregator,
    Gated,
    MinMaxMean,
    NormalizeThenSum,
    StagewiseProduct,
    WeightedSum,
    build_aggregator,
    check_columns,
    settle,
)
from memfactory.reward.dimension import Missing, Role
from memfactory.reward.table import Column, ScoreTable, codes, group_mean, group_std

STATISTICS = dict.fromkeys(("gate", "a", "b", "c", "bonus"), (0.0, 1.0))
ALL = {
    "gated": Gated(),
    "product": Gated(gate="product"),
    "min": Gated(gate="min"),
    "veto": Gated(gate="veto"),
    "weighted_sum": WeightedSum(),
    "normalize_then_sum": NormalizeThenSum(),
    "min_max_mean": MinMaxMean(STATISTICS),
    "stagewise_product": StagewiseProduct(),
}
every = pytest.mark.parametrize("aggregator", ALL.values(), ids=ALL)
ESTIMATORS = ("standardized", "centered", "rloo", "batch")
N = None


def columns(missing="exclude", **changes):
    """A gate, two objectives of one stage and a bonus."""
    made = [
        Column("gate", Role.GATE, 1.0),
        Column("a", Role.OBJECTIVE, 2.0, stage="content"),
        Column("b", Role.OBJECTIVE, 1.0, stage="content"),
        Column("bonus", Role.BONUS, 0.5),
    ]
    return [dataclasses.replace(column, missing=Missing(missing), **changes) for column in made]


def table(rows, groups, made=None):
    return ScoreTable.from_rows(rows, made or columns(), groups)


def outcome(aggregator, scores):
    """Rewards and what episodes are compared by."""
    aggregate = aggregator(scores)
    return aggregate.reward, aggregate.reward if aggregate.signal is None else aggregate.signal


def without(scores, rows):
    """The same table with some episodes absent."""
    keep = [i for i in range(len(scores.values)) if i not in rows]
    return dataclasses.replace(scores, values=scores.values[keep], groups=codes(scores.groups[keep].tolist())), keep


# ---- a score that is missing -------------------------------------------------------------------

FULL = [
    [1.0, 0.9, 0.2, 0.3],
    [0.8, 0.4, 0.7, 0.1],
    [1.0, 0.1, 0.6, 0.9],
    [0.6, 0.7, 0.5, 0.4],
]
OTHER = [
    [1.0, 0.3, 0.3, 0.2],
    [0.7, 0.8, 0.1, 0.6],
    [0.9, 0.2, 0.9, 0.5],
    [1.0, 0.6, 0.4, 0.0],
]


@dataclasses.dataclass
class Case:
    """Scores that are missing, as (episode, dimension), and who has no reward then under each policy."""

    lost: list[tuple[int, int]]
    exclude: set[int]
    drop: set[int]
    group_mean: set[int]
    size: int = 4
    """Of the first group."""

    def scores(self, policy):
        rows = [list(row) for row in FULL[: self.size] + OTHER]
        for row, column in self.lost:
            rows[row][column] = None
        return table(rows, ["g"] * self.size + ["h"] * 4, columns(policy))


GATE, A, B, BONUS = range(4)
CASES = {
    "nothing": Case([], set(), set(), set()),
    "one objective": Case([(0, A)], {0}, set(), set()),
    "both objectives": Case([(0, A), (0, B)], {0}, {0}, {0}),
    "a bonus": Case([(0, BONUS)], {0}, set(), set()),
    "a gate": Case([(0, GATE)], set(), set(), set()),
    "a gate and an objective": Case([(0, GATE), (0, B)], {0}, set(), set()),
    "the gate of a whole group": Case([(i, GATE) for i in range(4)], set(), set(), set()),
    "all of one episode": Case([(0, k) for k in range(4)], {0}, {0}, {0}),
    "one objective of a whole group": Case([(i, A) for i in range(4)], {0, 1, 2, 3}, set(), {0, 1, 2, 3}),
    "all of a whole group": Case([(i, k) for i in range(4) for k in range(4)], *[{0, 1, 2, 3}] * 3),
    "all but one of a group": Case([(i, A) for i in range(3)], {0, 1, 2}, set(), set()),
    "one of a group of two": Case([(0, A)], {0}, set(), set(), size=2),
    "all of one of a group of two": Case([(0, k) for k in range(4)], {0}, {0}, {0}, size=2),
    "gates of a group of two": Case([(0, GATE), (1, GATE)], set(), set(), set(), size=2),
    "objectives of different episodes": Case([(0, A), (1, B), (5, A)], {0, 1, 5}, set(), set()),
    "the bonus of a whole group": Case([(i, BONUS) for i in range(4)], {0, 1, 2, 3}, set(), {0, 1, 2, 3}),
}
table_of_cases = pytest.mark.parametrize("case", CASES.values(), ids=[name.replace(" ", "-") for name in CASES])


@pytest.mark.parametrize("policy", list(Missing))
@pytest.mark.parametrize("estimator", ESTIMATORS)
@table_of_cases
@every
def test_missing_scores(aggregator, case, estimator, policy):
    scores = case.scores(policy)
    rewards, signal = outcome(aggregator, scores)
    lost = getattr(case, policy)
    assert set(np.flatnonzero(np.isnan(rewards))) == lost
    assert set(np.flatnonzero(np.isnan(signal))) == lost

    result = advantages(signal, scores.groups, estimator)
    assert np.isfinite(result.values).all()
    assert np.isfinite(result.divisors).all()
    assert not result.values[sorted(lost)].any()
    for group in (0, 1):
        assert result.values[scores.groups == group].sum() == pytest.approx(0, abs=1e-9)

    # who has no reward is in no baseline: the others have what they would have had without it
    fewer, keep = without(scores, lost)
    assert rewards[keep] == pytest.approx(outcome(aggregator, fewer)[0], abs=1e-12)
    expected = advantages(outcome(aggregator, fewer)[1], fewer.groups, estimator)
    assert result.values[keep] == pytest.approx(expected.values, abs=1e-9)

    # a gate that could not be measured is worth what the gate is worth at its lowest
    gates = [row for row, column in case.lost if column == GATE and row not in lost]
    if gates:
        closed = scores.values.copy()
        closed[gates, GATE] = 0.0
        as_closed = outcome(aggregator, dataclasses.replace(scores, values=closed))
        assert rewards[gates] == pytest.approx(as_closed[0][gates], abs=1e-12)
        assert signal == pytest.approx(as_closed[1], abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("role", [Role.GATE, Role.OBJECTIVE, Role.BONUS])
@every
def test_a_gate_without_a_value_never_gains(aggregator, role):
    """Against the same episode with the gate at any value: no more. The other roles: never a silent zero."""
    place = {Role.GATE: GATE, Role.OBJECTIVE: A, Role.BONUS: BONUS}[role]
    rows = [list(row) for row in FULL]
    rows[0][place] = None
    missing, _ = outcome(aggregator, table(rows, ["g"] * 4))
    if role is not Role.GATE:
        assert np.isnan(missing[0])
        return
    for value in (0.0, 0.3, 1.0):
        rows[0][place] = value
        assert missing[0] <= outcome(aggregator, table(rows, ["g"] * 4))[0][0]


@pytest.mark.parametrize("name", ["gated", "product", "weighted_sum", "min_max_mean", "stagewise_product"])
@pytest.mark.parametrize("place", [A, B])
def test_a_dropped_objective_leaves_the_rest_at_the_same_total_weight(name, place):
    """As if the recipe had only the other objective, with the weight of both (for a mean of D scores: D - 1)."""
    rows = [list(row) for row in FULL]
    rows[0][place] = None
    reward, _ = outcome(ALL[name], table(rows, ["g"] * 4, columns("drop")))
    other = A + B - place
    weight = 3.0 if name != "min_max_mean" else columns()[other].weight
    made = [c if k != other else dataclasses.replace(c, weight=weight) for k, c in enumerate(columns())]
    keep = [k for k in range(4) if k != place]
    alone = table([[row[k] for k in keep] for row in FULL], ["g"] * 4, [made[k] for k in keep])
    assert reward[0] == pytest.approx(outcome(ALL[name], alone)[0][0], abs=1e-12)


def test_a_dropped_bonus_is_no_bonus():
    rows = [[1.0, 0.5, 0.5, None], [1.0, 0.5, 0.5, 0.0]]
    for name in ("gated", "weighted_sum"):
        reward, _ = outcome(ALL[name], table(rows, ["g"] * 2, columns("drop")))
        assert reward[0] == reward[1]


def test_the_gate_does_not_stand_in_for_a_dropped_objective():
    """Gate 1, objective a missing, b = 0: nothing good was measured, so the gate's weight alone is paid."""
    made = [Column("gate", Role.GATE), Column("a", missing=Missing.DROP), Column("b", missing=Missing.DROP)]
    reward = WeightedSum()(table([[1.0, None, 0.0]], ["g"], made)).reward
    assert reward.tolist() == [1.0]


@pytest.mark.parametrize("name", [name for name in ALL if name != "normalize_then_sum"])
def test_the_mean_of_the_group_stands_in(name):
    rows = [list(row) for row in FULL + OTHER]
    rows[0][A] = None
    reward, _ = outcome(ALL[name], table(rows, ["g"] * 4 + ["h"] * 4, columns("group_mean")))
    rows[0][A] = sum(row[A] for row in FULL[1:]) / 3
    assert reward == pytest.approx(outcome(ALL[name], table(rows, ["g"] * 4 + ["h"] * 4))[0], abs=1e-12)


@every
def test_who_has_no_reward_is_not_in_the_mean_that_stands_in(aggregator):
    """b of the second could not be measured, so it leaves; its a = 1 must not fill the a of the first."""
    made = [Column("a", missing=Missing.GROUP_MEAN), Column("b", missing=Missing.EXCLUDE)]
    scores = table([[None, 0.5], [1.0, None], [0.25, 0.5], [0.75, 0.25]], ["g"] * 4, made)
    fewer, keep = without(scores, {1})
    for full, part in zip(outcome(aggregator, scores), outcome(aggregator, fewer), strict=True):
        assert full[keep] == pytest.approx(part, abs=1e-12)


def test_normalised_the_mean_of_the_group_adds_nothing():
    rows = [[None, 0.2], [1.0, 0.2], [0.0, 0.2]]
    made = [Column("a", missing=Missing.GROUP_MEAN), Column("b")]
    assert NormalizeThenSum()(table(rows, ["g"] * 3, made)).signal[0] == pytest.approx(0, abs=1e-12)


roles = st.sampled_from([Role.GATE, Role.OBJECTIVE, Role.BONUS])
value = st.one_of(st.none(), st.floats(0, 1).map(lambda x: round(x, 2)))


@st.composite
def tables(draw, missing=True, bonus=True):
    """Up to nine episodes in up to three groups, up to four dimensions of any role, weight and policy."""
    kinds = roles if bonus else st.sampled_from([Role.GATE, Role.OBJECTIVE])
    count = draw(st.integers(1, 4))
    made = [
        Column(
            name,
            draw(kinds),
            draw(st.sampled_from([0.5, 1.0, 3.0])),
            missing=draw(st.sampled_from(list(Missing))),
            stage=draw(st.sampled_from(["", "one", "two"])),
        )
        for name in ("a", "b", "c", "bonus")[:count]
    ]
    size = draw(st.integers(1, 9))
    cell = value if missing else st.floats(0, 1).map(lambda x: round(x, 2))
    rows = draw(st.lists(st.lists(cell, min_size=count, max_size=count), min_size=size, max_size=size))
    groups = draw(st.lists(st.sampled_from("ghi"), min_size=size, max_size=size))
    return ScoreTable.from_rows(rows, made, groups)


def expected_without_reward(scores):
    """Episode by episode, in words: who gets no reward."""
    gone = set()
    columns = list(enumerate(scores.columns))
    needed = [k for k, c in columns if c.role is Role.OBJECTIVE]
    if not needed and not any(c.role is Role.GATE for _, c in columns):  # gates by themselves fail closed
        needed = [k for k, _ in columns]
    for i, row in enumerate(scores.values):
        unknown = [k for k, _ in columns if math.isnan(row[k])]
        if needed and set(needed) <= set(unknown):
            gone.add(i)  # nothing was measured of what it is for
        for k in unknown:
            if scores.columns[k].role is not Role.GATE and scores.columns[k].missing is Missing.EXCLUDE:
                gone.add(i)
    stay = set(range(len(scores.values))) - gone
    for i in stay:
        for k, column in columns:
            filled = column.missing is Missing.GROUP_MEAN and column.role is not Role.GATE
            if filled and math.isnan(scores.values[i, k]):
                peers = [j for j in stay if scores.groups[j] == scores.groups[i]]
                if all(math.isnan(scores.values[j, k]) for j in peers):
                    gone.add(i)  # there is no mean
    return gone


@given(tables())
def test_who_has_no_reward_and_that_nobody_else_notices(scores):
    gone = expected_without_reward(scores)
    for name, aggregator in ALL.items():
        rewards, signal = outcome(aggregator, scores)
        assert set(np.flatnonzero(np.isnan(rewards))) == gone, name
        assert set(np.flatnonzero(np.isnan(signal))) == gone, name
        fewer, keep = without(scores, gone)
        if keep:
            for full, part in zip((rewards, signal), outcome(aggregator, fewer), strict=True):
                assert full[keep] == pytest.approx(part, abs=1e-12), name


def test_settle_keeps_what_was_missing():
    scores = table([[None, 0.5, None, 1.0]], ["g"], columns("drop"))
    settled, mask = settle(scores)
    assert settled.failed.tolist() == [[True, False, True, False]]
    assert settled.values[0, GATE] == 0.0
    assert mask.tolist() == [0.0]


@every
def test_weight_zero_and_potentials_take_no_part(aggregator):
    extra = [Column("c", Role.GATE, 0.0), Column("d", Role.SHAPING, 1.0)]
    plain, more = table(FULL, ["g"] * 4), table([[*row, None, None] for row in FULL], ["g"] * 4, columns() + extra)
    for before, after in zip(outcome(aggregator, plain), outcome(aggregator, more), strict=True):
        assert after.tolist() == before.tolist()


# ---- TRL's rules -------------------------------------------------------------------------------


def trl(values, weights, groups, rule, scale="group"):
    """TRL 1.16, GRPOTrainer._generate_and_score_completions, line by line but for the names. (N, K) -> (N,)"""
    table = torch.tensor(values, dtype=torch.float64)
    weights = torch.tensor(weights, dtype=torch.float64)
    unscorable = table.isnan().all(dim=1)
    if rule == "sum_then_normalize":
        rewards = (table * weights[None]).nansum(dim=1)
        rewards[unscorable] = torch.nan
        grouped = rewards.view(-1, groups)
        result = rewards - grouped.nanmean(dim=1).repeat_interleave(groups)
        if scale == "group":
            result = result / (nanstd(grouped, dim=1).repeat_interleave(groups) + 1e-4)
        elif scale == "batch":
            result = result / (nanstd(rewards) + 1e-4)
    else:
        grouped = table.view(-1, groups, table.shape[1])
        mean = torch.nanmean(grouped, dim=1, keepdim=True)
        std = nanstd(grouped, dim=1).unsqueeze(1)
        scaled = ((grouped - mean) / (std + 1e-4)).view(-1, table.shape[1])
        rewards = (scaled * weights[None]).nansum(dim=1)
        rewards[unscorable] = torch.nan
        result = (rewards - torch.nanmean(rewards)) / (nanstd(rewards) + 1e-4)
    return torch.nan_to_num(result, nan=0.0).numpy()


def ours(aggregator, values, weights, groups, estimator, missing="exclude"):
    made = [Column(f"d{k}", weight=w, low=-math.inf, missing=Missing(missing)) for k, w in enumerate(weights)]
    names = [i // groups for i in range(len(values))]
    scores = ScoreTable.from_rows(values, made, names)
    return advantages(outcome(aggregator, scores)[1], scores.groups, estimator).values


grids = st.integers(1, 4).flatmap(
    lambda groups: st.integers(1, 3).flatmap(
        lambda k: st.tuples(
            st.lists(
                st.lists(st.integers(-20, 20).map(lambda x: x / 4), min_size=k, max_size=k),
                min_size=4 * groups,
                max_size=4 * groups,
            ),
            st.lists(st.sampled_from([-1.0, 0.5, 1.0, 2.5]), min_size=k, max_size=k),
        )
    )
)


@pytest.mark.parametrize(("scale", "estimator"), [("group", "standardized"), ("none", "centered"), ("batch", "batch")])
@given(grid=grids)
def test_weighted_sum_is_sum_then_normalize(grid, scale, estimator):
    values, weights = grid
    expected = trl(values, weights, 4, "sum_then_normalize", scale)
    assert ours(WeightedSum(), values, weights, 4, estimator) == pytest.approx(expected, abs=1e-6)


@given(grid=grids)
def test_normalize_then_sum_is_that_of_trl(grid):
    values, weights = grid
    expected = trl(values, weights, 4, "normalize_then_sum")
    assert ours(NormalizeThenSum(), values, weights, 4, "batch") == pytest.approx(expected, abs=1e-6)


def test_where_a_score_is_missing_trl_goes_on_with_the_rest():
    """TRL adds up what there is, so an episode loses what could not be measured. Ours leaves it out, or under
    `drop` weighs the rest in its place."""
    values = [[1.0, math.nan], [1.0, 1.0], [0.0, 1.0], [0.0, 0.0]]
    given = [[None if math.isnan(x) else x for x in row] for row in values]
    theirs = trl(values, [1.0, 1.0], 4, "sum_then_normalize", "none")
    assert theirs.tolist() == [0.0, 1.0, 0.0, -1.0]  # 1 + nothing = 1: as good as 0 + 1
    left_out = ours(WeightedSum(), given, [1.0, 1.0], 4, "centered")
    assert left_out == pytest.approx([0.0, 1.0, 0.0, -1.0])  # it is in no baseline: the mean is that of 2, 1, 0
    dropped = ours(WeightedSum(), given, [1.0, 1.0], 4, "centered", "drop")
    assert dropped == pytest.approx([0.75, 0.75, -0.25, -1.25])

    theirs = trl(values, [1.0, 1.0], 4, "normalize_then_sum")
    assert ours(NormalizeThenSum(), given, [1.0, 1.0], 4, "batch", "drop") == pytest.approx(theirs, abs=1e-6)
    left_out = ours(NormalizeThenSum(), given, [1.0, 1.0], 4, "batch")
    assert left_out[0] == 0.0
    assert left_out[1:] == pytest.approx(ours(NormalizeThenSum(), given[1:], [1.0, 1.0], 3, "batch"))


def test_in_trl_an_abstaining_gate_passes_and_here_it_fails():
    assert np.nansum([math.nan, 1.0]) == 1.0
    made = [Column("gate", Role.GATE), Column("a")]
    reward = WeightedSum()(ScoreTable.from_rows([[None, 1.0], [0.0, 1.0], [1.0, 1.0]], made, ["g"] * 3)).reward
    assert reward.tolist() == [1.0, 1.0, 2.0]


# ---- normalize_then_sum ------------------------------------------------------------------------


def test_normalised_in_the_group_then_added():
    """a = 1, 0 and b = 0, 10: z is (.7071, -.7071) and (-.7071, .7071), so equal weights tie and weight 2 decides."""
    rows = [[1.0, 0.0], [0.0, 10.0]]
    made = [Column("a"), Column("b", high=10.0)]
    a, b = 0.5 / (math.sqrt(0.5) + 1e-4), 5 / (math.sqrt(50) + 1e-4)
    aggregate = NormalizeThenSum()(table(rows, ["g"] * 2, made))
    assert aggregate.signal == pytest.approx([a - b, b - a], rel=1e-12)
    assert aggregate.signal == pytest.approx([0, 0], abs=2e-4)
    assert aggregate.reward.tolist() == [1.0, 10.0]  # what is shown is the plain sum
    made[0] = dataclasses.replace(made[0], weight=2.0)
    assert NormalizeThenSum()(table(rows, ["g"] * 2, made)).signal == pytest.approx([0.7071, -0.7071], abs=4e-4)


def test_a_dimension_that_is_constant_in_a_group_adds_nothing():
    rows = [[1.0, 0.3], [0.0, 0.3], [1.0, 0.7], [0.0, 0.1]]
    made = [Column("a"), Column("b")]
    signal = NormalizeThenSum()(table(rows, ["g", "g", "h", "h"], made)).signal
    alone = NormalizeThenSum()(table([row[:1] for row in rows], ["g", "g", "h", "h"], made[:1])).signal
    assert signal[:2] == pytest.approx(alone[:2], abs=1e-12)
    assert signal[2:] != pytest.approx(alone[2:], abs=0.1)


def test_noise_is_not_normalised_up():
    """Scores .50 and .52 of a judge whose noise is .1: an advantage of .1, not of .7."""
    rows = [[0.50], [0.52]]
    loud = NormalizeThenSum()(table(rows, ["g"] * 2, [Column("a")])).signal
    calm = NormalizeThenSum()(table(rows, ["g"] * 2, [Column("a", noise=0.1)])).signal
    assert loud == pytest.approx([-0.7021, 0.7021], abs=1e-3)
    assert calm == pytest.approx([-0.01 / 0.1001, 0.01 / 0.1001], rel=1e-12)
    wide = [[0.0], [1.0]]  # a real difference is above it
    assert NormalizeThenSum()(table(wide, ["g"] * 2, [Column("a", noise=0.1)])).signal == pytest.approx(
        NormalizeThenSum()(table(wide, ["g"] * 2, [Column("a")])).signal
    )


def test_one_scale_does_not_drown_another():
    """Why it exists: under the plain sum a dimension in hundreds decides alone."""
    made = [Column("a"), Column("b", high=500.0)]
    rows = [[1.0, 100.0], [0.0, 110.0], [1.0, 105.0], [0.0, 95.0]]
    plain = WeightedSum()(table(rows, ["g"] * 4, made)).reward
    assert plain.argmax() == 1
    assert NormalizeThenSum()(table(rows, ["g"] * 4, made)).signal.argmax() == 2


# ---- min_max_mean and stagewise_product --------------------------------------------------------


def test_min_max_mean():
    """(1/D) sum w (x - min) / (max - min) with statistics of the whole labelled set."""
    frozen = MinMaxMean({"a": (0.0, 10.0), "b": (-5.0, 0.0)})
    made = [Column("a", weight=1.0), Column("b", weight=2.0)]
    rewards = frozen(table([[5.0, -5.0], [10.0, 0.0], [0.0, -2.5]], ["g"] * 3, made)).reward
    assert rewards == pytest.approx([0.25, 1.5, 0.5])
    alone = frozen(table([[5.0, -5.0]], ["g"], made)).reward  # it does not depend on the batch
    assert alone == pytest.approx([0.25])
    flat = MinMaxMean({"a": (3.0, 3.0)})(table([[3.0], [4.0]], ["g"] * 2, made[:1])).reward
    assert flat == pytest.approx([0.0, 1.0])  # a set without spread does not divide by 0


def test_min_max_mean_without_statistics_is_refused():
    with pytest.raises(RecipeError, match="no smallest and largest value of b"):
        MinMaxMean({"a": (0.0, 1.0)})(table([[0.0, 1.0]], ["g"], [Column("a"), Column("b")]))
    with pytest.raises(RecipeError, match="statistics"):
        build_aggregator(AggregateSection(name="min_max_mean"))


STAGES = [Column("image"), Column("meaning", stage="plan"), Column("layout", stage="plan"), Column("match")]


def test_stagewise_product():
    """GoT-R1: R = image * (meaning + layout) * match. One dead stage silences it; a sum would rank it first."""
    rows = [[0.9, 1.0, 1.0, 0.0], [0.5] * 4, [1.0] * 4]
    aggregate = StagewiseProduct()(table(rows, ["g"] * 3, STAGES))
    assert aggregate.reward == pytest.approx([0.0, 0.25, 2.0])
    assert WeightedSum()(table(rows, ["g"] * 3, STAGES)).reward == pytest.approx([2.9, 2.0, 4.0])
    assert aggregate.parts["stage/plan"].tolist() == [2.0, 1.0, 2.0]


def test_a_stage_pays_only_while_the_others_are_above_zero():
    def slope(image, meaning, layout):
        low, high = StagewiseProduct()(
            table([[image, meaning, layout, 0.4], [image, meaning, layout, 0.5]], ["g"] * 2, STAGES)
        ).reward
        return (high - low) / 0.1

    assert slope(0.9, 0.5, 0.25) == pytest.approx(0.9 * 0.75)
    assert slope(0.0, 1.0, 1.0) == slope(1.0, 0.0, 0.0) == 0.0


def test_a_floor_lets_a_dead_stage_learn():
    rows = [[0.9, 1.0, 1.0, 0.0], [0.5, 1.0, 1.0, 0.0]]
    assert StagewiseProduct()(table(rows, ["g"] * 2, STAGES)).reward.tolist() == [0.0, 0.0]
    better, worse = StagewiseProduct(floor=0.01)(table(rows, ["g"] * 2, STAGES)).reward
    assert better == pytest.approx(0.91 * 2.01 * 0.01)
    assert better > worse > 0


# ---- laws --------------------------------------------------------------------------------------


@given(tables(), st.randoms(use_true_random=False))
def test_the_order_of_dimensions_does_not_matter(scores, order):
    places = list(range(len(scores.columns)))
    order.shuffle(places)
    for name, aggregator in ALL.items():
        for before, after in zip(outcome(aggregator, scores), outcome(aggregator, scores.select(places)), strict=True):
            assert after == pytest.approx(before, abs=1e-12, nan_ok=True), name


@given(tables(), st.randoms(use_true_random=False))
def test_the_order_of_episodes_and_the_names_of_groups_do_not_matter(scores, order):
    places = list(range(len(scores.values)))
    order.shuffle(places)
    names = [f"another {group}" for group in scores.groups[places].tolist()]
    mixed = dataclasses.replace(scores, values=scores.values[places], groups=codes(names))
    for name, aggregator in ALL.items():
        before, after = outcome(aggregator, scores), outcome(aggregator, mixed)
        for one, other in zip(before, after, strict=True):
            assert other == pytest.approx(one[places], abs=1e-12, nan_ok=True), name
        for estimator in ESTIMATORS:
            expected = advantages(before[1], scores.groups, estimator).values[places]
            assert advantages(after[1], mixed.groups, estimator).values == pytest.approx(expected, abs=1e-9), name


@given(tables(missing=False), st.data())
def test_a_better_score_never_lowers_the_reward(scores, data):
    row = data.draw(st.integers(0, len(scores.values) - 1))
    place = data.draw(st.integers(0, len(scores.columns) - 1))
    better = scores.values.copy()
    better[row, place] = data.draw(st.floats(better[row, place], 1))
    for name, aggregator in ALL.items():
        before = outcome(aggregator, scores)
        after = outcome(aggregator, dataclasses.replace(scores, values=better))
        for one, other in zip(before, after, strict=True):
            assert other[row] >= one[row] - 1e-9, name


def rescaled(aggregator, scores, place, factor):
    """The outcome with one dimension in another unit, frozen statistics included."""
    values = scores.values.copy()
    values[:, place] *= factor
    made = list(scores.columns)
    made[place] = dataclasses.replace(made[place], high=made[place].high * factor)
    if isinstance(aggregator, MinMaxMean):
        low, high = aggregator.statistics[made[place].name]
        aggregator = MinMaxMean(aggregator.statistics | {made[place].name: (low * factor, high * factor)})
    return outcome(aggregator, dataclasses.replace(scores, values=values, columns=tuple(made)))[1]


@given(tables(missing=False, bonus=False), st.data(), st.sampled_from([3.0, 100.0]))
def test_scale_free_ones_do_not_see_units(scores, data, factor):
    place = data.draw(st.integers(0, len(scores.columns) - 1))
    spread = group_std(scores.values[:, place], scores.groups)
    assume(all(s == 0 or s > 0.05 for s in spread))  # beside the 1e-4 under a standard deviation
    for name, aggregator in ALL.items():
        if aggregator.scale_free:
            before = outcome(aggregator, scores)[1]
            assert rescaled(aggregator, scores, place, factor) == pytest.approx(before, abs=2e-2), name


@every
def test_the_others_do_see_units(aggregator):
    """Which of two episodes is better turns when one objective is counted in tenths."""
    made = [Column("a", stage="one"), Column("b", stage="one")]
    scores = table([[0.9, 0.0], [0.0, 0.6]], ["g"] * 2, made)
    before, after = outcome(aggregator, scores)[1], rescaled(aggregator, scores, 1, 10.0)
    if not aggregator.scale_free:
        assert before[0] > before[1]
        assert after[0] < after[1]


@every
def test_whoever_multiplies_refuses_what_breaks_it(aggregator):
    assert isinstance(aggregator, Aggregator)
    negative = [Column("gate", Role.GATE), Column("a", low=-1.0)]
    reverse = [Column("gate", Role.GATE), Column("a", weight=-1.0)]
    for made in (negative, reverse):
        assert bool(check_columns(aggregator, made)) == aggregator.needs_positive
    assert not check_columns(aggregator, [Column("a", low=-1.0, weight=0.0), Column("b", Role.SHAPING, low=-1.0)])
    open_gate = [Column("gate", Role.GATE, high=math.inf)]
    assert "a gate without a range" in str(check_columns(aggregator, open_gate)[0])
    if not aggregator.needs_positive:
        # it means it: with a negative score, failing the gate still does not pay
        known = MinMaxMean(STATISTICS | {"a": (-1.0, 1.0)}) if isinstance(aggregator, MinMaxMean) else aggregator
        low, high = outcome(known, table([[0.0, -1.0], [1.0, -1.0]], ["g"] * 2, negative))[1]
        assert low < high


def test_why_a_product_needs_positive_scores():
    made = [Column("gate", Role.GATE), Column("a", low=-1.0)]
    failed, passed = Gated(gate="product")(table([[0.0, -1.0], [1.0, -1.0]], ["g"] * 2, made)).reward
    assert failed > passed


@every
def test_nobody_to_score(aggregator):
    empty = ScoreTable(np.zeros((0, 4)), tuple(columns()), codes([]))
    rewards, signal = outcome(aggregator, empty)
    assert rewards.shape == signal.shape == (0,)


@every
def test_the_table_is_left_as_it_was(aggregator):
    scores = CASES["objectives of different episodes"].scores("group_mean")
    before = scores.values.copy()
    aggregator(scores)
    assert np.array_equal(scores.values, before, equal_nan=True)


def test_names_and_options_of_a_recipe():
    assert set(AGGREGATORS) <= {*ALL, "gated"}
    assert build_aggregator(AggregateSection(name="gated", gate="veto")) == Gated(gate="veto")
    with pytest.raises(RecipeError, match="gated"):
        build_aggregator(AggregateSection(name="gate"))
    with pytest.raises(RecipeError, match="delta"):
        build_aggregator(AggregateSection(name="gated", delta=-1.0))


# ---- statistics of groups ----------------------------------------------------------------------


@given(tables())
def test_means_and_spreads_of_groups(scores):
    means, stds = group_mean(scores.values, scores.groups), group_std(scores.values, scores.groups)
    for group, k in itertools.product(range(scores.groups.max() + 1), range(len(scores.columns))):
        own = scores.values[scores.groups == group, k]
        own = own[np.isfinite(own)]
        assert means[group, k] == pytest.approx(own.mean() if own.size else math.nan, nan_ok=True)
        assert stds[group, k] == pytest.approx(own.std(ddof=1) if own.size > 1 else 0.0, abs=1e-12)


def test_a_tiny_spread_keeps_its_size_above_a_floor():
    rewards, groups = np.array([0.50, 0.51]), codes(["g", "g"])
    assert advantages(rewards, groups).values == pytest.approx([-0.7, 0.7], abs=0.02)
    floored = advantages(rewards, groups, floor=0.1)
    assert floored.values == pytest.approx([-0.05, 0.05], abs=1e-3)
    assert floored.states == [GroupState.SIGNAL]


@given(st.integers(1, 7), st.sampled_from([8]))
def test_a_rare_success_is_inflated_by_std_and_not_by_the_mean_alone(successes, size):
    """One of eight: 2.4749 standardized against .9354 for four of eight; .875 against .5 centred (HARMO)."""
    rewards = np.array([1.0] * successes + [0.0] * (size - successes))
    groups = np.zeros(size, dtype=np.int64)
    p = successes / size
    exact = (1 - p) / (math.sqrt(p * (1 - p) * size / (size - 1)) + 1e-4)
    assert advantages(rewards, groups).values[0] == pytest.approx(exact)
    assert advantages(rewards, groups, "centered").values[0] == pytest.approx(1 - p)
    known = {1: (2.4749, 0.875), 4: (0.9354, 0.5)}
    if successes in known:
        assert (exact, 1 - p) == pytest.approx(known[successes], abs=1e-3)


def test_missing_statistics_are_found_before_the_run():
    errors = check_columns(MinMaxMean({"a": (0.0, 1.0)}), [Column("a"), Column("b"), Column("c", weight=0.0)])
    assert ["of b" in str(error) and "of b, c" not in str(error) for error in errors] == [True]

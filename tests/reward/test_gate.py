"""The gate: the published formula to the digit, how soft it is, when it still cannot be bought, and that it learns."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfactory.errors import RecipeError
from memfactory.reward.advantage import advantages
from memfactory.reward.aggregate import Gated, WeightedSum, gate_factor, max_safe_delta
from memfactory.reward.dimension import Role
from memfactory.reward.table import Column, ScoreTable

MODES = ("geometric", "product", "min", "veto")


def table(gates, utilities, groups=None, gate_weight=1.0, utility_weight=1.0):
    """N episodes with m gates each, (N, m), and one objective, (N,)."""
    gates, utilities = np.asarray(gates, dtype=float), np.asarray(utilities, dtype=float)
    columns = [Column(f"g{k}", Role.GATE, gate_weight) for k in range(gates.shape[1])]
    columns.append(Column("utility", Role.OBJECTIVE, utility_weight))
    return ScoreTable.from_rows(np.column_stack([gates, utilities]), columns, groups or ["g"] * len(gates))


def factor(scores, mode="geometric", delta=0.01):
    scores = np.atleast_2d(np.asarray(scores, dtype=float))
    return gate_factor(scores, np.full(scores.shape[1], 0.5), mode, delta)


def compare(reward):
    return advantages(reward, np.zeros(len(reward), dtype=np.int64)).values


# ---- the formula -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gates", [1, 3, 9])
def test_all_gates_at_one_leave_the_utility_as_it_is(mode, gates):
    assert factor(np.ones(gates), mode).tolist() == [1.0]
    assert Gated(gate=mode)(table(np.ones((1, gates)), [0.7])).reward.tolist() == [0.7]


@pytest.mark.parametrize(("gates", "left"), [(1, 0.009901), (3, 0.214730), (9, 0.598822)])
def test_one_failed_gate_of_m(gates, left):
    scores = np.ones(gates)
    scores[0] = 0.0
    assert factor(scores)[0] == pytest.approx(left, abs=5e-7)
    assert [factor(scores, mode)[0] for mode in ("product", "min", "veto")] == [0.0, 0.0, 0.0]


def test_no_gate_at_all_is_open():
    for mode in MODES:
        assert gate_factor(np.zeros((3, 0)), np.zeros(0), mode).tolist() == [1.0, 1.0, 1.0]


scores_of_gates = st.lists(st.floats(0, 1), min_size=1, max_size=9)


@given(scores_of_gates, st.randoms(use_true_random=False))
def test_the_order_of_gates_does_not_matter(scores, order):
    mixed = list(scores)
    order.shuffle(mixed)
    for mode in MODES:
        assert factor(mixed, mode)[0] == pytest.approx(factor(scores, mode)[0], rel=1e-12, abs=1e-300)


@given(scores_of_gates, st.data())
def test_a_better_gate_never_lowers_it_and_it_stays_in_0_1(scores, data):
    place = data.draw(st.integers(0, len(scores) - 1))
    better = list(scores)
    better[place] = data.draw(st.floats(scores[place], 1))
    for mode in MODES:
        low, high = factor(scores, mode)[0], factor(better, mode)[0]
        assert 0 <= low <= high * (1 + 1e-12) <= 1 + 1e-9
    if better[place] > scores[place] + 1e-6:
        assert factor(better)[0] > factor(scores)[0]  # the paper's gate always tells which is better


@given(st.lists(st.floats(0.001, 0.999), min_size=1, max_size=9), st.data(), st.sampled_from([0.01, 0.1, 0.001]))
def test_the_derivative_of_its_logarithm(scores, data, delta):
    """d ln B / d s_i = 1 / (m (s_i + delta)): 1 / (m delta) at most, unbounded without smoothing."""
    place, step = data.draw(st.integers(0, len(scores) - 1)), 1e-5 * delta
    up, down = list(scores), list(scores)
    up[place] += step
    down[place] -= step
    slope = (math.log(factor(up, delta=delta)[0]) - math.log(factor(down, delta=delta)[0])) / (2 * step)
    assert slope == pytest.approx(1 / (len(scores) * (scores[place] + delta)), rel=1e-4)


@pytest.mark.parametrize(("gates", "bound"), [(1, 100.0), (3, 33.3), (9, 11.1)])
def test_the_steepest_slope(gates, bound):
    assert 1 / (gates * 0.01) == pytest.approx(bound, abs=0.05)
    at_zero = [math.log(factor([s] + [1.0] * (gates - 1))[0]) for s in (0.0, 1e-7)]
    assert (at_zero[1] - at_zero[0]) / 1e-7 == pytest.approx(bound, rel=2e-3)


def test_smoothing_must_be_above_zero():
    for delta in (0.0, -0.01):
        with pytest.raises(RecipeError, match="delta"):
            Gated(delta=delta)


def test_a_gate_is_scaled_from_its_own_range():
    """A gate in [-1, 1] at 0 is half open, and its threshold is a share of the range."""
    columns = [Column("gate", Role.GATE, low=-1.0, high=1.0, threshold=0.5), Column("utility")]
    rows = [[-1.0, 1.0], [-0.01, 1.0], [0.0, 1.0], [1.0, 1.0]]
    scores = ScoreTable.from_rows(rows, columns, ["g"] * 4)
    assert Gated(gate="product")(scores).reward == pytest.approx([0.0, 0.495, 0.5, 1.0])
    assert Gated(gate="veto")(scores).reward.tolist() == [0.0, 0.0, 1.0, 1.0]


# ---- how soft it is ----------------------------------------------------------------------------


def test_the_inversion_and_the_veto():
    """One violator of 1 of 9 gates with utility 1 among seven that comply with utility .5."""
    gates, utilities = np.ones((8, 9)), np.full(8, 0.5)
    gates[0, 4], utilities[0] = 0.0, 1.0
    scores = table(gates, utilities)
    soft, hard = Gated(gate="geometric")(scores).reward, Gated(gate="veto")(scores).reward
    assert soft.tolist() == pytest.approx([0.5988] + [0.5] * 7, abs=5e-5)
    assert soft[0] > soft[1]
    assert hard.tolist() == [0.0] + [0.5] * 7
    assert compare(soft)[0] == pytest.approx(2.47, abs=5e-3)
    assert compare(hard)[0] == pytest.approx(-2.47, abs=5e-3)


@pytest.mark.parametrize(("gates", "delta"), [(1, 1.0), (3, 1 / 7), (9, 0.00196)])
def test_the_largest_safe_smoothing(gates, delta):
    assert max_safe_delta(gates) == pytest.approx(delta, rel=2e-3)
    assert max_safe_delta(0) == math.inf


@given(st.integers(1, 12), st.floats(0.05, 0.95), st.floats(0.05, 1.0), st.floats(0, 1))
def test_below_the_bound_a_violation_never_pays_and_above_it_does(gates, rho, most, share):
    """A violator of one gate with U <= most against a compliant one with U >= rho * most."""
    bound = max_safe_delta(gates, rho)
    broken = np.ones((2, gates))
    broken[0, -1] = 0.0
    below = Gated(delta=bound * 0.999)(table(broken, [most * share, rho * most])).reward
    assert below[0] < below[1]
    above = Gated(delta=bound * 1.001)(table(broken, [most, rho * most])).reward
    assert above[0] > above[1]


@pytest.mark.parametrize(("gates", "largest"), [(9, 1.43), (1, 1.36)])
def test_a_group_that_fails_alike_pushes_utility_unless_vetoed(gates, largest):
    """Eight episodes that all break the same gate, utility .2 to .8: only the veto says there is nothing to learn."""
    broken = np.ones((8, gates))
    broken[:, 0] = 0.0
    scores = table(broken, np.linspace(0.2, 0.8, 8))
    soft = compare(Gated(gate="geometric")(scores).reward)
    assert np.abs(soft).max() == pytest.approx(largest, abs=5e-3)
    assert compare(Gated(gate="veto")(scores).reward).tolist() == [0.0] * 8


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6), st.floats(0, 1))
def test_veto_is_blind_above_the_threshold_and_product_is_not(scores, utility):
    passed = all(score >= 0.5 for score in scores)
    assert factor(scores, "veto")[0] == float(passed)
    assert factor(scores, "product")[0] == pytest.approx(math.prod(scores))
    assert factor(scores, "min")[0] == min(scores)


def test_a_bonus_is_gated_like_an_objective():
    columns = [Column("gate", Role.GATE), Column("utility"), Column("bonus", Role.BONUS, 0.1)]
    scores = ScoreTable.from_rows([[1, 0.5, 1], [0, 0.5, 1], [1, 0.5, 0]], columns, ["g"] * 3)
    assert Gated(gate="veto")(scores).reward.tolist() == [0.6, 0.0, 0.5]


def test_objectives_are_a_mean_by_weight():
    columns = [Column("a", weight=3.0), Column("b", weight=1.0)]
    scores = ScoreTable.from_rows([[1, 0], [0, 1], [1, 1]], columns, ["g"] * 3)
    assert Gated()(scores).reward.tolist() == [0.75, 0.25, 1.0]


# ---- it learns ---------------------------------------------------------------------------------

GRID = np.linspace(0, 1, 21)
VALID = np.where(GRID <= 0.6, 1.0, (1 - GRID) / 0.4)  # the gate: holds up to .6, then falls to 0 at 1


def train(aggregator, seed, gate_weight=1.0, utility_weight=1.0, steps=1500):
    """A softmax policy over the grid under GRPO, groups of 8; utility is x itself. Returns the expected gate."""
    draw, logits = np.random.default_rng(seed), np.zeros(len(GRID))
    groups = np.repeat(np.arange(4), 8)
    for _ in range(steps):
        p = np.exp(logits - logits.max())
        p /= p.sum()
        taken = draw.choice(len(GRID), size=32, p=p)
        scores = table(VALID[taken, None], GRID[taken], list(groups), gate_weight, utility_weight)
        credit = advantages(aggregator(scores).reward, groups).values
        gradient = np.bincount(taken, credit, len(GRID)) - credit.sum() * p
        logits += 0.5 * gradient / 32
    p = np.exp(logits - logits.max())
    return float((p / p.sum()) @ VALID)


@pytest.mark.parametrize("seed", range(3))
def test_seesaw_the_gate_holds_where_a_weighted_sum_sells_it(seed):
    """.2 gate + .8 utility is largest at x = 1, where the gate is 0; gate times utility at x = .6, where it is 1."""
    assert GRID[np.argmax(0.2 * VALID + 0.8 * GRID)] == 1.0
    assert GRID[np.argmax(factor(VALID[:, None]) * GRID)] == pytest.approx(0.6)
    assert train(Gated(), seed) > 0.95
    assert train(WeightedSum(), seed, gate_weight=0.2, utility_weight=0.8) < 0.2


def test_a_veto_fails_on_none_also_at_a_threshold_of_zero():
    columns = [Column("gate", Role.GATE, threshold=0.0), Column("objective")]
    table = ScoreTable.from_rows([[None, 1.0], [0.0, 1.0]], columns, ["a", "a"])
    assert Gated(gate="veto")(table).reward.tolist() == [0.0, 1.0]

"""What logs say about dimensions, against definitions written out pair by pair."""

from __future__ import annotations

import itertools
import math
import warnings
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfactory.reward.dimension import Role
from memfactory.reward.statistics import MAX_PAIRS, correlations, disagreements, ranks, summarise, tracked
from memfactory.reward.table import Column

N = math.nan
score = st.one_of(st.just(math.nan), st.integers(-8, 8).map(lambda x: x / 4))
grids = st.tuples(st.integers(1, 12), st.integers(1, 4)).flatmap(
    lambda shape: st.lists(
        st.lists(score, min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0]
    ).map(lambda rows: np.array(rows, dtype=float))
)


# ---- correlations ------------------------------------------------------------------------------


def pairwise(x, y):
    """Pearson over the episodes that have both; NaN where one of them does not vary over those."""
    both = [(a, b) for a, b in zip(x, y, strict=True) if not (math.isnan(a) or math.isnan(b))]
    if len(both) < 2:
        return math.nan
    x, y = np.array(both).T
    dx, dy = x - x.mean(), y - y.mean()
    if not (dx.any() and dy.any()):
        return math.nan
    return float((dx @ dy) / math.sqrt((dx @ dx) * (dy @ dy)))


@given(grids)
def test_correlations_are_over_the_episodes_that_have_both(values):
    result = correlations(values)
    for i, j in itertools.product(range(values.shape[1]), repeat=2):
        expected = pairwise(values[:, i], values[:, j])
        assert result[i, j] == pytest.approx(expected, abs=1e-9, nan_ok=True)


@given(grids, st.integers(-3, 3), st.floats(0.1, 100))
def test_correlations_do_not_see_units(values, offset, factor):
    moved = values.copy()
    moved[:, 0] = moved[:, 0] * factor + offset
    assert correlations(moved) == pytest.approx(correlations(values), abs=1e-6, nan_ok=True)


def test_a_dimension_that_is_constant_where_both_are_known_has_no_correlation_there():
    values = np.array([[1.25 * 14.1, N], [0.0, 0.0], [0.0, 0.0], [0.0, 0.25]])
    assert np.isnan(correlations(values)[0, 1])


def test_correlations_are_numpys_where_nothing_is_missing():
    values = np.random.default_rng(0).normal(size=(50, 3))
    assert correlations(values) == pytest.approx(np.corrcoef(values.T), abs=1e-12)


def test_a_missing_score_does_not_shift_the_others():
    """b is a plus 10 wherever both are known; the first a, far off, has no b."""
    values = np.array([[100.0, N], [1.0, 11.0], [2.0, 12.0], [3.0, 13.0]])
    assert correlations(values)[0, 1] == pytest.approx(1.0)


def test_a_constant_has_no_correlation_even_where_rounding_makes_it_move():
    values = np.array([[0.1 + 0.2, 1.0], [0.3, 2.0], [0.3, 3.0]])
    result = correlations(values)
    assert np.isnan(result[0]).all()
    assert np.isnan(result[:, 0]).all()
    assert result[1, 1] == 1.0


def test_a_large_offset_does_not_drown_a_small_spread():
    values = np.array([[1e6 + 0.1, 1.0], [1e6 + 0.2, 2.0], [1e6 + 0.3, 3.0]])
    assert correlations(values)[0, 1] == pytest.approx(1.0)


@pytest.mark.parametrize("shape", [(0, 0), (0, 2), (3, 0), (1, 2)])
def test_nothing_to_correlate(shape):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(correlations(np.zeros(shape))).all()


# ---- disagreements -----------------------------------------------------------------------------


@given(grids)
def test_a_rank_is_the_share_of_others_beaten(values):
    result = ranks(values)
    for k in range(values.shape[1]):
        column = values[:, k]
        known = [x for x in column if not math.isnan(x)]
        for i, x in enumerate(column):
            if math.isnan(x):
                assert math.isnan(result[i, k])
                continue
            beaten = sum(y < x for y in known) + (sum(y == x for y in known) - 1) / 2
            assert result[i, k] == pytest.approx(beaten / max(len(known) - 1, 1))


def test_the_widest_apart_come_first():
    columns = [Column("format", Role.GATE), Column("answer"), Column("flat"), Column("phi", Role.SHAPING)]
    values = np.array(
        [
            [1.0, 0.0, 0.5, 0.0],  # right in form, worst of all
            [0.5, 0.5, 0.5, 9.0],  # middling on both
            [0.0, 1.0, 0.5, 0.0],  # the best answer, in the worst form
            [0.75, 0.25, 0.5, 0.0],
            [0.25, N, 0.5, 0.0],  # on one dimension alone nothing disagrees
        ]
    )
    found = disagreements(values, columns, ["a", "b", "c", "d", "e"])
    assert [f["episode"] for f in found] == ["a", "c", "d", "b"]
    assert found[0] == {
        "episode": "a",
        "gap": 1.0,
        "high": {"name": "format", "value": 1.0},
        "low": {"name": "answer", "value": 0.0},
    }
    assert found[1]["high"]["name"] == "answer"
    gaps = [f["gap"] for f in found]
    assert gaps == sorted(gaps, reverse=True)


@given(grids)
def test_disagreements_are_what_they_say(values):
    columns = [Column(f"d{k}") for k in range(values.shape[1])]
    ids = [f"e{i}" for i in range(len(values))]
    varying = [k for k in range(values.shape[1]) if len({x for x in values[:, k] if not math.isnan(x)}) > 1]
    found = disagreements(values, columns, ids)
    assert len(found) <= 5
    placed = ranks(values)
    gaps = []
    for row in placed[:, varying]:
        own = row[np.isfinite(row)]
        gaps.append(own.max() - own.min() if own.size else 0.0)
    assert [f["gap"] for f in found] == pytest.approx(sorted((g for g in gaps if g > 0), reverse=True)[:5])
    for f in found:
        row = ids.index(f["episode"])
        for side in ("high", "low"):
            assert f[side]["value"] == values[row, int(f[side]["name"][1:])]


def test_a_tie_is_no_disagreement():
    values = np.array([[1.0, 1.0], [0.0, 0.0]])
    assert disagreements(values, [Column("a"), Column("b")], ["x", "y"]) == []
    assert disagreements(values[:, :1], [Column("a")], ["x", "y"]) == []
    assert disagreements(np.zeros((0, 2)), [Column("a"), Column("b")], []) == []


# ---- one dimension -----------------------------------------------------------------------------


def test_summary():
    values = np.array([1.0, 0.0, N, 0.5])
    summary = summarise(Column("a", weight=2.0), values, Counter({"judge timed out": 1}))
    assert summary == {
        "role": "objective",
        "weight": 2.0,
        "mean": 0.5,
        "std": 0.5,
        "none_share": 0.25,
        "reasons": {"judge timed out": 1},
    }


def test_a_gate_that_could_not_be_measured_did_not_pass():
    gate = Column("gate", Role.GATE, threshold=0.5)
    assert summarise(gate, np.array([1.0, 0.5, 0.49, N]), Counter())["pass_rate"] == 0.5
    assert summarise(gate, np.array([N, N]), Counter())["pass_rate"] == 0.0
    scaled = Column("gate", Role.GATE, low=-1.0, high=1.0, threshold=0.75)
    assert summarise(scaled, np.array([0.5, 0.4]), Counter())["pass_rate"] == 0.5
    assert "pass_rate" not in summarise(Column("a"), np.array([1.0]), Counter())


def test_nothing_measured_and_one_measured():
    nothing = summarise(Column("a"), np.array([N, N]), Counter())
    assert (nothing["mean"], nothing["std"], nothing["none_share"]) == (None, 0.0, 1.0)
    one = summarise(Column("a"), np.array([0.3]), Counter())
    assert (one["mean"], one["std"], one["none_share"]) == (0.3, 0.0, 0.0)
    none_at_all = summarise(Column("a", Role.GATE), np.array([]), Counter())
    assert (none_at_all["none_share"], none_at_all["pass_rate"]) == (0.0, None)


def test_only_the_usual_reasons_are_kept():
    many = Counter({f"reason {i}": i + 1 for i in range(9)})
    assert list(summarise(Column("a"), np.array([N]), many)["reasons"]) == [f"reason {i}" for i in (8, 7, 6, 5, 4)]


def test_numbers_for_the_tracker():
    values = np.array([[1.0, 0.0], [0.0, 1.0]])
    columns = [Column("gate", Role.GATE), Column("a")]
    summaries = {c.name: summarise(c, values[:, k], Counter()) for k, c in enumerate(columns)}
    metrics = tracked(summaries, correlations(values))
    assert metrics["rewards/gate/pass_rate"] == 0.5
    assert metrics["rewards/a/mean"] == 0.5
    assert metrics["rewards/a/none_share"] == 0.0
    assert metrics["rewards/correlation/gate~a"] == -1.0
    assert all(isinstance(value, float) for value in metrics.values())


def test_many_dimensions_do_not_flood_the_tracker():
    values = np.random.default_rng(0).normal(size=(5, 11))
    summaries = {f"d{k}": summarise(Column(f"d{k}"), values[:, k], Counter()) for k in range(11)}
    assert math.comb(11, 2) > MAX_PAIRS
    assert not [name for name in tracked(summaries, correlations(values)) if "correlation" in name]

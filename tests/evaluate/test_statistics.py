"""Intervals hold what they promise; pass@k and avg@k are unbiased, by counting every outcome."""

from __future__ import annotations

import math
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfactory.evaluate.statistics import Interval, best_of, interval, kappa, levels, paired_difference, wilson

scores = st.lists(st.floats(0, 1, allow_nan=False), min_size=1, max_size=8)


@given(scores, st.data())
def test_best_of_is_the_mean_over_all_subsets(values: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    subsets = [max(subset) for subset in combinations(values, k)]
    assert best_of(values, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_unbiased_by_enumeration(k: int) -> None:
    """Over every outcome of five independent samples the estimate's mean is 1 - (1 - p)^k."""
    p = 0.3
    expected = sum(
        best_of(outcome, k) * math.prod(p if right else 1 - p for right in outcome)
        for outcome in product([0.0, 1.0], repeat=5)
    )
    assert expected == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


def test_pass_at_k_by_hand() -> None:
    # Chen et al. (arXiv 2107.03374), eq. 1: n = 4, c = 2, k = 2: 1 - C(2,2)/C(4,2) = 5/6
    assert best_of([1, 0, 1, 0], 2) == pytest.approx(5 / 6)
    assert best_of([0.2, 0.6], 1) == pytest.approx(0.4)
    assert levels(1) == [1]
    assert levels(6) == [1, 2, 4, 6]
    with pytest.raises(ValueError, match="pass@3 of 2 samples"):
        best_of([0, 1], 3)


@pytest.mark.parametrize(("name", "mean"), [("rare", 0.15), ("graded", 0.6), ("clusters", 0.4), ("difference", 0.1)])
def test_intervals_cover_the_truth_at_the_nominal_rate(name: str, mean: float) -> None:
    """95 % intervals over 100 tasks: of 300 evaluations, 95 % +- three standard errors hold the true mean."""
    random = np.random.default_rng(5)
    covered = 0
    for _ in range(300):
        if name == "graded":
            values, bounds = random.beta(3, 2, 100), (0.0, 1.0)
        elif name == "clusters":  # four samples of each task: tasks differ, so samples of one go together
            values, bounds = random.binomial(4, random.beta(2, 3, 100)) / 4, (0.0, 1.0)
        elif name == "difference":
            values, bounds = random.binomial(1, 0.6, 100) - random.binomial(1, 0.5, 100), None
        else:
            values, bounds = random.binomial(1, mean, 100).astype(float), (0.0, 1.0)
        found = interval(list(values), bounds)
        assert found is not None
        covered += found.low <= mean <= found.high
    assert 0.95 - 3 * math.sqrt(0.95 * 0.05 / 300) <= covered / 300 <= 0.99


def test_all_right_is_not_certain() -> None:
    found = interval([1.0] * 20)
    assert found is not None
    assert (found.mean, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(0.8389, abs=1e-4)  # Wilson's, as scipy's binomtest gives it
    from scipy.stats import binomtest

    for right, n in ((0, 7), (3, 10), (20, 20)):
        theirs = binomtest(right, n).proportion_ci(method="wilson")
        assert wilson(right, n) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    assert interval([]) is None
    # alike, and not at an end: up to 1 - .05^(1/9) = .2831 of all tasks may be anywhere in [0, 1]
    same = interval([0.25] * 9)
    assert same is not None
    assert (same.low, same.high) == pytest.approx((0.25 * (1 - 0.2831), 0.25 + 0.75 * 0.2831), abs=1e-4)
    one = interval([1.0])
    assert one is not None
    assert (one.mean, one.low, one.high) == (1.0, None, None)
    open_ended = interval([3.0, 3.0], None)
    assert open_ended is not None
    assert (open_ended.mean, open_ended.low, open_ended.high) == (3.0, None, None)


def difference_of(better: int, worse: int, same: int, bounds: tuple[float, float] | None = (0.0, 1.0)) -> Interval:
    """Of tasks that one candidate alone solved, the other alone, and both or neither."""
    values = [1.0] * better + [0.0] * worse + [0.5] * same
    base = [0.0] * better + [1.0] * worse + [0.5] * same
    numbered = [{str(n): value for n, value in enumerate(own)} for own in (values, base)]
    found = paired_difference(*numbered, dict.fromkeys(numbered[0], 1), bounds)
    assert found is not None
    return found


def test_ten_differences_alike_are_not_certain() -> None:
    """Clopper and Pearson's one-sided 95 % bound for 0 of 10 is .2589."""
    from scipy.stats import binomtest

    for n in (2, 10, 30):
        others = binomtest(0, n).proportion_ci(0.9, method="exact").high  # two sides of 5 % each
        better, none = difference_of(n, 0, 0), difference_of(0, 0, n)
        assert (better.mean, better.low, better.high) == pytest.approx((1.0, 1 - 2 * others, 1.0))
        assert (none.mean, none.low, none.high) == pytest.approx((0.0, -others, others))
    unbounded = difference_of(4, 0, 0, None)
    assert (unbounded.mean, unbounded.low, unbounded.high) == (1.0, None, None)
    single = difference_of(1, 0, 0)
    assert (single.mean, single.low, single.high) == (1.0, None, None)
    # one of ten tasks asks as many questions as the nine others: they say as much as 18^2 / (81 + 9) = 3.6 equal ones
    alike = paired_difference(
        dict.fromkeys("abcdefghij", 0.6), dict.fromkeys("abcdefghij", 0.5), {"a": 9} | dict.fromkeys("bcdefghij", 1)
    )
    assert alike is not None
    assert alike.high == pytest.approx(0.1 + 0.9 * (1 - 0.05 ** (1 / 3.6)), abs=1e-9)


@pytest.mark.parametrize("n", [10, 30])
def test_differences_cover_the_truth_also_when_they_are_rare_and_tasks_few(n: int) -> None:
    """Every outcome with its probability, not a sample of them: scores of 0 and 1, some tasks better, some worse."""
    most = n if n < 20 else 14  # more tasks that differ than that have probability below 2e-3 in the cases here
    spans = {
        (up, down): (found.low, found.high)
        for up in range(most + 1)
        for down in range(most + 1 - up)
        if (found := difference_of(up, down, n - up - down)).low is not None
    }
    rare = [(0.0, 0.0), (0.01, 0.0), (0.02, 0.02), (0.05, 0.0), (0.05, 0.05), (0.1, 0.0), (0.1, 0.05), (0.1, 0.1)]
    more = [(0.3, 0.1), (0.2, 0.2), (0.5, 0.0), (0.7, 0.0), (0.9, 0.0), (0.0, 1.0)] if most == n else []
    for up, down in rare + more:
        covered = total = 0.0
        for (better, worse), (low, high) in spans.items():
            same = n - better - worse
            ways = math.comb(n, better) * math.comb(n - better, worse)
            chance = ways * up**better * down**worse * max(0.0, 1 - up - down) ** same
            total += chance
            covered += chance * (low - 1e-9 <= up - down <= high + 1e-9)
        assert total > 0.998
        assert covered / total >= 0.945, (up, down)


def test_weights_are_questions() -> None:
    found = interval([1.0, 0.0, 0.5], weights=[3, 1, 2])
    assert found is not None
    assert found.mean == pytest.approx((3 + 0 + 1) / 6)
    assert found.low < found.mean < found.high


def test_pairing_takes_out_how_hard_tasks_are() -> None:
    random = np.random.default_rng(1)
    hard = random.uniform(0, 0.8, 60)
    base = {str(n): value for n, value in enumerate(hard)}
    better = {task: value + 0.1 + random.normal(0, 0.01) for task, value in base.items()} | {"new": 1.0}
    ones = dict.fromkeys(better, 1)
    paired = paired_difference(better, base, ones)
    alone = interval(list(better.values()), None)
    assert paired is not None
    assert alone is not None
    assert paired.mean == pytest.approx(0.1, abs=0.01)  # the task that only one has is left out
    assert paired.high - paired.low < (alone.high - alone.low) / 10
    assert paired_difference({"a": 1.0}, {"b": 1.0}, {"a": 1}) is None


def test_agreement_beyond_chance() -> None:
    assert kappa([True, False, True, False], [True, False, True, False]) == 1.0
    assert kappa([True, True, False, False], [True, False, True, False]) == 0.0
    assert kappa([True, True], [True, False]) is None

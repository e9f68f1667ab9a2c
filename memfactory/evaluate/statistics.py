"""What an evaluation may conclude from a sample of tasks: means, intervals, differences, pass@k.

The unit is the task. Several samples of one task are not independent of each other, so they are averaged first, and
tasks are what is resampled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 1999
_Z = 1.959963984540054
"""The normal distribution's 97.5 % point."""
_ALIKE = 1e-12
"""Values that differ by less are the same, and were rounded."""
_BATCH = 2**24
"""Numbers drawn at a time while resampling: bounds memory (128 MB), not results."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with the interval that holds the true one in 95 of 100 evaluations."""

    mean: float
    low: float | None
    """None, as `high`, where one task or values without bounds leave it open."""
    high: float | None


def interval(
    values: Sequence[float], bounds: tuple[float, float] | None = (0.0, 1.0), weights: Sequence[float] | None = None
) -> Interval | None:
    """The mean of `values` and its 95 % bootstrap interval (BCa; Efron 1987). None without values.

    Where all values are the same, resampling says that nothing could be otherwise. Then, if they stand at an end of
    `bounds`, the interval is Wilson's for that many tasks all right or all wrong (Wilson 1927), scaled to `bounds`;
    elsewhere it is that of :func:`alike`. One value has no interval.

    Args:
        values: one for each task.
        bounds: lowest and highest value a task can have; None where there are none.
        weights: of the tasks in the mean, e.g. how many questions each asks; absent: all the same.
    """
    if not len(values):
        return None
    data = np.asarray(values, dtype=np.float64)  # (N,)
    shares = np.ones(len(data)) if weights is None else np.asarray(weights, dtype=np.float64)  # (N,)
    mean = math.fsum(data * shares) / math.fsum(shares)
    if len(data) == 1:
        return Interval(mean, None, None)
    if np.ptp(data) <= _ALIKE:
        if bounds is None or mean not in bounds:
            return alike(mean, shares, bounds)
        low, high = wilson(len(data) if mean == bounds[1] else 0, len(data))
        width = bounds[1] - bounds[0]
        return Interval(mean, bounds[0] + width * low, bounds[0] + width * high)
    from scipy.stats import bootstrap

    def weighted(data: np.ndarray, shares: np.ndarray, axis: int = -1) -> np.ndarray:
        return (data * shares).sum(axis) / shares.sum(axis)

    found = bootstrap(
        (data, shares),
        weighted,
        paired=True,
        vectorized=True,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        batch=max(1, _BATCH // len(data)),
        method="BCa",
        random_state=np.random.default_rng(0),
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high))


def alike(value: float, weights: Sequence[float] | np.ndarray, bounds: tuple[float, float] | None) -> Interval:
    """The 95 % interval of a mean where every task came to `value`.

    If a share p of all tasks came to something else, n of them would all be alike with probability (1 - p)^n, so
    p <= 1 - .05^(1/n) with 95 % confidence: the one-sided bound of Clopper and Pearson (1934), about 3/n (the rule of
    three; Hanley and Lippman-Hand 1983). Those tasks can be anywhere within `bounds`.

    Args:
        weights: of the tasks in the mean.
        bounds: lowest and highest value a task can have. None: the interval is open.
    """
    shares = np.asarray(weights, dtype=np.float64)  # (N,)
    if bounds is None or len(shares) < 2:
        return Interval(value, None, None)
    others = 1 - (1 - CONFIDENCE) ** (1 / _effective(shares))
    low, high = value - others * (value - bounds[0]), value + others * (bounds[1] - value)
    return Interval(value, min(low, value), max(high, value))


def _effective(weights: np.ndarray) -> float:
    """As how many tasks of equal weight those of `weights` count: (sum w)^2 / sum w^2 (Kish 1965)."""
    return float(weights.sum() ** 2 / (weights**2).sum())


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `right` among `n` (Wilson 1927, eq. 4 without correction)."""
    z = _Z
    p, rest = right / n, z * z / n
    centre, width = p + rest / 2, z * math.sqrt(p * (1 - p) / n + rest / (4 * n))
    return max(0.0, (centre - width) / (1 + rest)), min(1.0, (centre + width) / (1 + rest))


def paired_difference(
    values: Mapping[str, float],
    base: Mapping[str, float],
    weights: Mapping[str, float],
    bounds: tuple[float, float] | None = (0.0, 1.0),
) -> Interval | None:
    """Mean of ``values - base`` over the tasks that both have, with its 95 % bootstrap interval (BCa).

    Pairing takes out how hard the tasks are, which is most of the spread. Where all differences are the same, ten of
    ten as well as none, the interval is that of :func:`alike`; a single difference has none.

    Args:
        values: score of each task.
        base: the other's.
        weights: of the tasks in the mean.
        bounds: lowest and highest score of a task; None where there are none.
    """
    both = [task for task in values if task in base]
    differences, shares = [values[task] - base[task] for task in both], [weights[task] for task in both]
    if both and np.ptp(differences) <= _ALIKE:
        width = bounds[1] - bounds[0] if bounds is not None else math.inf
        return alike(differences[0], shares, (-width, width) if math.isfinite(width) else None)
    found = interval(differences, None, shares)
    if found is None or found.low is None or found.high is None or bounds is None:
        return found
    low, high = _mostly_alike(differences, shares, bounds[1] - bounds[0]) or (found.low, found.high)
    return Interval(found.mean, min(found.low, low), max(found.high, high))


def _mostly_alike(differences: Sequence[float], weights: Sequence[float], width: float) -> tuple[float, float] | None:
    """A 95 % interval where most tasks differ by the same, usually by nothing; None where they do not.

    The few others may all stand on one side by chance, and then no resample has any on the other. So half a task is
    added at either end, and one to the many, which for scores of 0 and 1 is the adjusted interval of Agresti and Min
    (Statistics in Medicine 24, 2005, sec. 3) for matched pairs.

    Args:
        width: of the range of a score, so that a difference lies in [-width, width].
    """
    data, shares = np.asarray(differences), np.asarray(weights, dtype=np.float64)  # (N,)
    values, counts = np.unique(np.round(data, 12), return_counts=True)
    if 2 * counts.max() < len(data) or not math.isfinite(width):
        return None
    data = np.concatenate([data, [width, -width, values[counts.argmax()]]])  # (N + 3,)
    n = _effective(shares) + 2
    shares = np.concatenate([shares / shares.mean(), [0.5, 0.5, 1.0]])  # (N + 3,)
    mean = float((data * shares).sum() / shares.sum())
    spread = float((shares * (data - mean) ** 2).sum() / shares.sum())
    around = _Z * math.sqrt(spread / n)
    return max(-width, mean - around), min(width, mean + around)


def best_of(values: Sequence[float], k: int) -> float:
    """The highest of `k` samples, in expectation; unbiased from ``n >= k`` of them.

    The mean of the maximum over all subsets of size k: sum over i of C(i-1, k-1) / C(n, k) times the i-th smallest.
    For values of 0 and 1 it is pass@k, ``1 - C(n-c, k) / C(n, k)`` (Chen et al., arXiv 2107.03374, eq. 1).

    Raises:
        ValueError: there are fewer than `k`.
    """
    if not 1 <= k <= len(values):
        raise ValueError(f"pass@{k} of {len(values)} samples")
    return math.fsum(weight * value for weight, value in zip(_weights(len(values), k), sorted(values), strict=True))


@cache
def _weights(n: int, k: int) -> tuple[float, ...]:
    return tuple(math.comb(place, k - 1) / math.comb(n, k) for place in range(n))


def levels(samples: int) -> list[int]:
    """The k for which pass@k is told: powers of two up to `samples`, and `samples`."""
    return sorted({1 << power for power in range(samples.bit_length()) if 1 << power <= samples} | {samples})


def kappa(first: Sequence[bool], second: Sequence[bool]) -> float | None:
    """Cohen's kappa: agreement of two graders beyond chance. None where one of them never differs."""
    if not first or len(set(first)) < 2 or len(set(second)) < 2:
        return None
    from sklearn.metrics import cohen_kappa_score

    return float(cohen_kappa_score(list(first), list(second)))

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
_BATCH = 2**24
"""Numbers drawn at a time while resampling: bounds memory (128 MB), not results."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with the interval that holds the true one in 95 of 100 evaluations."""

    mean: float
    low: float
    high: float


def interval(
    values: Sequence[float], bounds: tuple[float, float] | None = (0.0, 1.0), weights: Sequence[float] | None = None
) -> Interval | None:
    """The mean of `values` and its 95 % bootstrap interval (BCa; Efron 1987). None without values.

    Where all values are the same, resampling says that nothing could be otherwise. Then, if they stand at an end of
    `bounds`, the interval is Wilson's for that many tasks all right or all wrong (Wilson 1927), scaled to `bounds`.

    Args:
        values: one for each task.
        bounds: lowest and highest value a task can have; None where there are none, as for a difference.
        weights: of the tasks in the mean, e.g. how many questions each asks; absent: all the same.
    """
    if not len(values):
        return None
    data = np.asarray(values, dtype=np.float64)  # (N,)
    shares = np.ones(len(data)) if weights is None else np.asarray(weights, dtype=np.float64)  # (N,)
    mean = math.fsum(data * shares) / math.fsum(shares)
    if np.ptp(data) == 0:
        if bounds is None or mean not in bounds:
            return Interval(mean, mean, mean)
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


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `right` among `n` (Wilson 1927, eq. 4 without correction)."""
    z = 1.959963984540054
    p, rest = right / n, z * z / n
    centre, width = p + rest / 2, z * math.sqrt(p * (1 - p) / n + rest / (4 * n))
    return max(0.0, (centre - width) / (1 + rest)), min(1.0, (centre + width) / (1 + rest))


def paired_difference(
    values: Mapping[str, float], base: Mapping[str, float], weights: Mapping[str, float]
) -> Interval | None:
    """Mean of ``values - base`` over the tasks that both have, with its 95 % bootstrap interval.

    Pairing takes out how hard the tasks are, which is most of the spread.

    Args:
        values: score of each task.
        base: the other's.
        weights: of the tasks in the mean.
    """
    both = [task for task in values if task in base]
    return interval([values[task] - base[task] for task in both], None, [weights[task] for task in both])


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

"""What the dimensions did in a batch: numbers for logs and trackers, and what a person should look at."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from memfactory.episode import Episode
from memfactory.reward.dimension import Role
from memfactory.reward.table import Column, Floats

MAX_PAIRS = 45
"""Most pairs of dimensions whose correlation goes to the tracker; the run folder has all."""
DISAGREEMENTS = 5
"""Episodes named per batch."""


def summarise(column: Column, values: Floats, reasons: Counter[str]) -> dict[str, Any]:
    """One dimension over a batch.

    Args:
        column: the dimension.
        values: scores over the episodes or, for a dimension of turns, over the turns; NaN where None.
        reasons: why scores are None, with counts.

    Returns:
        mean, std (Bessel-corrected), none_share, for a gate pass_rate (None fails), and the reasons.
    """
    known = values[np.isfinite(values)]  # (number measured,)
    summary: dict[str, Any] = {
        "role": str(column.role),
        "weight": column.weight,
        "mean": float(known.mean()) if known.size else None,
        "std": float(known.std(ddof=1)) if known.size > 1 else 0.0,
        "none_share": 1 - known.size / values.size if values.size else 0.0,
        "reasons": dict(reasons.most_common(5)),
    }
    if column.role is Role.GATE:
        summary["pass_rate"] = float(column.passes(values).mean()) if values.size else None
    return summary


def correlations(values: Floats) -> Floats:
    """Pearson correlation of every pair of dimensions over the episodes that have both. (N, D) -> (D, D)

    NaN where a dimension is constant or no two episodes have both.
    """
    known = np.isfinite(values).astype(np.float64)
    count = known.sum(axis=0)
    mean = np.nan_to_num(values).sum(axis=0) / np.maximum(count, 1)
    centered = np.where(known > 0, values - mean, 0.0)
    # rounding around a constant is no variance
    noise = 1e-12 * np.maximum(1.0, np.abs(mean))[:, None]
    both = np.maximum(known.T @ known, 1)
    sums = centered.T @ known  # [i, j]: of i, over the episodes that have j too; so their mean is sums / both
    covariance = centered.T @ centered - sums * sums.T / both
    squares = (centered**2).T @ known
    variance = squares - sums**2 / both
    # a difference of sums cannot be told from 0 below its own rounding
    variance = np.where(variance > both * noise**2 + 1e-12 * squares, variance, np.nan)
    result: Floats = covariance / np.sqrt(variance * variance.T)
    return np.clip(result, -1.0, 1.0)


def ranks(values: Floats) -> Floats:
    """Share of the other episodes that each one beats on each dimension, ties counting half. (N, D) -> (N, D)

    NaN where a score is missing.
    """
    columns = np.ascontiguousarray(values.T)  # (D, N)
    width, size = columns.shape
    order = np.argsort(columns, axis=1)  # NaN last
    order += size * np.arange(width)[:, None]  # places in the flat array
    ordered = columns.ravel()[order.ravel()]
    first = np.ones(width * size, dtype=bool)  # whether a new value begins here
    first[1:] = ordered[1:] != ordered[:-1]
    first[::size] = True
    starts = np.flatnonzero(first)
    length = np.diff(starts, append=width * size)
    middle = starts % size + (length - 1) / 2  # position in the middle of the run of equal values
    result = np.empty(width * size)
    result[order.ravel()] = np.repeat(middle, length)
    result = result.reshape(width, size)
    missing = np.isnan(columns)
    result /= np.maximum(size - missing.sum(axis=1) - 1, 1)[:, None]
    result[missing] = np.nan
    return result.T


def disagreements(values: Floats, columns: Sequence[Column], ids: Sequence[str]) -> list[dict[str, Any]]:
    """Episodes that one dimension puts high and another puts low, the widest apart first.

    The gap is the difference of an episode's highest and lowest :func:`ranks`, between 0 and 1. Such episodes are
    where a reward is gamed or wrong, and cheap to look at.
    """
    if not len(values):
        return []
    lowest, highest = np.fmin.reduce(values, axis=0), np.fmax.reduce(values, axis=0)  # without NaN
    # a constant dimension ranks nobody
    keep = [k for k, c in enumerate(columns) if c.role is not Role.SHAPING and highest[k] > lowest[k]]
    if len(keep) < 2:
        return []
    placed = ranks(values[:, keep]).T  # (D, N), the order in which they lie in memory
    known = ~np.isnan(placed)
    high = np.where(known, placed, -1.0).argmax(axis=0)
    low = np.where(known, placed, 2.0).argmin(axis=0)
    rows = np.arange(len(values))
    gap = np.nan_to_num(placed[high, rows] - placed[low, rows])
    found = []
    for row in np.argsort(-gap, kind="stable")[:DISAGREEMENTS]:
        if gap[row] <= 0:
            break
        above, below = keep[high[row]], keep[low[row]]
        found.append(
            {
                "episode": ids[row],
                "gap": float(gap[row]),
                "high": {"name": columns[above].name, "value": float(values[row, above])},
                "low": {"name": columns[below].name, "value": float(values[row, below])},
            }
        )
    return found


def tracked(summaries: dict[str, dict[str, Any]], matrix: Floats) -> dict[str, float]:
    """Numbers for the tracker: ``rewards/NAME/mean`` and so on."""
    metrics: dict[str, float] = {}
    for name, summary in summaries.items():
        for key in ("mean", "std", "pass_rate", "none_share"):
            if key in summary:
                metrics[f"rewards/{name}/{key}"] = float("nan") if summary[key] is None else summary[key]
    pairs = list(itertools.combinations(enumerate(summaries), 2))
    if len(pairs) <= MAX_PAIRS:
        for (i, first), (j, second) in pairs:
            metrics[f"rewards/correlation/{first}~{second}"] = float(matrix[i, j])
    return metrics


def same_state_share(episodes: Sequence[Episode]) -> float | None:
    """Share of the decisions of groups that were made in one and the same state by all who made them.

    A decision is the n-th turn of a module in the episodes of a group; its state is the prompt and the memory. Where
    this is 1 a group compares decisions and nothing else; from the first decision on that changes the memory, members
    of a group go different ways, and their later decisions are compared across states (re-rolls bring this up, see
    :mod:`memfactory.agents.rerolls`). None where no decision was made twice.
    """
    states: dict[tuple[str, str, int], list[tuple[str, tuple[int, ...]]]] = {}
    for episode in episodes:
        seen: Counter[str] = Counter()
        for turn in episode.turns:
            if turn.trainable:
                slot = episode.group, turn.module, seen[turn.module]
                states.setdefault(slot, []).append((turn.memory_before, tuple(turn.prompt_ids)))
            seen[turn.module] += 1
    shared = [len(set(own)) == 1 for own in states.values() if len(own) > 1]
    return sum(shared) / len(shared) if shared else None

"""Scores as numbers: the table that aggregators read."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from memfactory.episode import Score
from memfactory.reward.dimension import Missing, Role

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Column:
    """What an aggregator may know about a dimension."""

    name: str
    role: Role = Role.OBJECTIVE
    weight: float = 1.0
    low: float = 0.0
    high: float = 1.0
    missing: Missing = Missing.EXCLUDE
    threshold: float = 0.5
    """Of a gate, on its score scaled to [0, 1]."""
    noise: float = 0.0
    """Spread of a group below this is not normalised up."""
    stage: str = ""
    """Stage in a stage-wise product."""

    def passes(self, values: Floats) -> Bools:
        """Whether each score of a gate holds; one that is missing does not. Shape as `values`."""
        scaled = (values - self.low) / (self.high - self.low)
        return np.asarray(scaled >= self.threshold, dtype=np.bool_)  # NaN compares as False


@dataclass(frozen=True)
class ScoreTable:
    """Scores of N samples (episodes, or turns of one kind) on D dimensions.

    `groups` says which samples are compared with each other: codes 0 .. number of groups - 1.
    """

    values: Floats
    """(N, D); NaN where a score is None."""
    columns: tuple[Column, ...]
    groups: Ints
    """(N,)"""
    failed: Bools = field(default_factory=lambda: np.zeros(0, dtype=bool))
    """(N, D), True where the score is None; kept when missing values are filled in."""

    @classmethod
    def of(
        cls, scores: Sequence[Mapping[str, Score]], columns: Sequence[Column], groups: Sequence[Hashable]
    ) -> ScoreTable:
        """The table of `scores` (one mapping by dimension name per sample)."""
        rows = [[row[column.name].value for column in columns] for row in scores]
        return cls.from_rows(rows, columns, groups)

    @classmethod
    def from_rows(
        cls, rows: Sequence[Sequence[float | None]], columns: Sequence[Column], groups: Sequence[Hashable]
    ) -> ScoreTable:
        """The table of plain rows, None where a score is missing."""
        values = np.array(rows, dtype=np.float64).reshape(len(groups), len(columns))  # None becomes NaN
        return cls(values, tuple(columns), codes(groups))

    def select(self, keep: Sequence[int]) -> ScoreTable:
        """The table of some columns."""
        return replace(
            self,
            values=self.values[:, list(keep)],
            columns=tuple(self.columns[k] for k in keep),
            failed=self.failed[:, list(keep)] if self.failed.size else self.failed,
        )

    def where(self, *roles: Role) -> list[int]:
        """Indices of the columns with one of `roles`."""
        return [k for k, column in enumerate(self.columns) if column.role in roles]

    def array(self, attribute: str, keep: Sequence[int]) -> Floats:
        """One number per kept column, e.g. ``array("weight", gates)``. (len(keep),)"""
        return np.array([getattr(self.columns[k], attribute) for k in keep], dtype=np.float64)


def codes(labels: Sequence[Hashable]) -> Ints:
    """Each label as a number, in order of first appearance. (N,)"""
    seen: dict[Hashable, int] = {}
    return np.array([seen.setdefault(label, len(seen)) for label in labels], dtype=np.int64)


def group_mean(values: Floats, groups: Ints) -> Floats:
    """Mean over each group without NaN; NaN for a group without a value.

    Args:
        values: (N,) or (N, D).
        groups: (N,)

    Returns:
        (number of groups,) or (number of groups, D).
    """
    total, count = _sums(np.nan_to_num(values), groups), _sums(np.isfinite(values).astype(np.float64), groups)
    with np.errstate(invalid="ignore"):
        mean: Floats = total / count
    return mean


def group_std(values: Floats, groups: Ints) -> Floats:
    """Bessel-corrected standard deviation over each group without NaN; 0 below two values. Shapes as above."""
    count = _sums(np.isfinite(values).astype(np.float64), groups)
    centered = values - group_mean(values, groups)[groups]
    squares = _sums(np.nan_to_num(centered) ** 2, groups)
    std: Floats = np.sqrt(np.where(count > 1, squares / np.maximum(count - 1, 1), 0.0))
    return std


def _sums(values: Floats, groups: Ints) -> Floats:
    size = int(groups.max()) + 1 if groups.size else 0
    if values.ndim == 1:
        return np.asarray(np.bincount(groups, values, size), dtype=np.float64)
    columns = [np.bincount(groups, column, size) for column in values.T]
    return np.stack(columns, axis=1) if columns else np.zeros((size, 0))

"""Advantages: how much better a sample is than those it is compared with.

Samples are episodes of one task, or, for dimensions of turns, the same turn of those episodes. One episode
counts once, whatever the number of its turns.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import numpy as np

from memfactory.reward.aggregate import EPSILON
from memfactory.reward.table import Bools, Floats, Ints, codes, group_mean, group_std

Estimator = Literal["standardized", "centered", "rloo", "batch", "none"]


class GroupState(StrEnum):
    """What a group can teach, and if nothing, why."""

    SIGNAL = "signal"
    SOLVED = "solved"
    """All episodes reached the best reward seen in the batch."""
    FAILED = "failed"
    """All episodes got the worst reward seen in the batch."""
    TIED = "tied"
    """All equal, somewhere in between."""
    UNMEASURED = "unmeasured"
    """Fewer than two episodes could be scored."""


@dataclass(slots=True)
class Advantages:
    """Result of :func:`advantages` over N samples."""

    values: Floats
    """(N,); 0 where there is no reward or the group has no spread."""
    divisors: Floats
    """(N,); what the differences were divided by."""
    states: list[GroupState]
    """Of each group, in order of first appearance."""

    def share(self, *states: GroupState) -> float:
        """Share of groups in any of `states`."""
        return sum(state in states for state in self.states) / max(len(self.states), 1)

    @property
    def dead_share(self) -> float:
        """Share of groups that carry no signal."""
        return 1 - self.share(GroupState.SIGNAL)


def advantages(
    rewards: Floats,
    groups: Ints,
    estimator: Estimator = "standardized",
    floor: float = 0.0,
    shown: Floats | None = None,
) -> Advantages:
    """Advantage of each sample against the others of its group.

    With mean and Bessel-corrected std over the group's measured rewards, n of them:

    - ``standardized``: A = (r - mean) / (max(std, floor) + 1e-4) (GRPO, arXiv 2402.03300, eq. 3; 1e-4 as TRL)
    - ``centered``: A = r - mean (MemAgent, arXiv 2507.02259; Dr. GRPO, arXiv 2503.20783)
    - ``rloo``: A = r - mean of the others = n / (n - 1) (r - mean) (RLOO, arXiv 2402.14740, eq. 6)
    - ``batch``: centred in the group, divided by max(std of the whole batch, floor) + 1e-4
    - ``none``: A = r

    A group whose rewards are equal up to rounding, or that has fewer than two, gets 0 (except under ``none``).

    Args:
        rewards: (N,); NaN where a sample has none.
        groups: (N,) codes 0 .. number of groups - 1.
        estimator: one of the above.
        floor: smallest std that is divided by, in units of reward: a tied group's noise keeps its size.
        shown: (N,) what says whether a group without signal is solved or failed, where `rewards` are already relative
            to the group.
    """
    measured = np.isfinite(rewards)
    size = int(groups.max()) + 1 if groups.size else 0
    if not size:
        return Advantages(np.zeros(0), np.zeros(0), [])
    count = np.bincount(groups, measured, size)
    lowest, highest = _extremes(rewards[measured], groups[measured], size)
    best, worst = (rewards[measured].max(), rewards[measured].min()) if measured.any() else (0.0, 0.0)
    enough = count >= 2
    # a spread this small is the rounding of a sum, no difference
    lowest, highest = np.where(enough, lowest, 0.0), np.where(enough, highest, 0.0)
    live = highest - lowest > 1e-9 * np.maximum(1.0, np.maximum(np.abs(lowest), np.abs(highest)))

    std = np.full(size, 1.0)
    whole = float(rewards[measured].std(ddof=1)) if best - worst > 1e-9 * max(1.0, abs(best), abs(worst)) else 0.0
    batch = max(whole, floor) + EPSILON if max(whole, floor) > 0 else 1.0
    if estimator == "standardized":
        # a group without a spread has no scale of its own; it matters where potentials tell its turns apart
        std = np.where(live, np.maximum(group_std(rewards, groups), floor) + EPSILON, batch)
    elif estimator == "batch":
        std = np.full(size, batch)
    elif estimator == "rloo":
        std = np.where(enough, (count - 1) / np.maximum(count, 1), 1.0)
    divisors = std[groups]
    if estimator == "none":
        values = np.nan_to_num(rewards)
    else:
        with np.errstate(invalid="ignore"):
            values = (rewards - group_mean(rewards, groups)[groups]) / divisors
        values = np.where(measured & live[groups], np.nan_to_num(values), 0.0)
    states = _states(enough, live, (rewards if shown is None else shown)[measured], groups[measured])
    return Advantages(values, divisors, states)


def _extremes(values: Floats, groups: Ints, size: int) -> tuple[Floats, Floats]:
    """Lowest and highest of each group, (size,) each."""
    lowest, highest = np.full(size, np.inf), np.full(size, -np.inf)
    np.minimum.at(lowest, groups, values)
    np.maximum.at(highest, groups, values)
    return lowest, highest


def _states(enough: Bools, live: Bools, rewards: Floats, groups: Ints) -> list[GroupState]:
    """States of groups that have enough episodes, and live ones a signal; `rewards` of those that have one."""
    lowest, highest = _extremes(rewards, groups, len(live))
    best, worst = highest.max(), lowest.min()
    near = 1e-9 * max(1.0, abs(best), abs(worst))
    states = []
    for group in range(len(live)):
        if not enough[group]:
            states.append(GroupState.UNMEASURED)
        elif live[group]:
            states.append(GroupState.SIGNAL)
        elif lowest[group] >= best - near and best > 0:
            states.append(GroupState.SOLVED)
        elif highest[group] <= worst + near or lowest[group] >= best - near:
            states.append(GroupState.FAILED)
        else:
            states.append(GroupState.TIED)
    return states


def group_advantages(
    rewards: Sequence[float | None],
    groups: Sequence[Hashable],
    estimator: Estimator = "standardized",
    floor: float = 0.0,
) -> Advantages:
    """:func:`advantages` of plain lists: None for a missing reward, any label for a group."""
    return advantages(np.array(rewards, dtype=np.float64), codes(groups), estimator, floor)


def shuffled(values: Floats, groups: Ints, seed: int) -> Floats:
    """Control experiment: `values` (N,) permuted inside each group, so that they say nothing about their sample."""
    result, draw = values.copy(), np.random.default_rng(seed)
    for group in range(int(groups.max()) + 1 if groups.size else 0):
        own = np.flatnonzero(groups == group)
        result[own] = values[draw.permutation(own)]
    return result

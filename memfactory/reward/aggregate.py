"""From the scores of an episode to one reward: gated by default, and the schemes it is compared with.

All aggregators follow one contract, so that a recipe can name any of them and a new one is a small class.
What they share: dimensions of weight 0 and potentials do not take part, a gate without a value fails closed,
an episode whose objectives could not be measured has no reward (NaN here, None on the episode).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np

from memfactory.errors import RecipeError
from memfactory.plugins import construct, resolve
from memfactory.recipe import AggregateSection, nearest
from memfactory.reward.dimension import Missing, Role
from memfactory.reward.table import Column, Floats, ScoreTable, group_mean, group_std

EPSILON = 1e-4
"""Added to a standard deviation before dividing by it, as in TRL 1.16."""


@dataclass(frozen=True)
class Aggregate:
    """What an aggregator makes of a table."""

    reward: Floats
    """(N,); NaN where there is none. What is logged and shown."""
    signal: Floats | None = None
    """(N,); what episodes are compared by, where that is not the reward itself."""
    parts: Mapping[str, Floats] = field(default_factory=dict)
    """(N,) each; e.g. the gate and the utility, for logs."""


@runtime_checkable
class Aggregator(Protocol):
    """Scores of N samples on D dimensions -> one reward each.

    Implementations never see episodes: only numbers, roles, ranges, and who is compared with whom.
    """

    needs_positive: ClassVar[bool]
    """Whether a score below 0 breaks it (products do: two negative factors make a reward)."""
    scale_free: ClassVar[bool]
    """Whether rescaling one dimension leaves the order of episodes as it is."""
    stateful: ClassVar[bool]
    """Whether it has ``state_dict()`` and ``load_state_dict(state)``, kept in checkpoints."""

    def __call__(self, table: ScoreTable) -> Aggregate: ...


def unit(table: ScoreTable, keep: list[int]) -> Floats:
    """Columns `keep` scaled from their declared ranges to [0, 1]. (N, len(keep))"""
    low, high = table.array("low", keep), table.array("high", keep)
    return np.clip((table.values[:, keep] - low) / (high - low), 0.0, 1.0)


def settle(table: ScoreTable) -> tuple[ScoreTable, Floats]:
    """Deal with missing values as their dimensions declare.

    Gates without a value get the lowest value of their range. ``group_mean`` fills in the mean of the group where
    there is one. What stays NaN is for the aggregator to leave out.

    Returns:
        the table of the dimensions that take part, and a mask (N,): NaN for samples that get no reward, else 0.
    """
    table = table.select([k for k, c in enumerate(table.columns) if c.weight != 0 and c.role is not Role.SHAPING])
    missing = np.isnan(table.values)  # (N, D)
    values = table.values.copy()
    excluded = np.zeros(len(values), dtype=bool)
    needed = table.where(Role.OBJECTIVE) or ([] if table.where(Role.GATE) else table.where(Role.BONUS))
    if needed:  # nothing measured of what the episode is for; gates by themselves fail closed
        excluded |= missing[:, needed].all(axis=1)
    for k, column in enumerate(table.columns):
        if column.role is not Role.GATE and column.missing is Missing.EXCLUDE:
            excluded |= missing[:, k]
    present = np.where(excluded[:, None], np.nan, values)  # who has no reward is in no mean
    for k, column in enumerate(table.columns):
        if column.role is Role.GATE:
            values[missing[:, k], k] = column.low
        elif column.missing is Missing.GROUP_MEAN and missing[:, k].any():
            means = group_mean(present[:, k], table.groups)[table.groups]
            values[:, k] = np.where(missing[:, k], means, values[:, k])
            excluded |= np.isnan(values[:, k])
    return replace(table, values=values, failed=missing), np.where(excluded, np.nan, 0.0)


def weighted_mean(values: Floats, weights: Floats) -> Floats:
    """Mean by weight over the columns that have a value. (N, D), (D,) -> (N,)"""
    known = np.isfinite(values)
    total: Floats = np.nan_to_num(values) @ weights / np.maximum(known @ weights, np.finfo(float).tiny)
    return total


def gate_factor(scores: Floats, thresholds: Floats, mode: str = "geometric", delta: float = 0.01) -> Floats:
    """How far the gates hold, in [0, 1].

    ``geometric`` is B = exp(mean_i ln((s_i + delta) / (1 + delta))) (Gated Aggregation Strategy, arXiv 2603.10473,
    eq. 1): a soft AND, softer the more gates there are. ``product`` and ``min`` are what they say. ``veto`` is 0 when
    any gate is below its threshold, else 1: a true constraint.

    Args:
        scores: (N, m) in [0, 1].
        thresholds: (m,), for ``veto``.
        mode: one of the four.
        delta: smoothing of ``geometric``, above 0.

    Returns:
        (N,); 1 where there is no gate.
    """
    if scores.shape[1] == 0:
        return np.ones(len(scores))
    if mode == "geometric":
        factor: Floats = np.exp(np.log((scores + delta) / (1 + delta)).mean(axis=1))
        return factor
    if mode == "product":
        return np.asarray(scores.prod(axis=1))
    if mode == "min":
        return np.asarray(scores.min(axis=1))
    assert mode == "veto", mode
    return np.asarray((scores >= thresholds).all(axis=1), dtype=np.float64)


def max_safe_delta(gates: int, rho: float = 0.5) -> float:
    """Largest delta at which breaking one of `gates` gates never pays under ``geometric``.

    With delta below rho^m / (1 - rho^m), an episode that breaks one gate and has utility U <= U_max has less reward
    than one that breaks none and has U >= rho * U_max. 1.0 for one gate, .143 for three, .00196 for nine at rho = .5.
    """
    power = rho**gates
    return power / (1 - power) if gates else float("inf")


@dataclass(frozen=True)
class Gated:
    """R = B * (U + bonus): gates never trade against objectives (arXiv 2603.10473, eq. 1-3).

    B is :func:`gate_factor` of the gates scaled to [0, 1], U = sum_j w_j u_j / sum_j w_j over the objectives that were
    measured (1 where the recipe has none), the bonus sum_k w_k b_k.
    """

    gate: Literal["geometric", "product", "min", "veto"] = "geometric"
    delta: float = 0.01
    """Smoothing of the geometric gate. :func:`max_safe_delta` says how large it may be."""

    needs_positive: ClassVar[bool] = True
    scale_free: ClassVar[bool] = False
    stateful: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.delta <= 0:
            raise RecipeError(f"aggregate.delta: {self.delta}", "a failed gate would be the logarithm of 0", "0.01")

    def __call__(self, table: ScoreTable) -> Aggregate:
        table, mask = settle(table)
        gates, objectives, bonuses = (table.where(role) for role in (Role.GATE, Role.OBJECTIVE, Role.BONUS))
        factor = gate_factor(unit(table, gates), table.array("threshold", gates), self.gate, self.delta)
        if self.gate == "veto":  # at a threshold of 0 the lowest score would pass
            factor = np.where(table.failed[:, gates].any(axis=1), 0.0, factor)
        utility = np.ones(len(mask))
        if objectives:
            utility = weighted_mean(table.values[:, objectives], table.array("weight", objectives))
        bonus = np.nan_to_num(table.values[:, bonuses]) @ table.array("weight", bonuses)
        parts = {"gate": factor, "utility": utility + mask}
        return Aggregate(factor * (utility + bonus) + mask, parts=parts)


@dataclass(frozen=True)
class WeightedSum:
    """R = sum_k w_k x_k over gates, objectives and bonuses alike: TRL's rule, the linear baseline.

    A dropped value is replaced by scaling the others' weights up to the same total, within its role.
    """

    needs_positive: ClassVar[bool] = False
    scale_free: ClassVar[bool] = False
    stateful: ClassVar[bool] = False

    def __call__(self, table: ScoreTable) -> Aggregate:
        table, mask = settle(table)
        reward = np.zeros(len(mask))
        for role in (Role.GATE, Role.OBJECTIVE, Role.BONUS):
            keep = table.where(role)
            values, weights = table.values[:, keep], table.array("weight", keep)
            known = np.isfinite(values)
            share = known @ np.abs(weights)
            scale = np.abs(weights).sum() / np.where(share > 0, share, 1.0) if role is Role.OBJECTIVE else 1.0
            reward += np.nan_to_num(values) @ weights * scale
        return Aggregate(reward + mask)


@dataclass(frozen=True)
class NormalizeThenSum:
    """Each dimension standardised in its group, then summed by weight (GDPO, arXiv 2601.05242).

    z_k = (x_k - mean_group) / (max(std_group, noise_k) + 1e-4), signal = sum_k w_k z_k. A dimension that is constant
    in a group adds nothing; a dropped value adds nothing. The reward shown is the plain weighted sum. The signal is
    then standardised over the batch (``credit.advantage: batch``), as TRL's `normalize_then_sum` does.
    """

    needs_positive: ClassVar[bool] = False
    scale_free: ClassVar[bool] = True
    stateful: ClassVar[bool] = False
    estimator: ClassVar[str] = "batch"
    """How its signal is compared unless the recipe says otherwise."""

    def __call__(self, table: ScoreTable) -> Aggregate:
        plain = WeightedSum()(table).reward
        table, mask = settle(table)
        everything = list(range(len(table.columns)))
        values = table.values + mask[:, None]  # who has no reward is in no baseline
        mean, std = group_mean(values, table.groups), group_std(values, table.groups)
        divisor = np.maximum(std, table.array("noise", everything)) + EPSILON
        scores = (values - mean[table.groups]) / divisor[table.groups]
        return Aggregate(plain, np.nan_to_num(scores) @ table.array("weight", everything) + mask)


@dataclass(frozen=True)
class MinMaxMean:
    """(1/D) sum_k w_k (x_k - min_k) / (max_k - min_k) with frozen statistics (Sotopia-RL, arXiv 2508.03905, eq. 4).

    The statistics come from a whole labelled set, not from a batch, so that a reward means the same at every step:
    `memfactory rewards rescore RUN --statistics FILE` prints and stores them.
    """

    statistics: dict[str, tuple[float, float]]
    """Smallest and largest value of each dimension, by its name in the recipe."""

    needs_positive: ClassVar[bool] = False
    scale_free: ClassVar[bool] = True
    stateful: ClassVar[bool] = False

    def __call__(self, table: ScoreTable) -> Aggregate:
        table, mask = settle(table)
        names = [column.name for column in table.columns]
        self.check(names)
        bounds = np.array([self.statistics[name] for name in names]).reshape(-1, 2)
        span = np.where(bounds[:, 1] > bounds[:, 0], bounds[:, 1] - bounds[:, 0], 1.0)
        scaled = (table.values - bounds[:, 0]) / span
        weights = table.array("weight", range(len(names)))
        known = np.isfinite(scaled)
        return Aggregate(np.nan_to_num(scaled) @ weights / np.maximum(known.sum(axis=1), 1) + mask)

    def check(self, names: list[str]) -> None:
        """See that there are statistics of the dimensions `names`.

        Raises:
            RecipeError: there are not.
        """
        unknown = [name for name in names if name not in self.statistics]
        if unknown:
            raise RecipeError(
                "aggregate.statistics",
                f"no smallest and largest value of {', '.join(unknown)}",
                "add `NAME: [min, max]`; `memfactory rewards rescore RUN --statistics FILE` measures them",
            )


@dataclass(frozen=True)
class StagewiseProduct:
    """R = product over stages of (sum_k w_k x_k inside the stage) (GoT-R1, arXiv 2505.17022).

    Improving one stage pays only while the others are above zero. A dimension without a `stage` is one of its own.
    `floor` is added to every stage, so that one stage at zero does not silence the others.
    """

    floor: float = 0.0

    needs_positive: ClassVar[bool] = True
    scale_free: ClassVar[bool] = False
    stateful: ClassVar[bool] = False

    def __call__(self, table: ScoreTable) -> Aggregate:
        table, mask = settle(table)
        stages: dict[str, list[int]] = {}
        for k, column in enumerate(table.columns):
            stages.setdefault(column.stage or column.name, []).append(k)
        reward, parts = np.ones(len(mask)), {}
        for stage, keep in stages.items():
            values, weights = table.values[:, keep], table.array("weight", keep)
            # a dropped value leaves its stage at the same total weight; a stage without any value is left out
            total = weighted_mean(values, weights) * weights.sum()
            known = np.isfinite(values).any(axis=1)
            parts[f"stage/{stage}"] = np.where(known, total, np.nan)
            reward = reward * np.where(known, total + self.floor, 1.0)
        return Aggregate(reward + mask, parts=parts)


AGGREGATORS: dict[str, Any] = {
    "gated": Gated,
    "weighted_sum": WeightedSum,
    "normalize_then_sum": NormalizeThenSum,
    "min_max_mean": MinMaxMean,
    "stagewise_product": StagewiseProduct,
}


def build_aggregator(section: AggregateSection) -> Aggregator:
    """The recipe's aggregator.

    Raises:
        RecipeError: there is none of that name, or its options are wrong.
    """
    if ":" in section.name:
        build = resolve(section.name)
    elif section.name in AGGREGATORS:
        build = AGGREGATORS[section.name]
    else:
        raise RecipeError(f"aggregate.name: '{section.name}'", "", nearest(section.name, list(AGGREGATORS)))
    aggregator: Aggregator = construct(build, section.options, "aggregate")
    return aggregator


def check_columns(aggregator: Aggregator, columns: list[Column]) -> list[RecipeError]:
    """What in `columns` does not go with `aggregator`."""
    errors = []
    columns = [column for column in columns if column.weight != 0 and column.role is not Role.SHAPING]
    if isinstance(aggregator, MinMaxMean):
        try:
            aggregator.check([column.name for column in columns])
        except RecipeError as error:  # now, and not at the first batch
            errors.append(error)
    gates = any(column.role is Role.GATE for column in columns)
    # without a gate B is 1, and U any mean: a plain TRL function, whose range is open, may stand there
    multiplies = aggregator.needs_positive and (gates or not isinstance(aggregator, Gated))
    for column in columns:
        where = f"rewards.{column.name}"
        if column.role is Role.GATE and not np.isfinite([column.low, column.high]).all():
            errors.append(RecipeError(f"{where}: a gate without a range", "", "give it `low:` and `high:`"))
        elif multiplies and column.low < 0:
            # an open range, as a plain TRL function has, cannot be scaled
            known = np.isfinite([column.low, column.high]).all()
            add = "add `transform: unit` (or clip)" if known else "give it `low:` and `high:` (or `transform: clip`)"
            errors.append(
                RecipeError(
                    f"{where}: its range begins at {column.low:g}",
                    "the aggregator multiplies, and a failed gate would then raise a negative reward",
                    f"{add}, or use `aggregate: {{name: weighted_sum}}`",
                )
            )
        elif aggregator.needs_positive and column.weight < 0:
            errors.append(RecipeError(f"{where}: weight {column.weight:g}", "weights are shares", "reverse the score"))
    return errors

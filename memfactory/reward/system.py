"""The reward system of a run: dimensions, gate and aggregation, advantages, credit; one object for all who score.

A batch goes through it in this order: measure (functions on episodes), aggregate (scores to a reward), compare
(advantages in groups), credit (an advantage per turn). Only measuring sees episodes; the rest is arithmetic on the
whole batch, gathered from all ranks, so that every rank comes to the same numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from memfactory.episode import Episode
from memfactory.errors import (
    MemFactoryError,
    RecipeError,
    RecipeErrors,
    RewardError,
    ServiceError,
    attempt,
)
from memfactory.recipe import CreditSection, Recipe
from memfactory.reward import statistics
from memfactory.reward.advantage import Advantages, Estimator, advantages, shuffled
from memfactory.reward.aggregate import Aggregate, Aggregator, Gated, build_aggregator, check_columns
from memfactory.reward.background import LOOP
from memfactory.reward.batch import Batch, Part, scores_of
from memfactory.reward.catalogue import WeightedDimension, build_dimensions
from memfactory.reward.credit import CreditAssigner, CreditBatch, build_assigner, turn_advantages
from memfactory.reward.dimension import Role, innermost
from memfactory.reward.faults import BY_FAULT, Faults
from memfactory.reward.measure import Gather, Measuring
from memfactory.reward.table import Floats, Ints, ScoreTable, codes

if TYPE_CHECKING:
    from memfactory.reward.judge import Judge

_ESTIMATORS: dict[str, Estimator] = {"group": "standardized", "none": "centered", "batch": "batch"}
"""TRL's `scale_rewards` in our words."""


@dataclass
class Assessment:
    """What a batch came to, over all ranks."""

    rewards: Floats
    """(N,); NaN for an episode without one."""
    advantages: Advantages
    metrics: dict[str, float]
    """For logs and trackers."""
    record: dict[str, Any]
    """For `rewards.jsonl`: per dimension with reasons, correlations, disagreements, faults."""

    @property
    def failed(self) -> int:
        """Episodes without a reward."""
        return int(np.isnan(self.rewards).sum())


class RewardSystem:
    """See the module's docstring.

    Args:
        dimensions: what is measured, with weights.
        aggregator: default gated.
        credit: the recipe's `credit:`.
        judge: given to the functions that ask for it.

    Raises:
        RecipeErrors: a dimension does not go with the aggregator.
    """

    def __init__(
        self,
        dimensions: Sequence[WeightedDimension],
        aggregator: Aggregator | None = None,
        credit: CreditSection | None = None,
        judge: Judge | None = None,
    ) -> None:
        self.judge = judge
        self.dimensions = [self._supplied(weighted) for weighted in dimensions]
        self.aggregator: Aggregator = aggregator or Gated()
        self.credit = credit or CreditSection()
        self.assigner: CreditAssigner = build_assigner(self.credit.assigner)
        self._names = [weighted.name for weighted in self.dimensions]
        self._of_turns = [k for k, weighted in enumerate(self.dimensions) if weighted.dimension.per_turn]
        self._of_episodes = [k for k in range(len(self._names)) if k not in self._of_turns]
        errors = check_columns(self.aggregator, [weighted.column for weighted in self.dimensions])
        if errors:
            raise RecipeErrors("rewards", errors)

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> RewardSystem:
        """The system a recipe describes.

        Raises:
            RecipeErrors: everything that is wrong in `rewards:`, `aggregate:` and `credit:`.
        """
        from memfactory.reward.judge import build_judge

        errors: list[MemFactoryError] = []

        dimensions = attempt(lambda: build_dimensions(recipe.rewards), errors)
        aggregator = attempt(lambda: build_aggregator(recipe.aggregate), errors)
        attempt(lambda: build_assigner(recipe.credit.assigner), errors)
        judge = attempt(lambda: build_judge(recipe.judge), errors)
        if dimensions is not None and not any(_outcome(weighted) for weighted in dimensions):
            why = "every entry scores turns, is a potential or a gate, or has weight 0"
            errors.append(RecipeError("rewards: nothing says how an episode ended", why, "add answer.exact_match"))
        if errors:
            raise RecipeErrors("rewards", errors)
        assert dimensions is not None
        return cls(dimensions, aggregator, recipe.credit, judge)

    def _supplied(self, weighted: WeightedDimension) -> WeightedDimension:
        services = {"judge": self.judge} if self.judge is not None else {}
        return replace(weighted, dimension=weighted.dimension.supply(services))

    def also(self, weighted: WeightedDimension) -> RewardSystem:
        """This system with one more dimension, e.g. one that only evaluation measures."""
        return RewardSystem([*self.dimensions, weighted], self.aggregator, self.credit, self.judge)

    def close(self) -> None:
        """Let the judge finish: connections are closed and verdicts that wait for the cache are written."""
        if self.judge is not None:
            LOOP.start(self.judge.aclose()).result(timeout=10)

    # ---- scores ------------------------------------------------------------------------------

    def begin(self) -> Measuring:
        """Begin to measure a batch: `submit` episodes as they are complete, then `finish`."""
        return Measuring(self.dimensions)

    def score(self, episodes: Sequence[Episode]) -> Faults:
        """Measure complete `episodes` and set `scores` and `reward`, without credit: for evaluation."""
        faults = self.begin().finish(episodes)
        self.reward(episodes)
        return faults

    def reward(self, episodes: Sequence[Episode]) -> Aggregate:
        """Aggregate the scores `episodes` have into their `reward`. One that could not be run to its end has none.

        Returns:
            the aggregate over those that could (over all, if none could).
        """
        ran = [episode for episode in episodes if not episode.failed] or list(episodes)
        aggregate = self.aggregator(self.table(ran).select(self._of_episodes))
        for episode in episodes:
            episode.reward = None
        for episode, value in zip(ran, aggregate.reward.tolist(), strict=True):
            episode.reward = None if np.isnan(value) or episode.failed else value
        return aggregate

    def table(self, episodes: Sequence[Episode]) -> ScoreTable:
        """The transformed scores of measured `episodes` on all dimensions; of those of turns, the means."""
        return self._table(scores_of(episodes, self._names), codes([episode.group for episode in episodes]))

    def _transformed(self, values: Floats, keep: Sequence[int]) -> Floats:
        """`values` (n, len(keep)) of the dimensions `keep`, each under its transform."""
        values = values.copy()
        for place, k in enumerate(keep):
            values[:, place] = self.dimensions[k].transformed(values[:, place])
        return values

    def _table(self, values: Floats, groups: Ints) -> ScoreTable:
        columns = tuple(weighted.column for weighted in self.dimensions)
        return ScoreTable(self._transformed(values, range(len(columns))), columns, groups)

    # ---- rewards, advantages, credit ----------------------------------------------------------

    def estimator(self, scale_rewards: str = "group") -> Estimator:
        """How rewards are compared: as the recipe says, as the aggregator needs, or as TRL's `scale_rewards` says."""
        own: Estimator | None = self.credit.advantage or getattr(self.aggregator, "estimator", None)
        return own or _ESTIMATORS[scale_rewards]

    def assess(
        self,
        episodes: Sequence[Episode],
        faults: Faults | None = None,
        *,
        scale_rewards: str = "group",
        seed: int = 0,
        gather: Gather | None = None,
        rank: int = 0,
        max_failed_share: float = 1.0,
    ) -> Assessment:
        """Set `reward` and `advantage` of measured episodes, and `advantage` and `trainable` of their turns.

        Args:
            episodes: this rank's part of the batch, measured; equally many on every rank.
            faults: from measuring.
            scale_rewards: TRL's option, where the recipe has no `credit.advantage`.
            seed: of the shuffling control.
            gather: concatenates lists over ranks; None for one process.
            rank: of this process.
            max_failed_share: see the recipe's `rollout.max_failed_share`.

        Raises:
            RewardError: more than that share of the episodes has no reward, or one function failed on more.
            ServiceError, StoreError: so many could not even be run, mostly by that fault.
        """
        of_turns = [self._names[k] for k in self._of_turns]
        own = Part.of(episodes, self._names, of_turns, faults or Faults(), self.credit.attribute)
        if self.judge is not None:
            own.judge.update(self.judge.metrics())
        batch = Batch.of(gather([own]) if gather is not None else [own])
        ran = batch.ran  # a gate without a value fails closed, so the others are not even shown to the aggregator
        table = self._table(batch.values[ran], np.unique(batch.groups[ran], return_inverse=True)[1].astype(np.int64))
        turn_values = self._transformed(batch.turn_values, self._of_turns)
        aggregate = self.aggregator(table.select(self._of_episodes))
        rewards, turn_rewards = batch.spread(aggregate.reward), self._turn_rewards(turn_values, batch)
        self._refuse_failures(rewards, batch, max_failed_share)

        signal = rewards if aggregate.signal is None else batch.spread(aggregate.signal)
        potentials = self._potentials(turn_values, batch)
        if self.credit.shuffle_rewards:
            order = shuffled(np.arange(len(rewards), dtype=np.float64), batch.comparable, seed).astype(np.int64)
            rewards, signal = rewards[order], signal[order]
            turn_rewards = shuffled(turn_rewards, batch.slot, seed)
            potentials = shuffled(potentials, batch.slot, seed)
        estimator = self.estimator(scale_rewards)
        result = advantages(signal, batch.groups, estimator, self.credit.std_floor, shown=rewards)
        credit = CreditBatch(
            rewards=signal,
            advantages=result.values,
            divisors=result.divisors,
            groups=batch.groups,
            episode=batch.episode,
            module=batch.module,
            slot=batch.slot,
            last=batch.last,
            turn_rewards=turn_rewards,
            potentials=potentials,
            links=batch.links,
        )
        mixed = any(self._counts(k) for k in self._of_turns)
        per_turn = turn_advantages(credit, self.credit, estimator, self.assigner, mixed=mixed)
        first = rank * len(episodes)
        _write(episodes, rewards[first:], result.values[first:], per_turn[np.searchsorted(batch.episode, first) :])

        metrics, record = self._statistics(batch, table, turn_values)
        metrics |= {f"reward/{name}": _nanmean(batch.spread(part)) for name, part in aggregate.parts.items()}
        for part in {id(part): part for part in self._parts().values()}.values():  # one may stand under two names
            if hasattr(part, "update"):
                part.update(table)
        return Assessment(rewards, result, metrics, record)

    def _counts(self, k: int) -> bool:
        """Whether dimension `k` takes part in rewards (a potential does not)."""
        weighted = self.dimensions[k]
        return weighted.weight != 0 and weighted.dimension.role is not Role.SHAPING

    def _turn_rewards(self, values: Floats, batch: Batch) -> Floats:
        """Rewards of turns, by the same aggregator, from the dimensions that speak about their module. (M,)

        Args:
            values: (M, number of dimensions of turns), transformed.
            batch: whose turns they are.
        """
        rewards = np.full(len(batch.episode), np.nan)
        modules = np.array(batch.module, dtype=object)
        for module in dict.fromkeys(batch.module) if self._of_turns else ():
            keep = [place for place, k in enumerate(self._of_turns) if self._counts(k) and self._speaks(k, module)]
            if not keep:
                continue
            rows = np.flatnonzero(modules == module)
            columns = tuple(self.dimensions[self._of_turns[place]].column for place in keep)
            groups = np.unique(batch.slot[rows], return_inverse=True)[1].astype(np.int64)
            aggregate = self.aggregator(ScoreTable(values[rows][:, keep], columns, groups))
            rewards[rows] = aggregate.reward if aggregate.signal is None else aggregate.signal
        return rewards

    def _speaks(self, k: int, module: str) -> bool:
        modules = self.dimensions[k].dimension.modules
        return not modules or module in modules

    def _potentials(self, values: Floats, batch: Batch) -> Floats:
        """Potential of the state after every turn, (M,): sum_k weight_k Phi_k; NaN where there is none.

        A turn that a potential does not speak about leaves it where it was. One that could not be measured is NaN, and
        its episode is not shaped.
        """
        total = np.zeros(len(batch.episode))
        shaping = [(p, k) for p, k in enumerate(self._of_turns) if self.dimensions[k].dimension.role is Role.SHAPING]
        shaping = [(place, k) for place, k in shaping if self.dimensions[k].weight != 0]
        if not shaping:
            return np.full(len(batch.episode), np.nan)
        for place, k in shaping:
            held, episode = 0.0, -1
            for row, (owner, module) in enumerate(zip(batch.episode.tolist(), batch.module, strict=True)):
                held = held if owner == episode else 0.0
                episode = owner
                if self._speaks(k, module):
                    held = values[row, place]
                total[row] += self.dimensions[k].weight * held
        return total

    def _refuse_failures(self, rewards: Floats, batch: Batch, limit: float) -> None:
        count, failed = len(rewards), int(np.isnan(rewards).sum())
        by_dimension: Counter[str] = sum((Counter(own.by_dimension) for own in batch.faults), Counter())
        fix = "fix the reward, or raise rollout.max_failed_share"
        why = "; ".join(batch.examples[:3])
        if failed > limit * count:
            what = f"{failed} of {count} episodes could not be scored"
            not_run = Counter(fault for fault in batch.failed if fault)
            if not_run:
                what += f", {' and '.join(f'{number} by a fault of the {fault}' for fault, number in not_run.items())}"
            if 2 * not_run.total() > failed:
                fault = not_run.most_common(1)[0][0]
                raise BY_FAULT.get(fault, ServiceError)(
                    what, why, f"mend the {fault}, or raise rollout.max_failed_share"
                )
            raise RewardError(what, why or "their dimensions returned None", fix)
        for name, number in by_dimension.most_common(1):
            if number > limit * count:
                raise RewardError(f"reward '{name}' failed {number} times on {count} episodes", why, fix)

    def _statistics(
        self, batch: Batch, table: ScoreTable, turn_values: Floats
    ) -> tuple[dict[str, float], dict[str, Any]]:
        summaries: dict[str, dict[str, Any]] = {}
        for k, weighted in enumerate(self.dimensions):
            values = table.values[:, k]
            if weighted.dimension.per_turn:
                rows = [row for row, module in enumerate(batch.module) if self._speaks(k, module)]
                values = turn_values[rows, self._of_turns.index(k)]
            reasons = Counter({why: number for (name, why), number in batch.reasons.items() if name == weighted.name})
            summary = statistics.summarise(weighted.column, values, reasons)
            summaries[weighted.name] = {"scope": str(weighted.dimension.scope), **summary}
        matrix = statistics.correlations(table.values)
        record = {
            "dimensions": summaries,
            "correlation": {
                "names": list(summaries),
                "matrix": [[None if np.isnan(x) else round(x, 4) for x in row] for row in matrix.tolist()],
            },
            "disagreements": statistics.disagreements(
                table.values, table.columns, [batch.ids[index] for index in batch.ran.tolist()]
            ),
            "faults": {
                "count": dict(batch.fault_count),
                "examples": batch.examples,
                "tracebacks": [text for own in batch.faults for text in own.tracebacks][:10],
            },
        }
        metrics = statistics.tracked(summaries, matrix)
        metrics |= {f"faults/{fault}": float(number) for fault, number in batch.fault_count.items()}
        metrics |= {f"judge/{name}": value for name, value in batch.judge.items()}
        return metrics, record

    def set_weight(self, name: str, weight: float) -> None:
        """Change the weight of a dimension while a run goes on: what a controller does. Checkpoints keep it.

        Raises:
            KeyError: there is no dimension of that name.
        """
        if name not in self._names:
            raise KeyError(name)
        self.dimensions = [replace(w, weight=weight) if w.name == name else w for w in self.dimensions]

    # ---- checkpoints -------------------------------------------------------------------------

    def _parts(self) -> dict[str, Any]:
        """Whatever keeps state: it has `state_dict`, `load_state_dict` and, to learn from batches, `update(table)`."""
        parts: dict[str, Any] = {"aggregator": self.aggregator, "assigner": self.assigner}
        for weighted in self.dimensions:
            parts[f"dimension/{weighted.name}"] = innermost(weighted.dimension.function)
            parts[f"transform/{weighted.name}"] = weighted.transform
        return {name: part for name, part in parts.items() if hasattr(part, "state_dict")}

    def state_dict(self) -> dict[str, Any]:
        """Weights and the state of every part, as plain data: what a checkpoint keeps."""
        return {
            "weights": {weighted.name: weighted.weight for weighted in self.dimensions},
            "parts": {name: part.state_dict() for name, part in self._parts().items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.dimensions = [replace(w, weight=state["weights"].get(w.name, w.weight)) for w in self.dimensions]
        for name, part in self._parts().items():
            if name in state["parts"]:
                part.load_state_dict(state["parts"][name])


def _outcome(weighted: WeightedDimension) -> bool:
    """Whether a dimension says how good a whole episode is."""
    dimension = weighted.dimension
    return not dimension.per_turn and dimension.role is not Role.GATE and weighted.weight != 0


def _write(episodes: Sequence[Episode], rewards: Floats, values: Floats, per_turn: Floats) -> None:
    shares, position = per_turn.tolist(), 0
    for episode, reward, advantage in zip(episodes, rewards.tolist(), values.tolist(), strict=False):
        episode.reward = None if reward != reward else reward  # NaN
        episode.advantage = advantage
        for turn in episode.turns:
            share = shares[position]
            position += 1
            if share != share:  # NaN: not trained
                turn.advantage, turn.trainable = 0.0, False
            else:
                turn.advantage = share


def _nanmean(values: Floats) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")

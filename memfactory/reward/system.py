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

from memfactory.episode import Episode, Score
from memfactory.errors import MemFactoryError, RecipeError, RecipeErrors, RewardError
from memfactory.recipe import CreditSection, Recipe
from memfactory.reward import statistics
from memfactory.reward.advantage import Advantages, Estimator, advantages, shuffled
from memfactory.reward.aggregate import Aggregate, Aggregator, Gated, build_aggregator, check_columns
from memfactory.reward.background import BackgroundLoop
from memfactory.reward.catalogue import WeightedDimension, build_dimensions
from memfactory.reward.credit import Assigner, CreditBatch, build_assigner, turn_advantages
from memfactory.reward.dimension import Role, innermost
from memfactory.reward.measure import Faults, Gather, Measuring
from memfactory.reward.table import Bools, Floats, Ints, ScoreTable, codes

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


@dataclass(frozen=True)
class _Turns:
    """The M turns of a batch, in episode order."""

    episode: Ints
    """(M,) index of the episode."""
    module: list[str]
    slot: Ints
    """(M,) code of group, module and how many turns of that module came before."""
    last: Bools
    """(M,)"""


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
        self.assigner: Assigner = build_assigner(self.credit.assigner)
        self._loop = BackgroundLoop()
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

        def collect(make: Any) -> Any:
            try:
                return make()
            except RecipeErrors as several:
                errors.extend(several.errors)
            except RecipeError as error:
                errors.append(error)
            return None

        dimensions = collect(lambda: build_dimensions(recipe.rewards))
        aggregator = collect(lambda: build_aggregator(recipe.aggregate))
        collect(lambda: build_assigner(recipe.credit.assigner))
        judge = collect(lambda: build_judge(recipe.judge))
        system = None if errors else collect(lambda: cls(dimensions, aggregator, recipe.credit, judge))
        if errors:
            raise RecipeErrors("rewards", errors)
        assert isinstance(system, cls)
        return system

    def _supplied(self, weighted: WeightedDimension) -> WeightedDimension:
        services = {"judge": self.judge} if self.judge is not None else {}
        return replace(weighted, dimension=weighted.dimension.supply(services))

    def also(self, weighted: WeightedDimension) -> RewardSystem:
        """This system with one more dimension, e.g. one that only evaluation measures."""
        return RewardSystem([*self.dimensions, weighted], self.aggregator, self.credit, self.judge)

    # ---- scores ------------------------------------------------------------------------------

    def begin(self) -> Measuring:
        """Begin to measure a batch: `submit` episodes as they are complete, then `finish`."""
        return Measuring(self.dimensions, self._loop)

    def score(self, episodes: Sequence[Episode]) -> Faults:
        """Measure complete `episodes` and set `scores` and `reward`, without credit: for evaluation."""
        faults = self.begin().finish(episodes)
        self.reward(episodes)
        return faults

    def reward(self, episodes: Sequence[Episode]) -> Aggregate:
        """Aggregate the scores `episodes` have into their `reward`."""
        table = self._table([_row(episode, self._names) for episode in episodes], codes([e.group for e in episodes]))
        aggregate = self.aggregator(table.select(self._of_episodes))
        for episode, value in zip(episodes, aggregate.reward.tolist(), strict=True):
            episode.reward = None if np.isnan(value) else value
        return aggregate

    def _values(self, rows: Sequence[Sequence[float | None]], keep: Sequence[int]) -> Floats:
        """Rows of scores on the dimensions `keep` as transformed numbers. (n, len(keep)), NaN where None."""
        values = np.array(rows, dtype=np.float64).reshape(len(rows), len(keep))
        for place, k in enumerate(keep):
            transform, own = self.dimensions[k].transform, self.dimensions[k].dimension
            if transform is not None:
                values[:, place] = transform(values[:, place], own.low, own.high)
        return values

    def _table(self, rows: Sequence[Sequence[float | None]], groups: Ints) -> ScoreTable:
        """All dimensions, of episodes; those of turns by their mean."""
        columns = tuple(weighted.column for weighted in self.dimensions)
        return ScoreTable(self._values(rows, range(len(columns))), columns, groups)

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
        """
        faults = faults or Faults()
        everyone = gather or (lambda items: items)
        names_of_turns = [self._names[k] for k in self._of_turns]
        own = [_compact(episode, self._names, names_of_turns) for episode in episodes]
        batch: list[_Compact] = everyone(own)
        all_faults: list[Faults] = everyone([faults])
        table = self._table([item.row for item in batch], codes([item.group for item in batch]))
        groups = table.groups
        aggregate = self.aggregator(table.select(self._of_episodes))
        rewards = aggregate.reward
        self._refuse_failures(rewards, all_faults, max_failed_share)

        turns = _turns(batch, groups)
        turn_values = self._values([row for item in batch for row in item.turn_rows], self._of_turns)
        turn_rewards = self._turn_rewards(turn_values, turns)
        signal = rewards if aggregate.signal is None else aggregate.signal
        if self.credit.shuffle_rewards:
            order = shuffled(np.arange(len(rewards), dtype=np.float64), groups, seed).astype(np.int64)
            rewards, signal = rewards[order], signal[order]
            turn_rewards = shuffled(turn_rewards, turns.slot, seed)
        estimator = self.estimator(scale_rewards)
        result = advantages(signal, groups, estimator, self.credit.std_floor)
        credit = CreditBatch(
            signal,
            result.values,
            result.divisors,
            groups,
            turns.episode,
            turns.module,
            turns.slot,
            turns.last,
            turn_rewards,
            self._potentials(turn_values, turns),
        )
        mixed = any(self._counts(k) for k in self._of_turns)
        per_turn = turn_advantages(credit, self.credit, estimator, self.assigner, mixed=mixed)
        first = rank * len(episodes)
        _write(episodes, rewards[first:], result.values[first:], per_turn[np.searchsorted(turns.episode, first) :])

        metrics, record = self._statistics(batch, table, turn_values, turns, all_faults)
        metrics |= {f"reward/{name}": _nanmean(part) for name, part in aggregate.parts.items()}
        for part in self._parts().values():
            if hasattr(part, "update"):
                part.update(table)
        return Assessment(rewards, result, metrics, record)

    def _counts(self, k: int) -> bool:
        """Whether dimension `k` takes part in rewards (a potential does not)."""
        weighted = self.dimensions[k]
        return weighted.weight != 0 and weighted.dimension.role is not Role.SHAPING

    def _turn_rewards(self, values: Floats, turns: _Turns) -> Floats:
        """Rewards of turns, by the same aggregator, from the dimensions that speak about their module. (M,)

        Args:
            values: (M, number of dimensions of turns).
            turns: of the batch.
        """
        rewards = np.full(len(turns.episode), np.nan)
        modules = np.array(turns.module, dtype=object)
        for module in dict.fromkeys(turns.module) if self._of_turns else ():
            keep = [place for place, k in enumerate(self._of_turns) if self._counts(k) and self._speaks(k, module)]
            if not keep:
                continue
            rows = np.flatnonzero(modules == module)
            columns = tuple(self.dimensions[self._of_turns[place]].column for place in keep)
            groups = np.unique(turns.slot[rows], return_inverse=True)[1].astype(np.int64)
            aggregate = self.aggregator(ScoreTable(values[rows][:, keep], columns, groups))
            rewards[rows] = aggregate.reward if aggregate.signal is None else aggregate.signal
        return rewards

    def _speaks(self, k: int, module: str) -> bool:
        modules = self.dimensions[k].dimension.modules
        return not modules or module in modules

    def _potentials(self, values: Floats, turns: _Turns) -> Floats:
        """Potential of the state after every turn, (M,): sum_k weight_k Phi_k; NaN where there is none.

        A turn that a potential does not speak about leaves it where it was. One that could not be measured is NaN, and
        its episode is not shaped.
        """
        total = np.zeros(len(turns.episode))
        shaping = [(p, k) for p, k in enumerate(self._of_turns) if self.dimensions[k].dimension.role is Role.SHAPING]
        shaping = [(place, k) for place, k in shaping if self.dimensions[k].weight != 0]
        if not shaping:
            return np.full(len(turns.episode), np.nan)
        for place, k in shaping:
            held, episode = 0.0, -1
            for row, (owner, module) in enumerate(zip(turns.episode.tolist(), turns.module, strict=True)):
                held = held if owner == episode else 0.0
                episode = owner
                if self._speaks(k, module):
                    held = values[row, place]
                total[row] += self.dimensions[k].weight * held
        return total

    def _refuse_failures(self, rewards: Floats, faults: Sequence[Faults], limit: float) -> None:
        count, failed = len(rewards), int(np.isnan(rewards).sum())
        by_dimension: Counter[str] = Counter()
        for own in faults:
            by_dimension.update(own.by_dimension)
        worst = max(by_dimension, key=lambda name: by_dimension[name], default="")
        examples = [example for own in faults for example in own.examples][:3]
        fix = "fix the reward, or raise rollout.max_failed_share"
        if failed > limit * count:
            why = "; ".join(examples) or "their dimensions returned None"
            raise RewardError(f"{failed} of {count} episodes could not be scored", why, fix)
        if worst and by_dimension[worst] > limit * count:
            what = f"reward '{worst}' failed {by_dimension[worst]} times on {count} episodes"
            raise RewardError(what, "; ".join(examples), fix)

    def _statistics(
        self,
        batch: Sequence[_Compact],
        table: ScoreTable,
        turn_values: Floats,
        turns: _Turns,
        faults: Sequence[Faults],
    ) -> tuple[dict[str, float], dict[str, Any]]:
        summaries: dict[str, dict[str, Any]] = {}
        for k, weighted in enumerate(self.dimensions):
            name, column = weighted.name, weighted.column
            values = table.values[:, k]
            reasons: Counter[str] = Counter()
            if weighted.dimension.per_turn:
                place = self._of_turns.index(k)
                rows = [row for row, module in enumerate(turns.module) if self._speaks(k, module)]
                values = turn_values[rows, place]
            if np.isnan(values).any():
                reasons.update(item.reasons[k] for item in batch if item.reasons and item.reasons[k])
            summaries[name] = {"scope": str(weighted.dimension.scope), **statistics.summarise(column, values, reasons)}
        matrix = statistics.correlations(table.values)
        counts: Counter[str] = sum((Counter(own.count) for own in faults), Counter())
        record = {
            "dimensions": summaries,
            "correlation": {
                "names": list(summaries),
                "matrix": [[None if np.isnan(x) else round(x, 4) for x in row] for row in matrix.tolist()],
            },
            "disagreements": statistics.disagreements(table.values, table.columns, [item.id for item in batch]),
            "faults": {
                "count": dict(counts),
                "examples": [example for own in faults for example in own.examples][:3],
                "tracebacks": [text for own in faults for text in own.tracebacks][:3],
            },
        }
        metrics = statistics.tracked(summaries, matrix)
        for fault, number in counts.items():
            metrics[f"faults/{fault}"] = float(number)
        if self.judge is not None:
            metrics |= {f"judge/{name}": value for name, value in self.judge.metrics().items()}
        return metrics, record

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


@dataclass(slots=True)
class _Compact:
    """What ranks tell each other of an episode: scores without texts and tokens."""

    id: str
    group: str
    row: list[float | None]
    reasons: list[str]
    """Why scores are None; empty when none is."""
    modules: tuple[str, ...]
    """Of its turns."""
    turn_rows: list[list[float | None]]
    """Scores of its turns on the dimensions of turns."""


def _row(episode: Episode, names: Sequence[str]) -> list[float | None]:
    scores = episode.scores
    return [scores[name].value for name in names]


def _compact(episode: Episode, names: Sequence[str], names_of_turns: Sequence[str]) -> _Compact:
    row = _row(episode, names)
    reasons = []
    if None in row:
        reasons = [score.reason if score.value is None else "" for score in (episode.scores[name] for name in names)]
    turn_rows = []
    if names_of_turns:
        turn_rows = [[_value(turn.scores.get(name)) for name in names_of_turns] for turn in episode.turns]
    modules = tuple([turn.module for turn in episode.turns])
    return _Compact(episode.id, episode.group, row, reasons, modules, turn_rows)


def _value(score: Score | None) -> float | None:
    return None if score is None else score.value


def _turns(batch: Sequence[_Compact], groups: Ints) -> _Turns:
    lengths = np.array([len(item.modules) for item in batch], dtype=np.int64)
    episode = np.repeat(np.arange(len(batch)), lengths)
    kinds: dict[tuple[str, int], int] = {}  # (module, occurrence) -> number
    known: dict[tuple[str, ...], list[int]] = {}  # most episodes have the same sequence of modules
    places: list[int] = []
    for item in batch:
        own = known.get(item.modules)
        if own is None:
            seen: Counter[str] = Counter()
            own = known[item.modules] = []
            for module in item.modules:
                own.append(kinds.setdefault((module, seen[module]), len(kinds)))
                seen[module] += 1
        places += own
    labels = groups[episode] * max(len(kinds), 1) + np.array(places, dtype=np.int64)
    slot = np.unique(labels, return_inverse=True)[1].astype(np.int64)
    last = np.append(episode[1:] != episode[:-1], True) if episode.size else np.zeros(0, dtype=bool)
    return _Turns(episode, [module for item in batch for module in item.modules], slot, last)


def _write(episodes: Sequence[Episode], rewards: Floats, values: Floats, per_turn: Floats) -> None:
    trained, shares = (~np.isnan(per_turn)).tolist(), np.nan_to_num(per_turn).tolist()
    position = 0
    for episode, reward, advantage in zip(episodes, rewards.tolist(), values.tolist(), strict=False):
        episode.reward = None if reward != reward else reward  # NaN
        episode.advantage = advantage
        for turn in episode.turns:
            turn.advantage = shares[position]
            turn.trainable = turn.trainable and trained[position]
            position += 1


def _nanmean(values: Floats) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")

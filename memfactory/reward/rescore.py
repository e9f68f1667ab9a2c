"""Other rewards on episodes that are already there: what would have changed, without a model.

The stored episodes are measured and compared as in training, step by step and group by group, and set against the
rewards and advantages they were stored with. The run's own files are only read; what comes out goes to
``rescored/NAME/`` below it.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from memfactory.episode import Episode
from memfactory.errors import DataError, RecipeErrors
from memfactory.recipe import Recipe, apply_overrides, read_yaml, schema_errors
from memfactory.reward import statistics
from memfactory.reward.advantage import GroupState
from memfactory.reward.faults import Faults
from memfactory.reward.system import RewardSystem
from memfactory.reward.table import Floats
from memfactory.runs import RunFolder, episode_from_record

_SECTIONS = ("rewards", "aggregate", "credit", "judge")
"""Parts of a recipe that decide how episodes are scored."""
_TRL_GROUP = 8
"""`num_generations` where a recipe does not say."""


def recipe_for(run: RunFolder, recipe: Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe to score by: the run's own, or `recipe`, which may hold reward sections only.

    Of a file without `model:`, what it leaves out of `rewards`, `aggregate`, `credit` and `judge` is the run's.

    Raises:
        RecipeErrors: it is wrong.
        DataError: `run` is no run folder.
    """
    data = run.read_recipe()
    if recipe is not None:
        other = read_yaml(recipe)
        data = other if "model" in other else {**data, **other}
    checked, errors = schema_errors(apply_overrides(data, list(overrides)))
    if checked is None:
        raise RecipeErrors(str(recipe or run.recipe_file), errors)
    return checked


@dataclass(slots=True)
class _Stored:
    """What an episode of the file was scored with."""

    step: int
    split: str
    scores: dict[str, float | None]
    reward: float | None
    advantage: float


@dataclass
class Change:
    """A mean before and after; None where there was none."""

    before: float | None
    after: float | None


@dataclass
class Rescored:
    """What other rewards make of the episodes of a run."""

    episodes: list[Episode]
    """With the new scores, rewards and advantages."""
    stored: list[_Stored]
    dimensions: dict[str, Change]
    """Mean score of every dimension of either recipe."""
    reward: Change
    rank_correlation: float | None
    """Spearman's, of old and new rewards over the episodes that have both."""
    pairs_turned: float | None
    """Share of pairs inside a group whose order is reversed, of those with an order in both."""
    groups: int = 0
    """Complete groups; what follows is about them alone."""
    best_changed: int = 0
    """Groups in which no episode is best by both."""
    sign_flips: int = 0
    """Episodes whose advantage changes its sign."""
    compared: int = 0
    """Episodes in complete groups."""
    dead: Change = field(default_factory=lambda: Change(None, None))
    """Shares of groups that teach nothing."""
    incomplete: list[str] = field(default_factory=list)
    """Groups of which the file holds only a part, with step and counts."""
    faults: Faults = field(default_factory=Faults)
    bounds: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Smallest and largest transformed score of each dimension: what `min_max_mean` takes as `statistics`."""

    def summary(self) -> dict[str, Any]:
        """All numbers as plain data."""
        left_out = ("episodes", "stored", "faults", "bounds")
        numbers = {key: getattr(self, key) for key in self.__dataclass_fields__ if key not in left_out}
        numbers["dimensions"] = {name: asdict(change) for name, change in self.dimensions.items()}
        numbers["reward"], numbers["dead"] = asdict(self.reward), asdict(self.dead)
        bounds = {name: list(pair) for name, pair in self.bounds.items()}
        faults = {"count": dict(self.faults.count), "examples": list(self.faults.examples)}
        return {"episodes": len(self.episodes), **numbers, "statistics": bounds, "faults": faults}


def rescore(run: RunFolder, system: RewardSystem, split: str = "train", scale_rewards: str = "group") -> Rescored:
    """Score the stored episodes of `split` with `system`.

    Raises:
        DataError: there are none, or the file is not readable.
    """
    episodes: list[Episode] = []
    stored: list[_Stored] = []
    for record in run.read_episodes(split):  # one at a time: the lines are larger than what is kept of them
        episode = episode_from_record(record)
        scores = {name: score.value for name, score in episode.scores.items()}
        stored.append(_Stored(int(record["step"]), str(record["split"]), scores, episode.reward, episode.advantage))
        episodes.append(episode)
    if not episodes:
        there = sorted({str(record["split"]) for record in run.read_episodes()})
        what = f"{run.episodes_file}: no episodes of split '{split}'"
        raise DataError(what, "", f"--split {' or '.join(there)}" if there else "rollout.log_episodes stores some")
    for episode in episodes:
        episode.scores, episode.reward = {}, None
        for turn in episode.turns:
            turn.scores = {}
    batches: dict[int, list[int]] = defaultdict(list)
    for index, old in enumerate(stored):
        batches[old.step].append(index)
    faults = Faults()
    states: dict[tuple[int, str], GroupState] = {}
    for step, members in batches.items():  # one batch each: estimators and correlations look at a batch
        batch = [episodes[index] for index in members]
        own = system.begin().finish(batch)
        faults.include(own)
        assessment = system.assess(batch, own, scale_rewards=scale_rewards)
        names = dict.fromkeys(episode.group for episode in batch)
        states |= {(step, name): state for name, state in zip(names, assessment.advantages.states, strict=True)}

    result = Rescored(
        episodes,
        stored,
        _dimension_changes(episodes, stored),
        Change(_mean(old.reward for old in stored), _mean(episode.reward for episode in episodes)),
        _spearman([old.reward for old in stored], [episode.reward for episode in episodes]),
        None,
        faults=faults,
        bounds=_bounds(system, episodes),
    )
    _compare_groups(result, states, _group_size(run, split, stored, episodes))
    return result


def write(run: RunFolder, name: str, recipe: Recipe, result: Rescored) -> Path:
    """Write ``rescored/NAME/`` with recipe, numbers and one line per episode; what was there is replaced."""
    folder = run.path / "rescored" / name
    folder.mkdir(parents=True, exist_ok=True)
    sections = {key: value for key, value in recipe.dump().items() if key in _SECTIONS}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(sections, sort_keys=False), encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(result.summary(), indent=2) + "\n", encoding="utf-8")
    with (folder / "episodes.jsonl").open("w", encoding="ascii", newline="\n") as stream:
        for episode, old in zip(result.episodes, result.stored, strict=True):
            stream.write(json.dumps(_line(episode, old)) + "\n")
    return folder


def write_statistics(path: Path, bounds: Mapping[str, tuple[float, float]]) -> None:
    """Write `bounds` as the `aggregate:` section of a recipe, for `min_max_mean`."""
    section = {"name": "min_max_mean", "statistics": {name: list(pair) for name, pair in bounds.items()}}
    text = yaml.safe_dump({"aggregate": section}, sort_keys=False, default_flow_style=None)
    path.write_text(text, encoding="utf-8")


def _line(episode: Episode, old: _Stored) -> dict[str, Any]:
    return {
        "step": old.step,
        "split": old.split,
        "id": episode.id,
        "group": episode.group,
        "scores": {name: {"value": s.value, "reason": s.reason} for name, s in episode.scores.items()},
        "reward": episode.reward,
        "advantage": episode.advantage,
        "turn_advantages": [turn.advantage for turn in episode.turns],
        "stored": {"scores": old.scores, "reward": old.reward, "advantage": _finite(old.advantage)},
    }


def _dimension_changes(episodes: Sequence[Episode], stored: Sequence[_Stored]) -> dict[str, Change]:
    names = dict.fromkeys([name for old in stored for name in old.scores] + [n for e in episodes for n in e.scores])
    return {
        name: Change(
            _mean(old.scores.get(name) for old in stored),
            _mean(e.scores[name].value if name in e.scores else None for e in episodes),
        )
        for name in names
    }


def _bounds(system: RewardSystem, episodes: Sequence[Episode]) -> dict[str, tuple[float, float]]:
    bounds: dict[str, tuple[float, float]] = {}
    for weighted in system.dimensions:
        own, name = weighted.dimension, weighted.name
        holders = [turn.scores for e in episodes for turn in e.turns] if own.per_turn else [e.scores for e in episodes]
        known = [scores[name].value for scores in holders if name in scores]
        values = weighted.transformed(np.array([value for value in known if value is not None], dtype=np.float64))
        if values.size:
            bounds[name] = (float(values.min()), float(values.max()))
    return bounds


def _group_size(run: RunFolder, split: str, stored: Sequence[_Stored], episodes: Sequence[Episode]) -> int:
    """Episodes that a group of the run had: as its recipe says, or in an evaluation the largest there is."""
    counts: dict[tuple[int, str], int] = defaultdict(int)
    for old, episode in zip(stored, episodes, strict=True):
        counts[old.step, episode.group] += 1
    if split != "train":
        return max(counts.values())
    train = run.read_recipe().get("train") or {}
    return int(train.get("num_generations", _TRL_GROUP))


def _compare_groups(result: Rescored, states: Mapping[tuple[int, str], GroupState], size: int) -> None:
    members: dict[tuple[int, str], list[int]] = defaultdict(list)
    for index, (old, episode) in enumerate(zip(result.stored, result.episodes, strict=True)):
        members[old.step, episode.group].append(index)
    turned = ordered = dead_before = dead_after = 0
    for key, own in members.items():
        before = np.array([result.stored[i].reward for i in own], dtype=np.float64)
        after = np.array([result.episodes[i].reward for i in own], dtype=np.float64)
        reversed_, both = _turned(before, after)
        turned, ordered = turned + reversed_, ordered + both
        if len(own) < size:
            result.incomplete.append(f"step {key[0]}, {key[1]}: {len(own)} of {size}")
            continue
        was: Floats = np.nan_to_num(np.array([result.stored[i].advantage for i in own]))
        new = np.array([result.episodes[i].advantage for i in own])
        result.groups += 1
        result.compared += len(own)
        result.sign_flips += int((was * new < 0).sum())
        best = set(_best(before)), set(_best(after))
        result.best_changed += all(best) and not best[0] & best[1]
        dead_before += not was.any()
        dead_after += states[key] is not GroupState.SIGNAL
    result.pairs_turned = turned / ordered if ordered else None
    if result.groups:
        result.dead = Change(dead_before / result.groups, dead_after / result.groups)


def _turned(before: Floats, after: Floats) -> tuple[int, int]:
    """Pairs in reversed order, and pairs that have an order both times."""
    i, j = np.triu_indices(len(before), 1)
    with np.errstate(invalid="ignore"):
        product = np.sign(before[i] - before[j]) * np.sign(after[i] - after[j])
    return int((product < 0).sum()), int((np.abs(np.nan_to_num(product)) > 0).sum())


def _best(rewards: Floats) -> list[int]:
    if np.isnan(rewards).all():
        return []
    return [int(index) for index in np.flatnonzero(rewards >= np.nanmax(rewards) - 1e-12)]


def _spearman(before: Iterable[float | None], after: Iterable[float | None]) -> float | None:
    """Correlation of ranks, ties at their mean rank; None where one side is constant."""
    old, new = np.array(list(before), dtype=np.float64), np.array(list(after), dtype=np.float64)
    known = np.isfinite(old) & np.isfinite(new)
    if known.sum() < 2:
        return None
    ranks = list(statistics.ranks(np.stack([old[known], new[known]], axis=1)).T)
    if any(np.ptp(rank) == 0 for rank in ranks):
        return None
    first, second = (rank - rank.mean() for rank in ranks)
    return float(first @ second / np.sqrt((first @ first) * (second @ second)))


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

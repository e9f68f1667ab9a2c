"""A row of the table: one candidate on one suite, drawn in one way."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from memfactory.episode import Episode, Task
from memfactory.evaluate.retention import capture_and_retention
from memfactory.evaluate.statistics import best_of, interval, kappa, levels, paired_difference
from memfactory.policy.base import Sampling
from memfactory.reward.faults import Faults, whose
from memfactory.reward.measure import measure
from memfactory.reward.system import RewardSystem


@dataclass(frozen=True)
class Measured:
    """Tasks, and what is measured on them."""

    name: str
    tasks: Sequence[Task]
    rewards: RewardSystem
    metric: str
    """The dimension of `rewards` that candidates are compared by."""
    differs: str = ""
    """How this differs from what is published under the name."""
    judge: str = ""
    """The dimension that is a judge's verdict on the same answers; empty where none is asked."""


@dataclass(frozen=True)
class Mode:
    """How tokens are drawn."""

    name: str
    """``sampled`` or ``greedy``."""
    sampling: Sampling
    samples: int = 1
    """Episodes for each task."""


@dataclass
class Row:
    """What one candidate came to on one suite. Means are over questions; what failed is in none of them."""

    suite: str
    candidate: str
    mode: str
    """``sampled`` or ``greedy``."""
    tasks: int
    episodes: int
    failed: int
    """Episodes without a score of the metric."""
    faults: dict[str, int]
    """Measurements that failed, by whose fault it was."""
    metric: str
    mean: float | None
    """avg@k: over questions and samples."""
    low: float | None
    high: float | None
    """The 95 % interval of the mean; tasks are resampled."""
    samples: int
    pass_at: dict[str, float]
    """By k: the best of k samples, in expectation (pass@k where scores are 0 or 1)."""
    tokens: float
    """Prompt and completion tokens of an episode, in the mean."""
    seconds: float
    """Wall time of an episode, in the mean: that of the evaluation, divided among them."""
    peak_context: int
    """Tokens of the longest prompt with its completion: the context an agent needs."""
    dimensions: dict[str, float | None]
    """Mean of everything that was measured, by name."""
    categories: dict[str, float]
    """Mean of the metric by `Probe.category`, as the dataset numbers it."""
    judge: dict[str, float | None] = field(default_factory=dict)
    """``mean`` of its verdicts, ``failed``: episodes without one, ``disagree``: share of episodes where verdict and
    metric are on different sides of 1/2, ``kappa``: Cohen's. Empty where no judge was asked."""
    failures: dict[str, int] = field(default_factory=dict)
    """The `failed` episodes by whose fault it was."""
    reason: str = ""
    """Why there is no mean; empty where there is one."""
    difference: float | None = None
    """Mean of this candidate's score less the first one's, over the tasks both have; None for the first."""
    difference_low: float | None = None
    difference_high: float | None = None
    by_task: dict[str, float] = field(default_factory=dict)
    """Score of each task, mean over its samples; not written."""
    weights: dict[str, int] = field(default_factory=dict)
    """Questions of each task, by which they count in the mean; not written."""
    bounds: tuple[float, float] | None = None
    """Lowest and highest score of the metric, where both are finite; not written."""
    against: dict[str, float] | None = None
    """Score of each task by the first candidate on the same questions, where this one was asked fewer; not written."""

    def record(self) -> dict[str, Any]:
        """As JSON holds it."""
        told = asdict(replace(self, by_task={}, weights={}, against=None))
        return {name: value for name, value in told.items() if name not in _NOT_WRITTEN}

    def untell(self, reason: str) -> None:
        """Leave out what is concluded from the scores: they are too few, or of other tasks than those asked for."""
        self.reason = reason
        self.mean = self.low = self.high = None
        self.pass_at, self.categories, self.by_task, self.judge = {}, {}, {}, {}
        self.dimensions = dict.fromkeys(self.dimensions)


_NOT_WRITTEN = ("by_task", "weights", "bounds", "against")


def row_of(
    candidate: str, suite: Measured, mode: Mode, episodes: Sequence[Episode], faults: Faults, seconds: Sequence[float]
) -> Row:
    """The row of `episodes`, which are measured; ``mode.samples`` of each task stand behind each other."""
    scores: dict[str, list[float]] = defaultdict(list)
    weights: dict[str, int] = {}
    for episode in episodes:
        value = _score(episode, suite.metric)
        if value is not None:
            scores[episode.task.id].append(value)
            weights[episode.task.id] = max(1, len(episode.task.probes))
    by_task = {task: math.fsum(values) / len(values) for task, values in scores.items()}
    bounds = _bounds(suite)
    found = interval(list(by_task.values()), bounds, list(weights.values()))
    ran = [episode for episode in episodes if not episode.failed]
    unscored = [episode for episode in episodes if _score(episode, suite.metric) is None]
    failures = Counter(whose(episode) or faults.fault_of(suite.metric) for episode in unscored)
    sizes = [[sum(turn.tokens) for turn in episode.turns] for episode in ran]
    dimensions = {name: _mean(_score(episode, name) for episode in ran) for name in _names(suite)}
    capture, retain = capture_and_retention(ran)
    kept = {"memory.capture": capture, "memory.retention": retain}
    return Row(
        suite=suite.name,
        candidate=candidate,
        mode=mode.name,
        tasks=len(suite.tasks),
        episodes=len(episodes),
        failed=failures.total(),
        faults={str(name): number for name, number in faults.count.items()},
        metric=suite.metric,
        mean=found.mean if found else None,
        low=found.low if found else None,
        high=found.high if found else None,
        samples=mode.samples,
        pass_at=_pass_at(scores, weights, mode.samples),
        tokens=_mean(map(sum, sizes)) or 0.0,
        seconds=_mean(seconds) or 0.0,
        peak_context=max((max(own, default=0) for own in sizes), default=0),
        dimensions=dimensions | {name: value for name, value in kept.items() if value is not None},
        categories=_by_category(ran, suite),
        judge=_judged(ran, suite),
        failures=dict(failures),
        by_task=by_task,
        weights=weights,
        bounds=bounds,
    )


def compare(rows: Sequence[Row]) -> None:
    """Set the differences to the first candidate that stands in `rows` for the same suite and mode."""
    first: dict[tuple[str, str], Row] = {}
    for row in rows:
        base = first.setdefault((row.suite, row.mode), row)
        if base is row:
            continue
        against = base.by_task if row.against is None else row.against
        found = paired_difference(row.by_task, against, row.weights, row.bounds)
        if found is not None:
            row.difference, row.difference_low, row.difference_high = found.mean, found.low, found.high


def scores_on(suite: Measured, episodes: Sequence[Episode]) -> dict[str, float]:
    """Score of each task, mean over its samples, as if only the questions of `suite` had been asked.

    Args:
        episodes: of the same tasks, with at least those questions. Empty where the metric is a judge's: each of its
            verdicts costs.
    """
    metric = [w for w in suite.rewards.dimensions if w.name == suite.metric and not w.dimension.asynchronous]
    tasks = {task.id: task for task in suite.tasks}
    fewer = []
    for episode in episodes if metric else ():
        task = tasks.get(episode.task.id)
        if task is not None and not episode.failed:
            answers = [answer for answer in episode.answers if answer.probe in task.probes]
            fewer.append(Episode(task, episode.turns, answers, episode.memory))
    measure(fewer, metric)
    scores: dict[str, list[float]] = defaultdict(list)
    for episode in fewer:
        value = _score(episode, suite.metric)
        if value is not None:
            scores[episode.task.id].append(value)
    return {task: math.fsum(values) / len(values) for task, values in scores.items()}


def _names(suite: Measured) -> list[str]:
    return [weighted.name for weighted in suite.rewards.dimensions]


def _bounds(suite: Measured) -> tuple[float, float] | None:
    for weighted in suite.rewards.dimensions:
        if weighted.name == suite.metric:
            low, high = weighted.dimension.low, weighted.dimension.high
            return (low, high) if math.isfinite(low) and math.isfinite(high) else None
    return None


def _score(episode: Episode, name: str) -> float | None:
    score = episode.scores.get(name)
    return score.value if score is not None else None


def _mean(values: Iterable[float | None]) -> float | None:
    measured = [value for value in values if value is not None]
    return math.fsum(measured) / len(measured) if measured else None


def _pass_at(scores: dict[str, list[float]], weights: dict[str, int], samples: int) -> dict[str, float]:
    """By k, over the tasks that have k scores."""
    found = {}
    for k in levels(samples) if samples > 1 else ():
        able = [task for task, values in scores.items() if len(values) >= k]
        if able:
            total = sum(weights[task] for task in able)
            found[str(k)] = math.fsum(weights[task] * best_of(scores[task], k) for task in able) / total
    return found


def _by_category(episodes: Sequence[Episode], suite: Measured) -> dict[str, float]:
    """Mean of the metric over the questions of each category; empty where questions have none."""
    values: dict[str, list[float]] = defaultdict(list)
    alone: list[Episode] = []
    for episode in episodes:
        if not any(probe.category for probe in episode.task.probes):
            continue
        if len(episode.answers) == 1:
            value = _score(episode, suite.metric)
            if value is not None:
                values[episode.task.probes[0].category].append(value)
        else:
            alone += [_one_question(episode, place) for place in range(len(episode.answers))]
    metric = [w for w in suite.rewards.dimensions if w.name == suite.metric and not w.dimension.asynchronous]
    if alone and metric:
        measure(alone, metric)
        for episode in alone:
            value = _score(episode, suite.metric)
            if value is not None:
                values[episode.task.probes[0].category].append(value)
    return {category: math.fsum(own) / len(own) for category, own in sorted(values.items())}


def _one_question(episode: Episode, place: int) -> Episode:
    """`episode` as if it had been asked one of its questions alone."""
    task, answer = episode.task, episode.answers[place]
    alone = Task(f"{task.id}/{place}", task.stream, (answer.probe,), task.metadata)
    return Episode(alone, episode.turns, [answer], episode.memory)


def _judged(episodes: Sequence[Episode], suite: Measured) -> dict[str, float | None]:
    if not suite.judge:
        return {}
    pairs = [(_score(episode, suite.metric), _score(episode, suite.judge)) for episode in episodes]
    both = [(rule >= 0.5, verdict >= 0.5) for rule, verdict in pairs if rule is not None and verdict is not None]
    return {
        "mean": _mean(verdict for _, verdict in pairs),
        "failed": float(sum(verdict is None for _, verdict in pairs)),
        "disagree": _mean(float(rule != verdict) for rule, verdict in both),
        "kappa": kappa([rule for rule, _ in both], [verdict for _, verdict in both]),
    }

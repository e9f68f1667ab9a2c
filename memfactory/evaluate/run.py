"""Evaluating an agent on held-out tasks: the same `Agent.run` as in training."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Protocol

from rich.progress import Progress, TaskID

from memfactory.agents.base import Agent
from memfactory.agents.running import run_episodes
from memfactory.episode import Episode, Task
from memfactory.evaluate.retention import capture_and_retention
from memfactory.policy.base import Sampling
from memfactory.policy.routing import RoutedPolicy
from memfactory.policy.transformers_backend import TransformersPolicy
from memfactory.reward.faults import Faults, not_run, whose
from memfactory.reward.matching import exact_match
from memfactory.reward.measure import Measuring
from memfactory.reward.system import RewardSystem
from memfactory.runs import RunFolder


@dataclass(frozen=True)
class EvalOptions:
    """How to evaluate. Field meanings are those of the recipe's `eval:` section."""

    rewards: RewardSystem
    metric: str = "answer.exact_match"
    """Name of the dimension reported as accuracy; it must be among the dimensions of `rewards`."""
    samples: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    greedy: bool = True
    seed: int = 0
    max_failed_share: float = 1.0
    """Share of episodes that may fail for a store or an endpoint before the evaluation stops; 1 never does."""
    concurrent: int = 2048
    """Episodes in flight at once; bounds host memory, not results."""


class Share(Protocol):
    """The processes that evaluate together."""

    own: int
    """Number of this one."""
    count: int

    def gather(self, values: list[Any]) -> list[Any]:
        """The lists of all processes, one behind the other."""
        ...


@dataclass
class EvalResult:
    """What an evaluation measured."""

    metrics: dict[str, float] = field(default_factory=dict)
    """``sampled_em``, ``greedy_em``: share of right answers; ``*_em/CATEGORY``: exact matches by `Probe.category`, as
    the dataset numbers it. ``n``: tasks. ``*_failed``: episodes that could not be scored and are in no mean.
    ``*_capture``, ``*_retain``: see :mod:`memfactory.evaluate.retention`; absent where tasks carry no evidence."""
    episodes: dict[str, list[Episode]] = field(default_factory=dict)
    """By split name: ``eval`` (sampled) and ``eval_greedy``."""
    faults: Faults = field(default_factory=Faults)
    """Measurements that failed; their episodes are in no mean."""

    def log(self, run: RunFolder, step: int, episodes: int = 32) -> None:
        """Write metrics and the first `episodes` episodes of each kind to the run folder."""
        run.log_metrics(step, dict(self.metrics), phase="eval")
        for split, all_of_them in self.episodes.items():
            run.log_episodes(step, split, all_of_them[:episodes], tokens=False)


def evaluate_agent(
    agent: Agent,
    tasks: Sequence[Task],
    policy: TransformersPolicy | RoutedPolicy,
    options: EvalOptions,
    progress: Progress | None = None,
    share: Share | None = None,
) -> EvalResult:
    """Run `agent` on `tasks`, sampled and, if asked, greedy, and score every episode.

    With `share`, each process works on a part of the tasks, and all have the whole result: that of one process,
    because every episode draws from numbers of its own (:mod:`memfactory.draws`).

    The policy's sampling and random state are as before when this returns, so evaluating in the middle
    of a training run changes nothing in it.

    Raises:
        ServiceError, StoreError: more than `options.max_failed_share` of the episodes could not be run to their end:
            a mean over the rest would be of other tasks than those asked for.
    """
    kinds = [("sampled", "eval", Sampling(options.temperature, options.top_p), options.samples)]
    if options.greedy:
        kinds.append(("greedy", "eval_greedy", Sampling(0.0), 1))
    result = EvalResult({"n": float(len(tasks))})
    for kind, split, sampling, samples in kinds:
        with policy.drawing(sampling, options.seed):
            for module in getattr(agent, "modules", ()):
                if hasattr(module, "seed"):  # draws of its own (a reranker); training seeds it anew at every rollout
                    module.seed(options.seed)
            mine = tasks[share.own :: share.count] if share is not None else tasks
            runs = [task for task in mine for _ in range(samples)]
            names = [episode_name(task, sample) for task in mine for sample in range(samples)]
            bar = progress.add_task(f"evaluate ({kind})", total=len(runs)) if progress is not None else None
            episodes: list[Episode] = []
            faults = Faults()
            for start in range(0, len(runs), options.concurrent):
                measuring = options.rewards.begin()

                def on_done(episode: Episode, measuring: Measuring = measuring, bar: TaskID | None = bar) -> None:
                    measuring.submit(episode)
                    if progress is not None and bar is not None:
                        progress.advance(bar)

                end = start + options.concurrent
                own = run_episodes(agent, runs[start:end], policy, on_done, names=names[start:end])
                faults.include(measuring.finish(own))
                episodes += own
            if share is not None:
                episodes, faults = _everyones(episodes, faults, share, samples)
            failed = Counter(whose(episode) for episode in episodes if episode.failed)
            if failed.total() > options.max_failed_share * len(episodes):
                raise not_run(len(episodes), failed, faults.examples)
            options.rewards.reward(episodes)
            for number, episode in enumerate(episodes):
                episode.id = f"{split}/{number}"
            result.episodes[split] = episodes
            result.faults.include(faults)
            result.metrics |= _summarise(kind, episodes, options)
            result.metrics |= {f"{kind}_faults/{name}": float(number) for name, number in faults.count.items()}
            judge = options.rewards.judge.metrics() if options.rewards.judge is not None else {}
            if judge.get("asked"):
                result.metrics |= {f"{kind}_judge/{name}": value for name, value in judge.items()}
    return result


def episode_name(task: Task, sample: int) -> str:
    """Of the episode that is the `sample`-th of `task`: what its draws depend on, beside the seed."""
    return f"{task.id}#{sample}"


def _everyones(episodes: list[Episode], faults: Faults, share: Share, samples: int) -> tuple[list[Episode], Faults]:
    """Episodes of all processes in the order of tasks, and what failed in any of them."""
    parts: list[tuple[list[Episode], Faults]] = share.gather([(episodes, faults)])
    total = Faults()
    for _, failed in parts:
        total.include(failed)
    by_task = [[own[start : start + samples] for start in range(0, len(own), samples)] for own, _ in parts]
    rounds = zip_longest(*by_task, fillvalue=[])
    return [episode for turn in rounds for group in turn for episode in group], total


def _summarise(kind: str, episodes: Sequence[Episode], options: EvalOptions) -> dict[str, float]:
    values = [v for episode in episodes if (v := episode.scores[options.metric].value) is not None]
    metrics = {f"{kind}_em": math.fsum(values) / len(values) if values else float("nan")}
    metrics[f"{kind}_failed"] = float(len(episodes) - len(values))
    for weighted in options.rewards.dimensions:
        if weighted.name != options.metric:
            own = [v for episode in episodes if (v := episode.scores[weighted.name].value) is not None]
            if own:
                metrics[f"{kind}_{weighted.name}"] = math.fsum(own) / len(own)
    metrics |= {f"{kind}_em/{category}": share for category, share in _by_category(episodes).items()}
    capture, retain = capture_and_retention(episodes)
    if capture is not None:
        metrics[f"{kind}_capture"] = capture
    if retain is not None:
        metrics[f"{kind}_retain"] = retain
    return metrics


def _by_category(episodes: Sequence[Episode]) -> dict[str, float]:
    """Share of exact matches among the questions of each `Probe.category`; empty where questions have none."""
    right: dict[str, list[bool]] = {}
    for answer in (answer for episode in episodes for answer in episode.answers):
        if answer.probe.category:
            matched = answer.text is not None and exact_match(answer.text, answer.probe.answers)
            right.setdefault(answer.probe.category, []).append(matched)
    return {category: sum(own) / len(own) for category, own in sorted(right.items())}

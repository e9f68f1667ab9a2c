"""Evaluating candidates on suites: run what is not there yet, measure everything, make the table."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any, Protocol

from rich.progress import Progress

from memfactory.agents.base import Agent
from memfactory.agents.baselines import BaselineAgent
from memfactory.agents.running import run_episodes
from memfactory.episode import Episode, Task
from memfactory.errors import MemFactoryError
from memfactory.evaluate.candidates import Candidate
from memfactory.evaluate.folder import EvalFolder, from_record, key_of, to_record
from memfactory.evaluate.rows import Measured, Mode, Row, compare, row_of
from memfactory.evaluate.run import episode_name
from memfactory.policy.routing import RoutedPolicy
from memfactory.reward.faults import not_run, whose
from memfactory.runs import Record


@dataclass(frozen=True)
class Plan:
    """An evaluation, checked and ready to run."""

    agent: Agent
    suites: Sequence[Measured]
    candidates: Sequence[Candidate]
    """The first is what the others are compared with."""
    modes: Sequence[Mode]
    seed: int
    asked: Any
    """What of the recipe decides what an episode is: the agent and who answers for its modules. JSON can hold it."""
    concurrent: int = 2048
    """Episodes in flight at once; bounds host memory, not results."""
    max_failed_share: float = 0.25
    """Share of the episodes of one candidate on one suite that may fail before the evaluation stops."""


@dataclass(frozen=True)
class Run:
    """One episode that is wanted."""

    suite: Measured
    mode: Mode
    task: Task
    sample: int
    key: str


@dataclass
class Evaluation:
    """What was measured."""

    rows: list[Row] = field(default_factory=list)
    records: dict[str, Record] = field(default_factory=dict)
    """Lines of ``episodes.jsonl`` by key: those that were there, and those of now with their scores."""
    ran: int = 0
    """Episodes that were run now; the others were there already."""
    examples: list[str] = field(default_factory=list)
    """Of measurements that failed, in words."""


class Load(Protocol):
    """Loads a candidate's model when there is something to run with it."""

    def __call__(self, candidate: Candidate) -> RoutedPolicy: ...


def evaluate(plan: Plan, load: Load, folder: EvalFolder, progress: Progress) -> Evaluation:
    """Run `plan`: episodes go to `folder` as they are finished, and those that are there already are not run again.

    Raises:
        MemFactoryError: more than `plan.max_failed_share` of the episodes of a candidate on a suite failed: a mean
            over the rest would be of other tasks than those asked for.
    """
    cached = folder.cached()
    result = Evaluation(records=dict(cached))
    for candidate in plan.candidates:
        runs = list(_runs(plan, candidate))
        missing = [run for run in runs if run.key not in cached]
        fresh: dict[str, Episode] = {}
        if missing:
            policy = load(candidate)
            try:
                fresh = _run(plan, candidate, policy, missing, folder, result.records, progress)
            finally:
                policy.close()
            result.ran += len(missing)
        for suite in plan.suites:
            for mode in plan.modes:
                own = [run for run in runs if run.suite is suite and run.mode is mode]
                episodes = [fresh.get(run.key) or from_record(cached[run.key], run.task) for run in own]
                faults = suite.rewards.begin().finish(episodes)
                failed = Counter(whose(episode) for episode in episodes if episode.failed)
                if failed.total() > plan.max_failed_share * len(episodes):
                    raise not_run(len(episodes), failed, faults.examples)
                suite.rewards.reward(episodes)
                result.examples += faults.examples
                seconds = [result.records[run.key]["seconds"] for run in own]
                result.rows.append(row_of(candidate.name, suite, mode, episodes, faults, seconds))
                for run, episode, spent in zip(own, episodes, seconds, strict=True):
                    result.records[run.key] = to_record(episode, **_place(run, candidate, spent))
    compare(result.rows)
    return result


def _runs(plan: Plan, candidate: Candidate) -> Iterator[Run]:
    """All episodes of `candidate`, in the order of suites, modes and tasks."""
    for suite in plan.suites:
        content = {id(task): key_of(task) for task in suite.tasks}
        for mode in plan.modes:
            asked = [candidate.fingerprint, candidate.baseline, plan.asked, astuple(mode.sampling), plan.seed]
            settings = json.dumps(asked, sort_keys=True)
            for task in suite.tasks:
                for sample in range(mode.samples):
                    told = f"{content[id(task)]}/{settings}/{sample}"
                    yield Run(suite, mode, task, sample, hashlib.sha256(told.encode()).hexdigest()[:20])


def _run(
    plan: Plan,
    candidate: Candidate,
    policy: RoutedPolicy,
    runs: Sequence[Run],
    folder: EvalFolder,
    records: dict[str, Record],
    progress: Progress,
) -> dict[str, Episode]:
    """Episodes of `runs` by key. Tasks, suites and samples that draw in the same way are run together."""
    agent = BaselineAgent(plan.agent, candidate.baseline) if candidate.baseline is not None else plan.agent
    done: dict[str, Episode] = {}
    for mode in plan.modes:
        wanted = [run for run in runs if run.mode is mode]
        if not wanted:
            continue
        bar = progress.add_task(f"{candidate.name} ({mode.name})", total=len(wanted))
        with policy.drawing(mode.sampling, plan.seed):
            for module in getattr(agent, "modules", ()):
                if hasattr(module, "seed"):  # draws of its own (a reranker); training seeds it anew at every rollout
                    module.seed(plan.seed)
            for start in range(0, len(wanted), plan.concurrent):
                block = wanted[start : start + plan.concurrent]
                names = [episode_name(run.task, run.sample) for run in block]
                by_name = {(id(run.task), name): run for run, name in zip(block, names, strict=True)}
                clock = _Clock()

                def on_done(
                    episode: Episode, by_name: dict[Any, Run] = by_name, clock: _Clock = clock, bar: Any = bar
                ) -> None:
                    run = by_name[id(episode.task), episode.id]
                    records[run.key] = to_record(episode, **_place(run, candidate, clock.lap()))
                    done[run.key] = episode
                    if not episode.failed:  # it is tried again the next time
                        folder.append(records[run.key])
                    progress.advance(bar)

                tasks = [run.task for run in block]
                run_episodes(agent, tasks, policy, on_done, names=names, tolerated=(MemFactoryError,))
                policy.confirm()
    return done


class _Clock:
    """Seconds between one finished episode and the next: together, those of the whole."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def lap(self) -> float:
        before, self.last = self.last, time.monotonic()
        return round(self.last - before, 4)


def _place(run: Run, candidate: Candidate, seconds: float) -> dict[str, Any]:
    return {
        "split": run.suite.name,
        "candidate": candidate.name,
        "mode": run.mode.name,
        "sample": run.sample,
        "key": run.key,
        "seconds": seconds,
    }

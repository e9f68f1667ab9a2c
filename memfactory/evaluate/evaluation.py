"""Evaluating candidates on suites: run what is not there yet, measure everything, make the table."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass, field, replace
from itertools import zip_longest
from typing import Any, Protocol

from rich.progress import Progress

from memfactory.agents.base import Agent
from memfactory.agents.baselines import Baseline, BaselineAgent, answerable
from memfactory.agents.running import blocking, episodes_of
from memfactory.episode import Episode, Task
from memfactory.errors import MemFactoryError
from memfactory.evaluate.candidates import Candidate
from memfactory.evaluate.failures import by_fault, too_many
from memfactory.evaluate.folder import EvalFolder, Place, from_record, key_of, place_of, to_record
from memfactory.evaluate.rows import Measured, Mode, Row, compare, row_of, scores_on
from memfactory.evaluate.run import episode_name
from memfactory.loops import together
from memfactory.policy.routing import RoutedPolicy
from memfactory.reward.faults import UNMEASURED, not_run
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
    """What else decides what an episode is: the agent, who answers for its modules, the engine. JSON can hold it."""
    concurrent: int = 2048
    """Episodes in flight at once; bounds host memory, not results."""
    room: Callable[[], int] = lambda: 1
    """How many models may be asked at the same time from now on. Called before some are loaded."""
    max_failed_share: float = 0.25
    """Share of the episodes of one candidate on one suite that may fail; with more, its row tells no mean."""
    fresh: bool = False
    """Run everything, whatever there is already."""


@dataclass(frozen=True)
class Run:
    """One episode that is wanted."""

    candidate: Candidate
    suite: Measured
    mode: Mode
    task: Task
    sample: int
    key: str


@dataclass
class Evaluation:
    """What was measured."""

    rows: list[Row] = field(default_factory=list)
    records: dict[Place, Record] = field(default_factory=dict)
    """Lines of ``episodes.jsonl``: those that were there, and those of now with their scores."""
    ran: int = 0
    """Episodes that were run now; the others were there already."""
    examples: list[str] = field(default_factory=list)
    """Of measurements that failed, in words, each kind once."""
    notes: list[str] = field(default_factory=list)
    """Baselines that were left out of a suite, or asked fewer questions, and why."""
    failure: MemFactoryError | None = None
    """Of the first row without a mean because too much failed: what is to be raised once everything is written."""


class Load(Protocol):
    """Loads a candidate's model when there is something to run with it.

    It is the one at `place` among so many that are asked at the same time.
    """

    def __call__(self, candidate: Candidate, *, place: int, among: int) -> RoutedPolicy: ...


def evaluate(plan: Plan, load: Load, folder: EvalFolder, progress: Progress) -> Evaluation:
    """Run `plan`: episodes go to `folder` as they are finished, and those that are there already are not run again.

    Where more than `plan.max_failed_share` of a candidate's episodes on a suite failed, its row tells no mean, because
    that would be of other tasks than those asked for; the other rows are as they would be without it.
    """
    cached = folder.cached()
    result = Evaluation(records=dict(cached))
    known = {} if plan.fresh else {record["key"]: record for record in cached.values()}
    compared: dict[tuple[str, str], list[Run]] = {}
    asked = []
    missing: dict[str, Run] = {}  # of equal ones, the first candidate's
    for candidate in plan.candidates:
        suites = _suites(plan, candidate, result.notes)
        runs = list(_runs(plan, candidate, suites))
        asked.append((candidate, suites, runs))
        for run in runs:
            if run.key not in known:
                missing.setdefault(run.key, run)
    result.ran = len(missing)
    waiting: dict[Candidate, list[Run]] = {}  # by what is to be loaded, in the order of candidates
    for run in missing.values():
        waiting.setdefault(_loaded(run.candidate), []).append(run)
    fresh: dict[str, Episode] = {}
    for candidate, suites, runs in asked:
        if _loaded(candidate) in waiting:
            now = list(waiting)[: plan.room() if len(waiting) > 1 else 1]
            with ExitStack() as stack:
                loaded = []
                for place, model in enumerate(now):
                    policy = load(model, place=place, among=len(now))
                    stack.callback(policy.close)
                    loaded.append((policy, waiting.pop(model)))
                fresh |= _run(plan, loaded, folder, known, progress)
        for suite in suites:
            for mode in plan.modes:
                own = [run for run in runs if run.suite is suite and run.mode is mode]
                # an episode that stands in several places is measured in each on a copy of its own
                episodes = [
                    fresh.pop(run.key) if run.key in fresh else from_record(known[run.key], run.task) for run in own
                ]
                faults = suite.rewards.begin().finish(episodes)
                suite.rewards.reward(episodes)
                for told in faults.examples:
                    if not any(_alike(told, other) for other in result.examples):
                        result.examples.append(told)
                seconds = [known[run.key]["seconds"] for run in own]
                row = row_of(candidate.name, suite, mode, episodes, faults, seconds)
                base = compared.setdefault((suite.name, mode.name), own)
                if suite not in plan.suites:
                    row.against = scores_on(suite, [from_record(known[run.key], run.task) for run in base])
                _check_failures(plan, row, mode, faults.examples, result)
                result.rows.append(row)
                for run, episode, spent in zip(own, episodes, seconds, strict=True):
                    record = to_record(episode, **_place(run, spent))
                    result.records[place_of(record)] = record
    compare(result.rows)
    return result


def _alike(told: str, other: str) -> bool:
    """Whether two examples say the same but for numbers: of attempts, seconds, tasks."""
    return re.sub(r"\d+", "0", told) == re.sub(r"\d+", "0", other)


def _check_failures(plan: Plan, row: Row, mode: Mode, examples: Sequence[str], result: Evaluation) -> None:
    """Leave the mean of `row` out where it would be of too few tasks."""
    lost = Counter({fault: number for fault, number in row.failures.items() if fault != UNMEASURED})
    if not too_many(lost.total(), row.episodes, plan.max_failed_share, mode.samples):
        return
    row.untell(f"{lost.total()} of {row.episodes} episodes failed: {by_fault(lost)}")
    if result.failure is None:
        failure = not_run(row.episodes, lost, examples)
        where = f"{row.suite}, {row.candidate} ({row.mode})"
        result.failure = type(failure)(f"{where}: {failure.what}", failure.why, failure.fix)


def _suites(plan: Plan, candidate: Candidate, notes: list[str]) -> list[Measured]:
    """What `candidate` is measured on. A baseline is asked what it has something to answer from; `notes` tell what
    is left out."""
    if candidate.baseline is None:
        return list(plan.suites)
    found = []
    for suite in plan.suites:
        tasks = answerable(candidate.baseline, suite.tasks)
        asked, left = (sum(len(task.probes) for task in of) for of in (suite.tasks, tasks))
        lacks = "the data marks no evidence" if candidate.baseline is Baseline.ORACLE else "there is nothing to read"
        if not tasks:
            notes.append(f"{suite.name}: {candidate.name} is left out, {lacks}")
            continue
        if left < asked:
            notes.append(f"{suite.name}: {candidate.name} is of {left} of {asked} questions, {lacks} for the others")
        found.append(suite if left == asked else replace(suite, tasks=tasks))
    return found


def _runs(plan: Plan, candidate: Candidate, suites: Sequence[Measured]) -> Iterator[Run]:
    """All episodes of `candidate`, in the order of suites, modes and tasks."""
    for suite in suites:
        content = {id(task): _content(task, candidate) for task in suite.tasks}
        for mode in plan.modes:
            weights = [candidate.fingerprint, candidate.under]
            asked = [weights, candidate.baseline, plan.asked, astuple(mode.sampling), plan.seed]
            settings = json.dumps(asked, sort_keys=True)
            for task in suite.tasks:
                for sample in range(mode.samples):
                    told = f"{content[id(task)]}/{settings}/{sample}"
                    yield Run(candidate, suite, mode, task, sample, hashlib.sha256(told.encode()).hexdigest()[:20])


def _content(task: Task, candidate: Candidate) -> str:
    """What of `task` decides an episode; only one baseline is shown the evidence."""
    if candidate.baseline is not Baseline.ORACLE:
        return key_of(task)
    return key_of(task, [[evidence.text for evidence in probe.evidence] for probe in task.probes])


def _loaded(candidate: Candidate) -> Candidate:
    """The same for all candidates that what is loaded for one of them answers for: a model and its baselines."""
    return replace(candidate, name="", baseline=None)


def _run(
    plan: Plan,
    models: Sequence[tuple[RoutedPolicy, Sequence[Run]]],
    folder: EvalFolder,
    known: dict[str, Record],
    progress: Progress,
) -> dict[str, Episode]:
    """Episodes by key. Models, their baselines, tasks, suites and samples that draw in the same way are run together.

    Args:
        models: policies, and the runs that each of them answers for.
        known: lines by key; those of the new episodes are added.
    """
    agents: dict[Baseline | None, Agent] = {
        kind: plan.agent if kind is None else BaselineAgent(plan.agent, kind)
        for kind in dict.fromkeys(run.candidate.baseline for _, runs in models for run in runs)
    }
    done: dict[str, Episode] = {}
    for mode in plan.modes:
        own = [[(policy, run) for run in runs if run.mode is mode] for policy, runs in models]
        wanted = [one for turn in zip_longest(*own) for one in turn if one]  # so that a block is of all models
        if not wanted:
            continue
        bars = {
            name: progress.add_task(f"{name} ({mode.name})", total=total)
            for name, total in Counter(run.candidate.name for _, run in wanted).items()
        }
        with ExitStack() as stack:
            for policy, _ in models:
                stack.enter_context(policy.drawing(mode.sampling, plan.seed))
            for module in [module for agent in agents.values() for module in getattr(agent, "modules", ())]:
                if hasattr(module, "seed"):  # draws of its own (a reranker); training seeds it anew at every rollout
                    module.seed(plan.seed)
            for start in range(0, len(wanted), plan.concurrent):
                block, clock = wanted[start : start + plan.concurrent], _Clock()

                def finished(run: Run, episode: Episode, clock: _Clock = clock, bars: dict[str, Any] = bars) -> None:
                    known[run.key] = to_record(episode, **_place(run, clock.lap()))
                    done[run.key] = episode
                    if not episode.failed:  # it is tried again the next time
                        folder.append(known[run.key])
                    progress.advance(bars[run.candidate.name])

                parts = [
                    (policy, agent, [run for one, run in block if one is policy and run.candidate.baseline is kind])
                    for policy, _ in models
                    for kind, agent in agents.items()
                ]
                blocking(lambda parts=parts, finished=finished: _together(parts, finished))  # type: ignore[misc]
                for policy, _ in models:
                    policy.confirm()
    return done


async def _together(
    parts: Sequence[tuple[RoutedPolicy, Agent, Sequence[Run]]], finished: Callable[[Run, Episode], None]
) -> None:
    """Run all of `parts` at the same time; `finished` is called with each episode."""

    async def part(policy: RoutedPolicy, agent: Agent, runs: Sequence[Run]) -> None:
        names = [episode_name(run.task, run.sample) for run in runs]
        by_name = {(id(run.task), name): run for run, name in zip(runs, names, strict=True)}

        def on_done(episode: Episode) -> None:
            finished(by_name[id(episode.task), episode.id], episode)

        tasks = [run.task for run in runs]
        await episodes_of(agent, tasks, policy, on_done, names=names, tolerated=(MemFactoryError,))

    await together(part(policy, agent, runs) for policy, agent, runs in parts if runs)


class _Clock:
    """Seconds between one finished episode and the next: together, those of the whole."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def lap(self) -> float:
        before, self.last = self.last, time.monotonic()
        return round(self.last - before, 4)


def _place(run: Run, seconds: float) -> dict[str, Any]:
    return {
        "split": run.suite.name,
        "candidate": run.candidate.name,
        "mode": run.mode.name,
        "sample": run.sample,
        "key": run.key,
        "seconds": seconds,
    }

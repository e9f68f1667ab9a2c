"""Measuring a batch: every dimension on every episode, whatever single functions do.

A function that raises, hangs, or returns what is no score costs the scores it was asked for and nothing else:
they are None with a reason, and the fault is counted. An episode that could not be run to its end is shown to no
function. Async functions (judges) begin as soon as an episode is
complete, while others are still being generated; the rest is called when all are.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_any
from typing import Any

from memfactory.episode import Episode, Score
from memfactory.reward.background import LOOP
from memfactory.reward.call import Call, calls_of, takes_lists
from memfactory.reward.catalogue import WeightedDimension
from memfactory.reward.dimension import RewardDimension, Scope
from memfactory.reward.faults import Faults

MAX_HANGS = 3
"""Calls of one function that may hang in a batch before the rest of its calls is not made."""
_POLL = 1.0
"""Seconds between looks at an event loop that has work."""

Gather = Callable[[list[Any]], list[Any]]
"""Concatenates the lists of all ranks, e.g. `accelerate.utils.gather_object`."""


class Measuring:
    """The measuring of one batch.

    Args:
        dimensions: what to measure.
    """

    def __init__(self, dimensions: Sequence[WeightedDimension]) -> None:
        self._dimensions = dimensions
        self._early = [w for w in dimensions if w.dimension.asynchronous and not takes_lists(w.dimension)]
        self._lock = threading.Lock()
        self._running: list[tuple[Call, Future[Any]]] = []
        self._seen: set[int] = set()

    def submit(self, episode: Episode) -> None:
        """Begin with what can be measured of one complete `episode`. Returns at once; safe from any thread."""
        with self._lock:
            self._seen.add(id(episode))
            for weighted in self._early if not episode.failed else ():
                for call in calls_of(weighted, [episode]):
                    self._running.append((call, LOOP.start(call.run_async())))

    def finish(self, episodes: Sequence[Episode], gather: Gather | None = None) -> Faults:
        """Measure everything that is left of `episodes` and put the scores on them.

        Args:
            episodes: the batch of this rank.
            gather: where the batch is spread over ranks, so that functions of groups see whole groups.
        """
        faults = Faults()
        for episode in episodes:
            if id(episode) not in self._seen:
                self.submit(episode)
            if episode.failed:
                faults.add_failed(episode)
        ran = [episode for episode in episodes if not episode.failed]
        failed: dict[str, set[int]] = defaultdict(set)

        def store(calls: Sequence[Call]) -> None:
            for call in calls:
                failed[call.weighted.name].update(id(episode) for episode in call.store(faults))

        def call_all(dimensions: Sequence[WeightedDimension], seen: Sequence[Episode]) -> None:
            for weighted in dimensions:
                calls = calls_of(weighted, seen)
                if weighted.dimension.asynchronous:
                    self._running += [(call, LOOP.start(call.run_async())) for call in calls]
                else:
                    _run(calls, weighted.dimension.deadline)
                    store(calls)
            store(self._wait())

        of_groups = [w for w in self._dimensions if w.dimension.scope is Scope.GROUP]
        call_all([w for w in self._dimensions if w not in of_groups and w not in self._early], ran)
        if of_groups:  # last: they may look at the other scores
            call_all(of_groups, _whole_groups(ran, gather) if gather is not None else ran)
        own = {id(episode) for episode in ran}  # whole groups have others' episodes too
        faults.by_dimension = {name: len(which & own) for name, which in failed.items() if which & own}
        for weighted in self._dimensions:
            if weighted.dimension.per_turn:
                for episode in ran:
                    episode.scores[weighted.name] = _mean(weighted, episode)
        names = [weighted.name for weighted in self._dimensions]
        for episode in episodes:
            if episode.failed:
                episode.scores |= {name: _not_run(episode) for name in names}
        for episode in episodes:  # people read scores in the recipe's order
            if list(episode.scores)[-len(names) :] != names:
                episode.scores |= {name: episode.scores.pop(name) for name in names}
        return faults

    def _wait(self) -> list[Call]:
        """Wait for the async calls under way and take their outcomes."""
        pending = {future for _, future in self._running}
        while pending:
            _, pending = wait_for_any(pending, timeout=_POLL)
            limits = [c.weighted.dimension.deadline for c, f in self._running if f in pending]
            patience = max((limit for limit in limits if limit is not None), default=60.0)
            if pending and not LOOP.responds(patience):
                LOOP.abandon()
                break
        for call, future in self._running:
            why = "an async reward function blocks the event loop: use `await`, or make it an ordinary function"
            call.outcome = call.hung(why) if future in pending else future.result()
        calls, self._running = [call for call, _ in self._running], []
        return calls


def measure(episodes: Sequence[Episode], dimensions: Sequence[WeightedDimension]) -> Faults:
    """Measure `dimensions` on complete `episodes`: sets `scores` of episodes and turns."""
    return Measuring(dimensions).finish(episodes)


def measure_one(dimension: RewardDimension, episode: Episode) -> Score:
    """The score of one episode (for a dimension of groups: as a group of its own).

    Raises:
        MemFactoryError: the function failed.
    """
    if episode.failed:
        episode.scores[dimension.name] = _not_run(episode)
        return episode.scores[dimension.name]
    calls = calls_of(WeightedDimension(dimension.name, dimension), [episode])
    for call in calls:
        call.outcome = _run_now(call) if dimension.asynchronous else call.run()
        for (own, turn), value in zip(call.targets, call.values(), strict=True):
            (own if turn is None else turn).scores[dimension.name] = dimension.check(value, call.where)
    if dimension.per_turn:
        episode.scores[dimension.name] = _mean(WeightedDimension(dimension.name, dimension), episode)
    return episode.scores[dimension.name]


def _run_now(call: Call) -> Any:
    """The outcome of one async call, in a thread of its own: that of a notebook has a running event loop already."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, call.run_async()).result()


def _whole_groups(episodes: Sequence[Episode], gather: Gather) -> list[Episode]:
    """`episodes` and, of groups that other ranks hold a part of, the other members (copies).

    Members of such a group stand in the order of ranks, so that a function whose result depends on the order gives
    every rank the same scores.
    """
    ranks: list[list[str]] = gather([[episode.group for episode in episodes]])
    counts: dict[str, int] = defaultdict(int)
    for groups in ranks:
        for group in set(groups):
            counts[group] += 1
    shared = {group for group, count in counts.items() if count > 1}
    if not shared:
        return list(episodes)
    own = [[episode for episode in episodes if episode.group in shared]]
    everyone: list[list[Episode]] = gather(own)
    if not own[0]:
        return list(episodes)
    # which entry is ours: the only one that says the same about the same episodes, by their ids
    ids = [episode.id for episode in own[0]]
    mine = {episode.group for episode in own[0]}
    whole: list[Episode] = []
    for part in everyone:
        whole += episodes if [x.id for x in part] == ids else [e for e in part if e.group in mine]
    return whole


def _run(calls: list[Call], deadline: float | None) -> None:
    """Make ordinary calls one after another, in a thread that can be left behind when one hangs."""
    if deadline is None:
        for call in calls:
            call.outcome = call.run()
        return
    start, hangs = 0, 0
    while start < len(calls):
        if hangs == MAX_HANGS:
            for call in calls[start:]:
                call.outcome = call.hung(f"not called: {MAX_HANGS} calls before it hung")
            return
        worker = _Worker(calls, start)
        worker.start()
        while not worker.done.wait(max(worker.since + deadline - time.monotonic(), 0.01)):
            if time.monotonic() - worker.since >= deadline:
                break
        finished = worker.abandon()
        for index, outcome in enumerate(finished, start):
            calls[index].outcome = outcome
        start += len(finished)
        if start < len(calls):
            calls[start].outcome = calls[start].hung()
            start, hangs = start + 1, hangs + 1


class _Worker(threading.Thread):
    """Makes calls from `start` on until it is abandoned."""

    def __init__(self, calls: list[Call], start: int) -> None:
        super().__init__(name="memfactory-reward", daemon=True)  # a hung call must not keep the process alive
        self._calls, self._start = calls, start
        self._outcomes: list[Any] = []
        self._lock = threading.Lock()
        self._abandoned = False
        self.done = threading.Event()
        self.since = time.monotonic()
        """When the call that is going on began."""

    def run(self) -> None:
        for call in self._calls[self._start :]:
            self.since = time.monotonic()
            outcome = call.run()
            with self._lock:
                if self._abandoned:
                    return
                self._outcomes.append(outcome)
        self.done.set()

    def abandon(self) -> list[Any]:
        """Stop after the call that is going on, and take the outcomes of those before it."""
        with self._lock:
            self._abandoned = True
            return list(self._outcomes)


def _not_run(episode: Episode) -> Score:
    return Score(None, f"the episode was not run to its end: {episode.failed.splitlines()[0]}")


def _mean(weighted: WeightedDimension, episode: Episode) -> Score:
    """A dimension of turns, on the episode: the mean over the turns it speaks about."""
    scores = [turn.scores[weighted.name] for turn in episode.turns if weighted.dimension.speaks_about(turn)]
    for score in scores:
        if score.value is None:
            return Score(None, score.reason)
    if not scores:
        return Score(None, "it speaks about no turn of this episode")
    return Score(math.fsum(score.value for score in scores if score.value is not None) / len(scores))

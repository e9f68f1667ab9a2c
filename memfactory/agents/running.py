"""Running many episodes together, from ordinary blocking code."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import zip_longest
from typing import Any, TypeVar

from memfactory.agents.base import Agent
from memfactory.draws import of_episode
from memfactory.episode import Episode, Task
from memfactory.errors import MemFactoryError, ServiceError, StoreError
from memfactory.loops import together
from memfactory.policy.base import Policy

ResultT = TypeVar("ResultT")
Faults = tuple[type[MemFactoryError], ...]

OUTSIDE: Faults = (ServiceError, StoreError)
"""Faults of what stands outside the run and may be well again for the next episode."""


async def episodes_of(
    agent: Agent,
    tasks: Sequence[Task],
    policy: Policy,
    on_done: Callable[[Episode], None] | None = None,
    *,
    names: Sequence[str] = (),
    tolerated: Faults = OUTSIDE,
) -> list[Episode]:
    """:func:`run_episodes` for who has an event loop: several batches may run in it at the same time."""

    async def one(task: Task, name: str) -> Episode:
        try:
            with of_episode(name) if name else nullcontext():
                episode = await agent.run(task, policy)
        except (MemFactoryError, ExceptionGroup) as error:
            cause = _cause(error, tolerated)
            if cause is None:
                raise
            # what it did before is lost on purpose: a part of an episode has no outcome to be credited with
            episode = Episode(task, failed=f"{cause.fault}: {cause}")
        episode.id, episode.group = name, task.id
        if on_done is not None:
            on_done(episode)
        return episode

    return await together(one(task, name) for task, name in zip_longest(tasks, names, fillvalue=""))  # type: ignore[arg-type]


def blocking(work: Callable[[], Coroutine[Any, Any, ResultT]]) -> ResultT:
    """What the coroutine that `work` makes comes to, from ordinary code.

    Called from inside a loop (a notebook), it runs in a thread of its own: asyncio allows no second loop in one.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work())
    with ThreadPoolExecutor(1, "memfactory-episodes") as thread:
        return thread.submit(lambda: asyncio.run(work())).result()


def run_episodes(
    agent: Agent,
    tasks: Sequence[Task],
    policy: Policy,
    on_done: Callable[[Episode], None] | None = None,
    *,
    names: Sequence[str] = (),
    tolerated: Faults = OUTSIDE,
) -> list[Episode]:
    """Run `agent` once per entry of `tasks`, all at the same time; results in the order of `tasks`.

    The policy decides what is computed together. Tasks may repeat; each run has a store of its own.

    Where an endpoint or a store fails, the episode comes back with `Episode.failed` set and without turns, and the
    others go on: it cannot be scored, so measuring leaves it out of everything and counts it.

    Args:
        on_done: called with each episode as it is finished, e.g. to begin its scoring; it must not block.
        names: a name for each of `tasks`, which becomes its id: then its draws depend on the policy's seed and this
            name alone (:mod:`memfactory.draws`). Absent: all draw from the same random numbers.
        tolerated: faults that fail the one episode they come up in.

    Raises:
        MemFactoryError: the first episode that raised anything else; the others are cancelled.
    """

    return blocking(lambda: episodes_of(agent, tasks, policy, on_done, names=names, tolerated=tolerated))


def _cause(error: Exception, tolerated: Faults) -> MemFactoryError | None:
    """The tolerated fault that `error` is, or is a group of (a TaskGroup raises one); None for any other."""
    if isinstance(error, tolerated):
        return error
    if isinstance(error, ExceptionGroup):
        causes = [_cause(inner, tolerated) for inner in error.exceptions]
        return causes[0] if all(causes) else None
    return None

"""Local re-rolls: run one chunk of an episode again, several times, from the store as it was before that chunk.

The episodes of a group share their task, and yet each soon has a store of its own: from the second decision on they
are compared across different states. Re-rolls of one chunk begin in one and the same state, so their comparison says
something about the decisions on that chunk alone (LoGo-GRPO of Memory-R2, arXiv 2605.21768).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from memfactory.agents.base import Agent
from memfactory.agents.running import run_episodes
from memfactory.episode import Episode, Task
from memfactory.policy.base import Policy


def chunk_task(task: Task, chunk: int, id: str) -> Task | None:
    """The part of `task` that reads one chunk, with the questions that this chunk answers.

    Those are the questions whose evidence lies in it, with nothing later needed. None where there are none: then
    nothing would say how the chunk was read. `task.metadata` is cut to the chunk; a given memory is left out, because
    what was known before comes with the store.
    """
    probes = []
    for probe in task.probes:
        places = [evidence.chunk for evidence in probe.evidence]
        if chunk in places and max(places) == chunk:
            moved = tuple(replace(evidence, chunk=evidence.chunk - chunk) for evidence in probe.evidence)
            probes.append(replace(probe, evidence=moved, after=None))
    if not probes:
        return None
    metadata = {key: value for key, value in task.metadata.items() if key != "memory"}
    if "sessions" in metadata:
        metadata["sessions"] = metadata["sessions"][chunk : chunk + 1]
    return Task(id, task.stream[chunk : chunk + 1], tuple(probes), metadata | {"reroll": [task.id, chunk]})


def places(episode: Episode) -> list[int]:
    """Chunks of `episode` that can be run again: the store before them is kept, and a question rests on them."""
    if episode.task.metadata.get("reroll"):
        return []
    return [chunk for chunk in sorted(episode.snapshots) if chunk_task(episode.task, chunk, "") is not None]


@dataclass(frozen=True)
class _FromSnapshots:
    """Runs an agent on stores restored from snapshots, each run on one of its own."""

    agent: Any
    snapshots: dict[str, Any]
    """By id of the task."""

    async def run(self, task: Task, policy: Policy, store: Any = None) -> Episode:
        episode: Episode = await self.agent.run(task, policy, self.agent.restore(self.snapshots[task.id]))
        return episode


def reroll(
    agent: Agent,
    episodes: Sequence[Episode],
    policy: Policy,
    count: int,
    seed: int,
    on_done: Callable[[Episode], None] | None = None,
) -> list[Episode]:
    """`count` runs of one chunk of each of `episodes`, all at the same time; those of one chunk form a group.

    The snapshots are left as they are: every run works on a store restored from one.

    Args:
        agent: an agent that keeps `Episode.snapshots` and has ``restore(snapshot) -> store``.
        episodes: episodes with at least one of `places`.
        seed: decides which chunk.
        on_done: called with each episode as it is finished.

    Raises:
        MemFactoryError: the first run that raised.
    """
    tasks: list[Task] = []
    snapshots: dict[str, Any] = {}
    for number, episode in enumerate(episodes):
        chunk = random.Random(f"{seed}/{number}").choice(places(episode))
        task = chunk_task(episode.task, chunk, f"{episode.task.id}@{number}.{chunk}")
        assert task is not None
        snapshots[task.id] = episode.snapshots[chunk]
        tasks += [task] * count
    return run_episodes(_FromSnapshots(agent, snapshots), tasks, policy, on_done)

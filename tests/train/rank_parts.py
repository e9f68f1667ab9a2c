"""Parts of a recipe for runs on several ranks: episodes of different lengths, and rewards that are never all equal."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

from memfactory import Episode, reward
from memfactory.agents import MemAgent
from memfactory.episode import Task


class Uneven(MemAgent):
    """Reads one to four chunks, so that ranks sample different numbers of turns."""

    async def run(self, task: Task, policy: Any, store: Any = None) -> Episode:
        chunks = 1 + zlib.crc32(task.id.encode()) % len(task.stream)
        probes = tuple(
            dataclasses.replace(probe, evidence=()) for probe in task.probes
        )  # it may be in what is not read
        return await super().run(dataclasses.replace(task, stream=task.stream[:chunks], probes=probes), policy, store)


@reward
def words(episode: Episode) -> float:
    """Share of what the turns say that is different words."""
    said = " ".join(turn.text for turn in episode.turns).split()
    return len(set(said)) / (1 + len(said))

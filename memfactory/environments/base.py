"""An environment turns data into tasks."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Protocol

from memfactory.episode import Task


class Split(StrEnum):
    """Train and test tasks never overlap; environments must keep their ids disjoint."""

    TRAIN = "train"
    TEST = "test"


class Environment(Protocol):
    """Anything with this `tasks` is an environment."""

    def tasks(self, split: Split, count: int | None = None) -> Sequence[Task]:
        """The first `count` tasks of `split` (None: all), the same ones in the same order every time.

        Raises:
            DataError: a row cannot become a task (file and line are named), or there are no tasks.
        """
        ...

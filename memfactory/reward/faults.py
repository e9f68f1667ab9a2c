"""Failed measurements: counted by whose fault they are, and told with an example of each kind."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from memfactory.episode import Episode
from memfactory.errors import (
    DataError,
    EngineError,
    JudgeError,
    MemFactoryError,
    ModelOutputError,
    RecipeError,
    RewardError,
    ServiceError,
    StoreError,
)

BY_FAULT: dict[str, type[MemFactoryError]] = {
    error.fault: error
    for error in (
        DataError,
        EngineError,
        JudgeError,
        MemFactoryError,
        ModelOutputError,
        RecipeError,
        RewardError,
        ServiceError,
        StoreError,
    )
}
"""By the name of the fault: what a run ends with that had too many episodes that could not be run to their end."""
UNMEASURED = "unmeasured"
"""In the place of a fault where a dimension abstained."""
MAX_EXAMPLES = 3
"""Faults told in words, beyond the first of each kind."""


@dataclass(slots=True)
class Faults:
    """Failed measurements of one batch, by the fault class of their cause."""

    count: dict[str, int] = field(default_factory=dict)
    by_dimension: dict[str, int] = field(default_factory=dict)
    """Episodes on which a dimension failed."""
    examples: list[str] = field(default_factory=list)
    """The first of every dimension and class, so that a loud fault does not hide another; then up to three."""
    tracebacks: list[str] = field(default_factory=list)
    """Of the examples that have one."""
    _shown: set[tuple[str, str]] = field(default_factory=set)

    def include(self, other: Faults) -> None:
        """Add the faults of another batch."""
        for own, theirs in ((self.count, other.count), (self.by_dimension, other.by_dimension)):
            for name, number in theirs.items():
                own[name] = own.get(name, 0) + number
        for own_texts, texts in ((self.examples, other.examples), (self.tracebacks, other.tracebacks)):
            own_texts += texts[: max(0, MAX_EXAMPLES - len(own_texts))]

    def add(self, error: MemFactoryError, dimension: str = "") -> None:
        if self._add(error.fault, str(error), dimension) and error.__cause__ is not None:
            self.tracebacks.append("".join(traceback.format_exception(error.__cause__)))

    def add_failed(self, episode: Episode) -> None:
        """Count an `episode` that could not be run to its end. One of each class is told: they mostly say the same."""
        fault, _, told = episode.failed.partition(": ")
        self._add(fault, told, limit=0)

    def fault_of(self, dimension: str) -> str:
        """Whose fault it was that `dimension` failed, the first of several; :data:`UNMEASURED` where it abstained."""
        return min((fault for name, fault in self._shown if name == dimension), default=UNMEASURED)

    def _add(self, fault: str, told: str, dimension: str = "", limit: int = MAX_EXAMPLES) -> bool:
        """Count one of class `fault`; whether it became an example."""
        self.count[fault] = self.count.get(fault, 0) + 1
        kind = (dimension, fault)
        if kind in self._shown and len(self.examples) >= limit:
            return False
        self._shown.add(kind)
        self.examples.append(told)
        return True


def not_run(episodes: int, faults: Mapping[str, int], examples: Iterable[str]) -> MemFactoryError:
    """What to raise where too many of `episodes` could not be run to their end.

    Args:
        faults: how many, by the class of their fault.
        examples: what happened, in words.
    """
    causes = " and ".join(f"{number} by a fault of the {fault}" for fault, number in faults.items())
    most = max(faults, key=lambda fault: faults[fault])
    what = f"{sum(faults.values())} of {episodes} episodes could not be run, {causes}"
    return BY_FAULT.get(most, ServiceError)(
        what, "; ".join(examples), f"mend the {most}, or raise rollout.max_failed_share"
    )


def whose(episode: Episode) -> str:
    """The fault class of an episode that could not be run to its end; empty for one that was."""
    return episode.failed.partition(": ")[0]

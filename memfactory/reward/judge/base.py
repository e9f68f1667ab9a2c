"""What a judge is asked and what it promises: read this before the rest of the package."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from memfactory.episode import Score
from memfactory.errors import RewardError

Rule = Callable[[Mapping[str, str]], float | None]
"""Fields of a question to its score; None where the rule cannot tell."""
CompareRule = Callable[[str, str, Mapping[str, str]], int]
"""``rule(first, second, fields)``: 1 where the first is better, -1 where the second is, 0 for a tie."""

PREFERENCES = {"first": 1, "second": -1, "tie": 0}
"""Verdicts of a comparison, and the numbers that stand for them."""


@dataclass(frozen=True, slots=True)
class Rubric:
    """What to grade, the closed set of verdicts, and what each of them is worth."""

    name: str
    version: str
    """Raise it with every change of `instructions` or `labels`: verdicts in the cache belong to one version."""
    instructions: str
    """What to look at and what each label means. Trusted text: never put an answer of a model into it."""
    labels: Mapping[str, float]
    """Every verdict the judge may give, with its score, e.g. ``{"yes": 1.0, "no": 0.0}``."""
    rule: Rule | None = None
    """Stands in where no endpoint is set."""
    compare_rule: CompareRule | None = None
    """Stands in for comparisons where no endpoint is set."""

    def __post_init__(self) -> None:
        if not (self.name and self.version and self.instructions.strip()):
            raise ValueError(f"rubric '{self.name}': name, version and instructions must not be empty")
        if len(self.labels) < 2:
            raise ValueError(
                f"rubric '{self.name}': {len(self.labels)} label; a verdict needs at least two to choose from"
            )
        for label, score in self.labels.items():
            if not label.strip() or not math.isfinite(score):
                raise ValueError(
                    f"rubric '{self.name}': label {label!r} with score {score}; give a word and a finite score"
                )

    @property
    def low(self) -> float:
        """Smallest score of a label."""
        return min(self.labels.values())

    @property
    def high(self) -> float:
        """Largest score of a label."""
        return max(self.labels.values())


class Judge(Protocol):
    """Grades texts against rubrics. Any number of questions may wait at the same time.

    Fields are untrusted text, such as a model's answer. A reward function gets the recipe's judge through a
    keyword-only parameter called ``judge``.
    """

    async def grade(self, rubric: Rubric, /, **fields: str) -> Score:
        """The score of the label that fits `fields`, with the judge's own words as its reason.

        Raises:
            JudgeError: no verdict in time, or none that can be read. What measures turns this into a score of
                None, never into 0.
            RewardError: a field is no text, or a rule raised.
        """
        ...

    async def compare(self, rubric: Rubric, first: str, second: str, /, **fields: str) -> int:
        """Which of two texts is better: 1 the first, -1 the second, 0 neither.

        Asked in both orders. Opposite verdicts are a tie and count as a flip.

        Raises:
            JudgeError, RewardError: as :meth:`grade`.
        """
        ...

    async def prefer(self, rubric: Rubric, first: str, second: str, /, **fields: str) -> int:
        """As :meth:`compare`, but asked once, in this order: what calibration measures position bias with."""
        ...

    def metrics(self) -> dict[str, float]:
        """What happened since the last call (see :mod:`memfactory.reward.judge.tally`). Safe from any thread."""
        ...

    async def aclose(self) -> None:
        """Close connections of the running event loop and write what the cache still holds. May be used again."""
        ...


def check_fields(rubric: Rubric, fields: Mapping[str, object]) -> None:
    """See that there is something to grade and that it is text.

    Raises:
        RewardError: there is not: the reward function that asked has to change.
    """
    if not fields:
        raise RewardError(f"judge, rubric '{rubric.name}'", "no fields to grade", "pass texts: answer=..., gold=...")
    for name, value in fields.items():
        if not isinstance(value, str):
            kind = type(value).__name__
            raise RewardError(f"judge, rubric '{rubric.name}', field '{name}'", f"is {kind}, not text", "pass a str")

"""One finding, and how it is meant."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from memfactory.errors import MemFactoryError

GIB = 1024**3


class Level(StrEnum):
    """How a finding is meant."""

    OK = "ok"
    NOTE = "note"
    """Works, but could be better, or something optional is absent."""
    WRONG = "wrong"
    """Something required is missing or outside its range: the exit code becomes 1."""


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the table."""

    name: str
    found: str
    supported: str = ""
    level: Level = Level.OK
    fix: str = ""


def of_error(name: str, error: MemFactoryError, level: Level = Level.WRONG) -> Check:
    """The line of a part that a run would have ended with `error`."""
    return Check(name, f"{error.what}: {error.why}" if error.why else error.what, "", level, error.fix)

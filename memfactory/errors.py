"""Errors, classed by whose fault they are.

Retries, counters, abort thresholds and dashboards key on the class, so a zone of code that can fail
is wrapped in :func:`boundary` and whatever is thrown inside comes out as that zone's class. Every
message says what happened, why, and how to fix it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

MadeT = TypeVar("MadeT")


class MemFactoryError(Exception):
    """Base of all errors raised on purpose.

    Args:
        what: what could not be done, naming the thing (file and line, task id, key).
        why: the cause, with the offending value.
        fix: what the reader should type or change. Empty only where no fix exists.
    """

    fault = "memfactory"

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        self.what, self.why, self.fix = what, why, fix
        super().__init__(what, why, fix)

    def __str__(self) -> str:
        text = self.what if not self.why else f"{self.what}: {self.why}"
        return f"{text}\n  fix: {self.fix}" if self.fix else text


class RecipeError(MemFactoryError):
    """The recipe (or an override on the command line) is wrong: the user's to fix."""

    fault = "recipe"


class RecipeErrors(RecipeError):
    """Several recipe errors, shown together so that one run of the command finds them all."""

    def __init__(self, source: str, errors: Sequence[MemFactoryError]) -> None:
        self.errors = list(errors)
        noun = "error" if len(self.errors) == 1 else "errors"
        super().__init__(f"{source}: {len(self.errors)} {noun}")

    def __str__(self) -> str:
        return "\n".join([self.what, *(f"- {error}" for error in self.errors)])


def attempt(make: Callable[[], MadeT], errors: list[MemFactoryError]) -> MadeT | None:
    """What `make` gives, or None where the recipe is wrong: the errors are added to `errors`, to be shown together."""
    try:
        return make()
    except RecipeErrors as several:
        errors.extend(several.errors)
    except RecipeError as error:
        errors.append(error)
    return None


class DataError(MemFactoryError):
    """A dataset, a row or a task is wrong. `what` names file and line, or the task id."""

    fault = "data"


class RewardError(MemFactoryError):
    """A reward function raised, or returned something that is not a score."""

    fault = "reward"


class JudgeError(MemFactoryError):
    """A judge did not answer in time, or not in a form that can be read. The score is then None, never 0."""

    fault = "judge"


class ModelOutputError(MemFactoryError):
    """The model wrote something its module cannot use. It costs reward; it never ends a run."""

    fault = "model"


class StoreError(MemFactoryError):
    """A memory store could not be read, written or restored."""

    fault = "store"


class ServiceError(MemFactoryError):
    """An endpoint behind a module did not answer. The episode that asked is unscorable, never 0."""

    fault = "service"


class EngineError(MemFactoryError):
    """The trainer, the inference engine or an installed library does not do what is relied upon."""

    fault = "engine"


class TooLongError(EngineError):
    """A prompt, with room for its reply, is longer than the model takes. Who serves it blames who sent the text."""


@contextmanager
def boundary(zone: type[MemFactoryError], what: str, fix: str = "") -> Iterator[None]:
    """Turn any exception thrown inside into `zone`, keeping the original as its cause.

    An error that already has a fault class passes through unchanged: the innermost zone knows best.
    """
    try:
        yield
    except MemFactoryError:
        raise
    except Exception as error:
        raise zone(what, f"{type(error).__name__}: {error}", fix) from error

"""The processes of a run as one: they share what they have, and an error of one is the error of all.

Between two collective operations a rank may raise: its reward function is wrong, its model output breaks the agent,
its store is gone. The others would then wait in the next collective for a rank that never comes (with NCCL for ten
minutes, until a watchdog ends them with a message about a timeout). Here every exchange says whether its sender is
well, so whoever waits learns of the error instead, and all end with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from accelerate import PartialState
from accelerate.utils import gather_object
from torch.distributed import DistError

from memfactory.errors import EngineError, MemFactoryError


@dataclass(frozen=True)
class _Items:
    """What a rank that is well has to share."""

    values: list[Any]


@dataclass(frozen=True)
class _Done:
    """A rank that is well has reached the end of its block."""


@dataclass(frozen=True)
class _Failed:
    """A rank has raised."""

    rank: int
    kind: type[MemFactoryError]
    what: str
    why: str
    fix: str

    @classmethod
    def of(cls, error: Exception, rank: int) -> _Failed:
        if not isinstance(error, MemFactoryError):
            return cls(rank, EngineError, f"rank {rank} failed", f"{type(error).__name__}: {error}", "")
        # a class with a constructor of its own cannot be made from these three: its parent can
        kind = next(c for c in type(error).__mro__ if c is MemFactoryError or "__init__" not in vars(c))
        return cls(rank, kind, f"rank {rank}: {error.what if kind is type(error) else error}", error.why, error.fix)

    def error(self) -> MemFactoryError:
        return self.kind(self.what, self.why, self.fix)


class _Elsewhere(Exception):
    """Carries what another rank has told out of the block."""

    def __init__(self, failed: _Failed) -> None:
        super().__init__(failed)
        self.failed = failed


class Ranks:
    """All processes of the run. With one process, everything here is what it is without."""

    _inside: ClassVar[bool] = False
    """Whether this process is in a block of `together`, whichever object of this class opened it."""

    def __init__(self) -> None:
        state = PartialState()
        self.count: int = state.num_processes
        self.own: int = state.process_index

    @property
    def sharing(self) -> Ranks | None:
        """Itself where there is somebody to share with."""
        return self if self.count > 1 else None

    @property
    def main(self) -> bool:
        return self.own == 0

    def gather(self, values: list[Any]) -> list[Any]:
        """The lists of all ranks one behind the other, by rank. Every rank must call it.

        Raises:
            MemFactoryError: another rank has raised; its error.
        """
        if self.count == 1:
            return values
        try:
            messages = self._exchange(_Items(values))
        except _Elsewhere as elsewhere:
            if self._inside:
                raise
            raise elsewhere.failed.error() from None
        return [value for message in messages for value in message.values]

    def sum(self, value: float) -> float:
        return sum(self.gather([value]))

    def max(self, value: int) -> int:
        return max(self.gather([value]))

    def first(self, value: Any) -> Any:
        """What rank 0 has, on every rank."""
        return self.gather([value])[0]

    def lost(self, error: RuntimeError) -> EngineError | None:
        """What to raise in the place of an error by which torch says that another process is gone or silent; None for
        any other error. Such a process has told nobody: it was killed, or its machine is gone."""
        if self.count == 1 or not (isinstance(error, DistError) or "gloo" in str(error)):
            return None
        why = str(error).partition("\n")[0]
        fix = "see what ended it above, or in its own log; the same command goes on from the newest checkpoint"
        return EngineError("another process of this run has ended, or does not answer", why, fix)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that every rank leaves alike: well, or with the error of the first rank that raised in it.

        Ranks may talk in it by the methods above alone: in a collective of torch's, the others would wait for the rank
        that raised.

        Raises:
            MemFactoryError: a rank raised. An error without a fault class becomes an EngineError.
        """
        if self.count == 1 or self._inside:
            yield
            return
        Ranks._inside = True
        try:
            try:
                yield
            except _Elsewhere:
                raise
            except Exception as error:
                self._exchange(_Failed.of(error, self.own), error)
            else:
                self._exchange(_Done())
        except _Elsewhere as elsewhere:
            raise elsewhere.failed.error() from elsewhere.__cause__
        finally:
            Ranks._inside = False

    def _exchange(self, message: _Items | _Done | _Failed, cause: Exception | None = None) -> list[Any]:
        messages = gather_object([message])
        for other in messages:
            if isinstance(other, _Failed):
                raise _Elsewhere(other) from (cause if other.rank == self.own else None)
        if len({type(other) for other in messages}) > 1:
            # never seen; without this, one rank would take another's answer to another question for its own
            raise EngineError("the ranks are out of step", f"rank {self.own} sent {type(message).__name__}")
        return messages

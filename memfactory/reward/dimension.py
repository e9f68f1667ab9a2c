"""A reward dimension: a named measurement of an episode, with a range and a weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from memfactory.episode import Episode, Score
from memfactory.errors import RewardError

RewardFunction = Callable[[Episode], "float | Score | None"]


@dataclass(frozen=True, slots=True)
class RewardDimension:
    """A reward function with what the framework needs to know about it.

    Called with an episode it returns a :class:`Score`; the function itself may return a number, a
    `Score`, or None (could not be measured).
    """

    name: str
    function: RewardFunction
    low: float = 0.0
    high: float = 1.0

    def __call__(self, episode: Episode) -> Score:
        """Measure `episode`.

        Raises:
            RewardError: the function raised, returned something else, or left its declared range.
        """
        where = f"reward '{self.name}' ({self._place()}) on task {episode.task.id}"
        try:
            result = self.function(episode)
        except Exception as error:
            raise RewardError(where, f"{type(error).__name__}: {error}", "fix the function") from error
        if isinstance(result, Score):
            score = result
        elif result is None:
            score = Score(None, "the function returned None")
        else:
            try:
                if isinstance(result, str):
                    raise TypeError("text is not a number")
                score = Score(float(result))
            except (TypeError, ValueError) as error:
                raise RewardError(where, f"returned {result!r}", "return a finite number, a Score or None") from error
        if score.value is not None and not self.low <= score.value <= self.high:
            raise RewardError(
                where,
                f"returned {score.value}, outside its range [{self.low}, {self.high}]",
                "declare the true range in @reward(low=..., high=...)",
            )
        return score

    def _place(self) -> str:
        code = getattr(self.function, "__code__", None)
        return f"{code.co_filename}:{code.co_firstlineno}" if code else repr(self.function)


def reward(
    function: RewardFunction | None = None, *, low: float = 0.0, high: float = 1.0
) -> RewardDimension | Callable[[RewardFunction], RewardDimension]:
    """Make a reward dimension of a function ``episode -> float | Score | None``.

    Args:
        function: the decorated function, when used without parentheses.
        low: smallest value it can return.
        high: largest value it can return.
    """

    def wrap(inner: RewardFunction) -> RewardDimension:
        return RewardDimension(getattr(inner, "__name__", "reward"), inner, low, high)

    return wrap if function is None else wrap(function)

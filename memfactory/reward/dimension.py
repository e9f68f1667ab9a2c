"""A reward dimension: a named measurement with a scope, a range and a role."""

from __future__ import annotations

import inspect
import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from typing import Any

from memfactory.episode import Episode, Score, Turn
from memfactory.errors import RewardError

Value = float | Score | None
"""What a reward function may give for one episode or turn: a number, a Score, or None (could not be measured)."""


class Scope(StrEnum):
    """What one score speaks about, and so what the function is called with."""

    EPISODE = "episode"
    """``f(episode) -> value``."""
    TURN = "turn"
    """``f(episode, turn) -> value``, for every turn; or ``f(episode) -> values``, one for each turn."""
    MODULE = "module"
    """The same for the turns of one module; moves that module's turns alone."""
    GROUP = "group"
    """``f(episodes) -> values``: all episodes of one task, one value for each."""


class Role(StrEnum):
    """What a score is for. The aggregator treats each kind in its own way."""

    GATE = "gate"
    """Must hold; never traded against objectives. Without a value it fails."""
    OBJECTIVE = "objective"
    """Better is better; traded by weight."""
    SHAPING = "shaping"
    """A potential: how good the state after a turn is. Enters credit as a difference, never the reward."""
    BONUS = "bonus"
    """Added to the objectives by weight, and gated like them."""


class Missing(StrEnum):
    """What a score of None means for the reward of its episode. A gate without a value always fails."""

    EXCLUDE = "exclude"
    """The episode gets no reward and leaves its group."""
    DROP = "drop"
    """The dimension is left out for this episode and the other weights are renormalised."""
    GROUP_MEAN = "group_mean"
    """The mean of the group stands in, so that it moves the episode neither way."""


DEADLINE = 60.0
"""Seconds one call of a reward function may take unless it declares another limit."""


@dataclass(frozen=True, slots=True)
class RewardDimension:
    """A reward function with what the framework needs to know about it.

    Measuring a batch is the work of :mod:`memfactory.reward.measure`; calling a dimension measures one
    episode, for tests and notebooks.
    """

    name: str
    function: Callable[..., Any]
    low: float = 0.0
    high: float = 1.0
    scope: Scope = Scope.EPISODE
    role: Role = Role.OBJECTIVE
    modules: tuple[str, ...] = ()
    """Modules whose turns a dimension of scope module speaks about."""
    missing: Missing = Missing.EXCLUDE
    deadline: float | None = DEADLINE
    """Seconds one call may take; None: no limit."""
    noise: float = 0.0
    """Differences smaller than this mean nothing. Under `normalize_then_sum` a group's spread below it is not
    normalised up to full size; the other aggregators have `credit.std_floor`."""
    batched: bool = False
    """An episode-scope function that takes a list of unrelated episodes at once and returns as many values."""

    @property
    def asynchronous(self) -> bool:
        return is_async(innermost(self.function))

    @property
    def per_turn(self) -> bool:
        return self.scope in (Scope.TURN, Scope.MODULE)

    @property
    def whole_episode(self) -> bool:
        """Whether a function of turns takes the episode alone and returns a list: credit that is shared out."""
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except (TypeError, ValueError):
            return False
        return self.per_turn and sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters) == 1

    @property
    def place(self) -> str:
        """``file:line`` of the function, for messages."""
        code = getattr(innermost(self.function), "__code__", None)
        return f"{code.co_filename}:{code.co_firstlineno}" if code else repr(self.function)

    @property
    def doc(self) -> str:
        """The function's docstring: formula, range and source."""
        return inspect.getdoc(innermost(self.function)) or ""

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        """The keyword-only parameters a recipe can set."""
        parameters = inspect.signature(innermost(self.function)).parameters
        return {key: p for key, p in parameters.items() if p.kind is p.KEYWORD_ONLY and key not in INJECTED}

    @property
    def wants(self) -> tuple[str, ...]:
        """Names of the services the function asks for, e.g. ``judge``."""
        try:
            parameters = inspect.signature(self.function).parameters
        except (TypeError, ValueError):  # a builtin without a signature
            return ()
        return tuple(name for name in INJECTED if name in parameters)

    def bind(self, options: dict[str, Any]) -> RewardDimension:
        """The same dimension with keyword arguments of its function set.

        Raises:
            RecipeErrors: an option is unknown or of the wrong type.
        """
        from memfactory.plugins import check_options  # pydantic: not for those who only declare a reward

        where = f"rewards.{self.name}.options"
        checked = check_options(self.function, options, where, keyword_only=True, supplied=INJECTED)
        return replace(self, function=partial(self.function, **checked))

    def supply(self, services: dict[str, Any]) -> RewardDimension:
        """The same dimension with the services it asks for, e.g. ``{"judge": judge}``."""
        wanted = {name: services[name] for name in self.wants if name in services}
        return replace(self, function=partial(self.function, **wanted)) if wanted else self

    def speaks_about(self, turn: Turn) -> bool:
        """Whether a dimension of scope turn or module scores `turn`."""
        return self.scope is Scope.TURN or turn.module in self.modules

    def check(self, result: Any, where: str) -> Score:
        """`result` of the function as a score.

        Args:
            result: what the function returned for one episode or turn.
            where: names that episode or turn, for messages.

        Raises:
            RewardError: it is no number, not finite, or outside the declared range.
        """
        what = f"reward '{self.name}' ({self.place}) on {where}"
        if isinstance(result, Score):
            score = result
        elif result is None:
            score = Score(None, "the function returned None")
        else:
            try:
                if isinstance(result, str | bytes):
                    raise TypeError("text is not a number")
                score = Score(float(result))
            except Exception as error:  # float() of what a person returns can raise anything
                raise RewardError(what, f"returned {result!r}", "return a finite number, a Score or None") from error
        if score.value is not None and not self.low <= score.value <= self.high:
            raise RewardError(
                what,
                f"returned {score.value}, outside its range [{self.low}, {self.high}]",
                "declare the true range in @reward(low=..., high=...)",
            )
        return score

    def failure(self, error: BaseException, where: str) -> RewardError:
        """`error` of the function as a fault that names function, episode and the line that raised."""
        frames = traceback.extract_tb(error.__traceback__)
        line = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        fix = "mend it there, or return Score(None, 'why') for what it cannot measure"
        if "main thread" in str(error):  # a timeout by signal, as math-verify has
            fix = "add `deadline: 0` to its entry in the recipe: it is then called in the main thread"
        fault = RewardError(
            f"reward '{self.name}' ({self.place}) on {where}",
            f"{type(error).__name__}: {error}{line}",
            fix,
        )
        fault.__cause__ = error
        return fault

    def __call__(self, episode: Episode) -> Score:
        """Measure one `episode`; for a dimension of turns, the mean over its turns.

        Raises:
            MemFactoryError: the function failed, see :meth:`check` and :meth:`failure`.
        """
        from memfactory.reward.measure import measure_one

        return measure_one(self, episode)


INJECTED = ("judge",)
"""Parameters of a reward function that the framework fills in."""


def is_async(function: Any) -> bool:
    """Whether calling `function`, a function or an object with ``__call__``, gives something to await."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004
    )


def innermost(function: Any) -> Any:
    """The function a person wrote, under what the framework put around it."""
    while isinstance(function, partial):
        function = function.func
    return inspect.unwrap(function) if callable(function) else function


def reward(
    function: Callable[..., Any] | None = None,
    *,
    low: float = 0.0,
    high: float = 1.0,
    scope: str = "episode",
    role: str = "objective",
    module: str | Sequence[str] = (),
    missing: str = "exclude",
    deadline: float | None = DEADLINE,
    noise: float = 0.0,
    batched: bool = False,
) -> Any:
    """Make a reward dimension of a function, sync or async.

    The function gets what its scope says (see :class:`Scope`) and returns a number, a
    :class:`~memfactory.episode.Score` or None. Keyword-only parameters with defaults become options in the
    recipe; one called ``judge`` gets the recipe's judge.

    Args:
        function: the decorated function, when used without parentheses.
        low: smallest value it can return.
        high: largest value it can return.
        scope: ``episode``, ``turn``, ``module`` or ``group``.
        role: ``gate``, ``objective``, ``shaping`` or ``bonus``.
        module: with scope module, the module or modules whose turns it scores. Naming one implies that scope.
        missing: ``exclude``, ``drop`` or ``group_mean``, see :class:`Missing`.
        deadline: seconds one call may take; None: no limit.
        noise: smallest difference that means something, in units of the score.
        batched: with scope episode: the function takes a list of episodes and returns a list.

    Raises:
        ValueError: the declaration contradicts itself.
    """
    modules = (module,) if isinstance(module, str) else tuple(module)
    where = Scope("module" if modules and scope == "episode" else scope)
    if (where is Scope.MODULE) != bool(modules):
        raise ValueError(f"scope '{scope}' with module={module!r}: scope 'module' names one, e.g. module='write'")
    if not low < high:
        raise ValueError(f"low={low} must be below high={high}")
    if batched and where is not Scope.EPISODE:
        raise ValueError("batched functions have scope 'episode'; scope 'group' gets a list of episodes anyway")
    what = Role(role)
    if what is Role.SHAPING and where not in (Scope.TURN, Scope.MODULE):
        raise ValueError(
            "a potential needs scope='turn': summed over an episode it cancels out, so it would have no effect"
        )
    if what is Role.GATE and not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("a gate needs a finite range, because its score is scaled to [0, 1]")

    def wrap(inner: Callable[..., Any]) -> RewardDimension:
        from memfactory.plugins import USER_MODULE

        name = getattr(inner, "__name__", "reward")
        earlier = getattr(inner, "__globals__", {}).get(name)
        if isinstance(earlier, RewardDimension) and inner.__module__.startswith(USER_MODULE):
            raise ValueError(f"two rewards are called '{name}': here and at {earlier.place}; rename one")
        return RewardDimension(
            name, inner, low, high, where, what, modules, Missing(missing), deadline, noise, batched
        )

    return wrap if function is None else wrap(function)

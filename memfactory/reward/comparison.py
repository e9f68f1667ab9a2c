"""Comparators: rewards that only say which of two episodes is better."""

from __future__ import annotations

import asyncio
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from memfactory.episode import Episode, Score
from memfactory.errors import MemFactoryError
from memfactory.reward.dimension import DEADLINE, RewardDimension, Role, Scope, is_async

Comparator = Callable[..., Any]
"""``compare(first, second) -> 1 | 0 | -1``: 1 where the first episode is better, 0 for a tie, None for no verdict.
Sync or async; it may ask for the judge."""


def comparison(
    compare: Comparator | None = None, *, role: str = "objective", deadline: float | None = DEADLINE
) -> Any:
    """Make a reward dimension of a comparator.

    The score of an episode is its win rate against the other members of its group, ties counting half, in [0, 1]:
    (wins + ties / 2) / pairs that have a verdict. Each pair is compared once. A pair without a verdict is left out; an
    episode without any is not measured.

    Args:
        compare: the decorated function, when used without parentheses.
        role: see :func:`memfactory.reward.dimension.reward`.
        deadline: seconds that comparing one group may take; None: no limit.
    """

    def wrap(inner: Comparator) -> RewardDimension:
        injected = [p for p in inspect.signature(inner).parameters.values() if p.kind is p.KEYWORD_ONLY]

        async def ask(episodes: Sequence[Episode], **services: Any) -> list[Score]:
            pairs = list(itertools.combinations(range(len(episodes)), 2))
            asked = [inner(episodes[i], episodes[j], **services) for i, j in pairs]
            verdicts = await asyncio.gather(*asked, return_exceptions=True)
            return win_rates(len(episodes), dict(zip(pairs, verdicts, strict=True)))

        def rule(episodes: Sequence[Episode], **services: Any) -> list[Score]:
            pairs = itertools.combinations(range(len(episodes)), 2)
            verdicts = {(i, j): inner(episodes[i], episodes[j], **services) for i, j in pairs}
            return win_rates(len(episodes), verdicts)

        function: Callable[..., Any] = ask if is_async(inner) else rule
        # the signature that options and services are read from: a list of episodes, and what the comparator asks for
        first = inspect.Parameter("episodes", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        function.__signature__ = inspect.Signature([first, *injected])  # type: ignore[attr-defined]
        function.__name__, function.__doc__ = inner.__name__, inner.__doc__
        function.__wrapped__ = inner  # type: ignore[attr-defined]  # messages name the user's file and line
        return RewardDimension(inner.__name__, function, scope=Scope.GROUP, role=Role(role), deadline=deadline)

    return wrap if compare is None else wrap(compare)


def win_rates(size: int, verdicts: dict[tuple[int, int], Any]) -> list[Score]:
    """Win rate of each of `size` members from the verdicts on pairs (i, j), i < j.

    Args:
        verdicts: 1 where i is better, -1 where j is, 0 for a tie; None or a judge's error where there is none.

    Raises:
        Exception: what a comparator raised, unless it is a failure of the judge.
        ValueError: a verdict is none of these.
    """
    points, pairs, reason = [0.0] * size, [0] * size, "there is nothing to compare it with"
    for (i, j), verdict in verdicts.items():
        if isinstance(verdict, MemFactoryError):
            reason = verdict.why or verdict.what
            continue
        if isinstance(verdict, BaseException):
            raise verdict
        if verdict is None:
            reason = "no comparison had a verdict"
            continue
        if verdict not in (-1, 0, 1):
            raise ValueError(f"a comparator returns 1, 0, -1 or None, not {verdict!r}")
        points[i] += (1 + verdict) / 2
        points[j] += (1 - verdict) / 2
        pairs[i] += 1
        pairs[j] += 1
    return [Score(p / n) if n else Score(None, reason) for p, n in zip(points, pairs, strict=True)]

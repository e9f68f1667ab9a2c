"""Comparisons in both orders. Judges favour a position by up to tens of points, so one order proves little."""

from __future__ import annotations

import asyncio

from memfactory.errors import RewardError
from memfactory.reward.judge.base import Judge, Rubric, check_fields
from memfactory.reward.judge.tally import Tally


async def both_orders(
    judge: Judge, rubric: Rubric, first: str, second: str, fields: dict[str, str]
) -> tuple[int, int]:
    """What the judge prefers with `first` shown first, and with `second` shown first.

    1 means the text that was shown first, in either answer: two equal numbers other than 0 contradict each other.
    """
    asked = [
        asyncio.ensure_future(judge.prefer(rubric, first, second, **fields)),
        asyncio.ensure_future(judge.prefer(rubric, second, first, **fields)),
    ]
    try:
        forward, backward = await asyncio.gather(*asked)
    finally:
        for one in asked:  # where one order failed, the other is worth nothing
            one.cancel()
    return forward, backward


async def compared(judge: Judge, tally: Tally, rubric: Rubric, first: str, second: str, fields: dict[str, str]) -> int:
    """What a judge's `compare` answers: both orders asked, and the flip noted where they contradict each other."""
    forward, backward = await both_orders(judge, rubric, first, second, fields)
    tally.add(comparisons=1, flips=int(flipped(forward, backward)))
    return preference_of(forward, backward)


def preference_of(forward: int, backward: int) -> int:
    """One preference out of two orders: a contradiction is a tie, a tie and a preference are the preference."""
    difference = forward - backward
    return (difference > 0) - (difference < 0)


def flipped(forward: int, backward: int) -> bool:
    """Whether the judge chose by position: the same place won in both orders."""
    return forward == backward != 0


def check_pair(rubric: Rubric, first: str, second: str, fields: dict[str, str]) -> None:
    """See that both are texts and that no field is called as they are shown.

    Raises:
        RewardError: otherwise.
    """
    if fields.keys() & {"first", "second"}:
        what = f"judge, rubric '{rubric.name}'"
        raise RewardError(
            what, "a field is called 'first' or 'second'", "rename it: the compared texts have these names"
        )
    check_fields(rubric, {**fields, "first": first, "second": second})

"""Asking a module: the one place where a state becomes a turn and a turn becomes a result."""

from __future__ import annotations

from typing import TypeVar

from memfactory.episode import Turn
from memfactory.errors import ModelOutputError
from memfactory.modules.base import Module
from memfactory.policy.base import Demonstrator, Policy

StateT = TypeVar("StateT")
ResultT = TypeVar("ResultT")


async def ask(
    policy: Policy,
    module: Module[StateT, ResultT],
    state: StateT,
    *,
    max_tokens: int,
    chunk: int | None = None,
    prefix_key: str = "",
) -> tuple[Turn, ResultT | None]:
    """One turn of `module` on `state`, and what it says; None where its text cannot be used (`Turn.error` says why).

    The turn is the caller's to append: turns that are asked at the same time come back in any order.

    Args:
        max_tokens: longest reply.
        chunk: index of the chunk that the turn reads.
        prefix_key: equal for turns whose prompts begin alike, see `Turn.prefix_key`.
    """
    if isinstance(policy, Demonstrator):
        turn = await policy.demonstrate(module, state)
    else:
        turn = await policy.generate(module.render(state), module=module.name, max_tokens=max_tokens)
    turn.chunk, turn.prefix_key = chunk, prefix_key
    try:
        return turn, module.parse(turn.text)
    except ModelOutputError as error:
        turn.error = str(error)
        return turn, None

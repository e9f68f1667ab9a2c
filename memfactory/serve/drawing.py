"""The model as each request draws from it: by its own temperature, in one batch with those that have the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from memfactory.episode import Message, Turn
from memfactory.policy.base import Policy, Sampling
from memfactory.policy.routing import RoutedPolicy
from memfactory.policy.transformers_backend import TransformersPolicy

_KEPT = 32
"""Queues that are kept for requests to come."""


class Drawing:
    """Gives each request a policy that draws as it asks.

    Requests that draw alike share a queue and are decoded in one batch. All queues have the same seed: the random
    numbers of a request are those of its name (:mod:`memfactory.draws`), whoever else is there. Modules that the
    recipe gives to other models draw by their own settings.
    """

    def __init__(self, routed: RoutedPolicy) -> None:
        self.routed = routed
        self._shared: dict[Sampling, RoutedPolicy] = {}

    def policy(self, sampling: Sampling) -> RoutedPolicy:
        """A policy that draws by `sampling`."""
        if sampling not in self._shared:
            while len(self._shared) >= _KEPT:  # who draws from it now goes on
                self._shared.pop(next(iter(self._shared)))
            self._shared[sampling] = self._make(sampling)
        return self._shared[sampling]

    def _make(self, sampling: Sampling) -> RoutedPolicy:
        trained: Any = self.routed.trained
        if isinstance(trained, TransformersPolicy):
            own: Any = TransformersPolicy(
                trained.model,
                trained.tokenizer,
                sampling=sampling,
                eos_ids=trained.eos_ids,
                token_budget=trained.token_budget,
                version=trained.version or 0,
                autocast=trained.autocast,
                template_options=trained.template_options,
                share_prefix=trained.share_prefix,
                around=trained.around,
            )
        else:  # vLLM servers
            own = trained.beside(sampling, base=False)
            own.seed(0)
        return RoutedPolicy(own, self.routed.others)


class Watched:
    """A policy for one request: its answer is limited, and its turns are told as they begin.

    Args:
        answering: name of the module that answers.
        max_tokens: longest answer, where the agent allows as much; None leaves it to the agent.
        on_turn: called with the name of the module and the number of the turn, from 1.
    """

    def __init__(
        self, inner: Policy, answering: str, max_tokens: int | None, on_turn: Callable[[str, int], None]
    ) -> None:
        self.inner, self.answering, self.max_tokens, self.on_turn = inner, answering, max_tokens, on_turn
        self.turns = 0

    @property
    def greedy(self) -> bool:
        return self.inner.greedy

    async def generate(self, messages: list[Message], *, module: str, max_tokens: int) -> Turn:
        self.turns += 1
        self.on_turn(module, self.turns)
        if module == self.answering and self.max_tokens is not None:
            max_tokens = min(max_tokens, self.max_tokens)
        return await self.inner.generate(messages, module=module, max_tokens=max_tokens)

    def split(self, text: str, max_tokens: int) -> list[str]:
        return self.inner.split(text, max_tokens)

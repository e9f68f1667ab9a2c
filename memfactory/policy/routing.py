"""Which model answers for which module: trained, the same weights untrained, other weights, or an API."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from memfactory.episode import Message, Turn
from memfactory.policy.base import Policy, Sampling, TrainedPolicy


class Seeded(Policy, Protocol):
    """A policy whose draws begin anew from a seed."""

    def seed(self, seed: int) -> None: ...


class RoutedPolicy:
    """The trained policy for every module but those that `others` names.

    Turns of the others are not trainable. They draw by their own sampling, whatever the trained policy draws by, so
    that a frozen answerer that is greedy adds no noise to the reward of the manager it answers for.
    """

    def __init__(
        self,
        trained: TrainedPolicy,
        others: Mapping[str, Policy] | None = None,
        following: Sequence[TrainedPolicy] = (),
    ) -> None:
        """
        Args:
            trained: where turns come from that are trained.
            others: by name of the module; several modules may share a policy.
            following: those of `others` that sample from the weights that are trained, as they are now.
        """
        self.trained = trained
        self.others = dict(others or {})
        self.following = list(following)

    def use(self, model: Any, version: int | None = None) -> None:
        """Sample from `model`, the trained weights as they are now. All ranks call it together."""
        for policy in [self.trained, *self.following]:
            policy.use(model, version)

    async def generate(self, messages: list[Message], *, module: str, max_tokens: int) -> Turn:
        other = self.others.get(module)
        turn = await (other or self.trained).generate(messages, module=module, max_tokens=max_tokens)
        turn.trainable &= other is None
        return turn

    def apart(self) -> RoutedPolicy:
        """The same models for another batch at the same time, whose draws have a seed of their own.

        Those in this process are shared, draws and all.
        """
        found: dict[int, Any] = {id(policy): policy for policy in [self.trained, *self.others.values()]}
        own: dict[int, Any] = {
            key: policy.apart() if hasattr(policy, "apart") else policy for key, policy in found.items()
        }
        return RoutedPolicy(own[id(self.trained)], {name: own[id(policy)] for name, policy in self.others.items()})

    def close(self) -> None:
        """Close the connections of those behind an endpoint or a server."""
        for policy in {id(policy): policy for policy in [*self.others.values(), self.trained]}.values():
            if hasattr(policy, "close"):
                policy.close()

    def split(self, text: str, max_tokens: int) -> list[str]:
        return self.trained.split(text, max_tokens)

    @property
    def greedy(self) -> bool:
        return self.trained.greedy

    @property
    def max_positions(self) -> int | None:
        """Longest prompt and completion together; None where that is not known."""
        return getattr(self.trained, "max_positions", None)

    @property
    def elsewhere(self) -> bool:
        return self.trained.elsewhere

    def confirm(self) -> None:
        self.trained.confirm()

    def metrics(self) -> dict[str, float]:
        return self.trained.metrics()

    def seed(self, seed: int) -> None:
        """Begin the draws of every policy that draws anew from `seed`."""
        for policy in self._drawing():
            policy.seed(seed)

    @contextmanager
    def drawing(self, sampling: Sampling, seed: int) -> Iterator[None]:
        """The trained policy draws by `sampling`, all from `seed` on; afterwards everything is as it was."""
        with ExitStack() as stack:
            stack.enter_context(self.trained.drawing(sampling, seed))
            for policy in self._drawing():
                own = getattr(policy, "sampling", None)
                if own is not None and policy is not self.trained:
                    stack.enter_context(policy.drawing(own, seed))  # type: ignore[attr-defined]
            yield

    def _drawing(self) -> list[Seeded]:
        found = {id(policy): policy for policy in [self.trained, *self.others.values()] if hasattr(policy, "seed")}
        return list(found.values())  # type: ignore[arg-type]

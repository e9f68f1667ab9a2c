"""The only door to a model: `await policy.generate(messages, module=...) -> Turn`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from memfactory.episode import Message, Turn


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. These values alone decide; a model's own generation config is ignored."""

    temperature: float = 1.0
    """0 means greedy. Log-probs are recorded at this temperature (at 1 when greedy)."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps every token."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0


class Policy(Protocol):
    """A model behind a queue. Any number of `generate` calls may wait at the same time."""

    @property
    def greedy(self) -> bool:
        """Whether decisions are the most likely ones: what else draws in an agent (a reranker) then does the same."""
        ...

    async def generate(self, messages: list[Message], *, module: str, max_tokens: int) -> Turn:
        """Sample one turn.

        Args:
            messages: the prompt, rendered by the policy's own chat template.
            module: name of the asking module, recorded on the turn.
            max_tokens: most tokens to sample; the turn stops with ``LENGTH`` when it reaches them.

        Raises:
            EngineError: the prompt does not fit the model, or the engine failed.
        """
        ...

    def split(self, text: str, max_tokens: int) -> list[str]:
        """Cut `text` into pieces of at most `max_tokens` of the policy's tokens, nothing lost."""
        ...


class TrainedPolicy(Policy, Protocol):
    """The policy whose turns are trained, whichever engine samples them."""

    version: int | None
    """Optimizer steps behind the weights that it samples from."""
    elsewhere: bool
    """Whether log-probs of its turns are another engine's than the trainer's own, so that the two can differ."""

    def use(self, model: Any, version: int | None = None) -> None:
        """Sample from the weights of `model`. All ranks call it together.

        Raises:
            EngineError: they could not be brought to where turns are sampled.
        """
        ...

    def drawing(self, sampling: Sampling, seed: int) -> AbstractContextManager[None]:
        """Draw by `sampling` from `seed` on; afterwards everything is as it was."""
        ...

    def seed(self, seed: int) -> None:
        """Begin the draws anew from `seed`."""
        ...

    def confirm(self) -> None:
        """After turns were sampled, and before anything is made of them.

        Raises:
            EngineError: some may have been sampled from other weights than those of the last `use`.
        """
        ...

    def close(self) -> None: ...

    def metrics(self) -> dict[str, float]:
        """What happened since the last call, for the log."""
        ...


@runtime_checkable
class Demonstrator(Protocol):
    """A policy that is told what a module is asked, instead of reading its prompt: a teacher."""

    async def demonstrate(self, module: Any, state: Any) -> Turn:
        """The turn that shows how `module` should decide in `state`."""
        ...

"""Parts of an agent that learn beside the policy: small models with an optimizer of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from memfactory.episode import Episode

Gather = Callable[[list[Any]], list[Any]]


@runtime_checkable
class Learner(Protocol):
    """A module that is a small model and trains itself, e.g. RMM's linear reranker."""

    name: str

    def experience(self, episodes: Sequence[Episode]) -> list[Any]:
        """What it learns from in `episodes`: records that can be sent to other ranks."""
        ...

    def learn(self, experience: Sequence[Any]) -> dict[str, float]:
        """One update; returns what to log. The same experience gives the same update on every rank."""
        ...

    def seed(self, seed: int) -> None:
        """Begin its draws anew."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def save(self, folder: Path) -> None:
        """Write its weights where the policy's are."""
        ...

    def load(self, folder: Path) -> None:
        """Read what `save` wrote.

        Raises:
            EngineError: it is not there, or does not fit.
        """
        ...


class Learners:
    """All learners among the modules of an agent."""

    def __init__(self, agent: object) -> None:
        modules: Sequence[Any] = getattr(agent, "modules", ())
        self.all = {module.name: module for module in modules if isinstance(module, Learner)}

    def __bool__(self) -> bool:
        return bool(self.all)

    def seed(self, seed: int) -> None:
        for learner in self.all.values():
            learner.seed(seed)

    def learn(self, episodes: Sequence[Episode], gather: Gather | None = None) -> dict[str, float]:
        """One update of each, from the episodes of all ranks; metrics by ``NAME/metric``."""
        metrics: dict[str, float] = {}
        for name, learner in self.all.items():
            experience = learner.experience(episodes)
            everything = gather(experience) if gather is not None else experience
            metrics |= {f"{name}/{key}": value for key, value in learner.learn(everything).items()}
        return metrics

    def state_dict(self) -> dict[str, Any]:
        return {name: learner.state_dict() for name, learner in self.all.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, learner in self.all.items():
            learner.load_state_dict(state[name])

    def save(self, folder: Path) -> None:
        for learner in self.all.values():
            learner.save(folder)

    def load(self, folder: Path) -> None:
        for learner in self.all.values():
            learner.load(folder)

"""What an agent is: ordinary async code that composes modules.

The same `run` trains, evaluates and serves; it never asks which of the three is going on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from memfactory.episode import Episode, Message, Task
from memfactory.policy.base import Policy


@dataclass(frozen=True)
class Longest:
    """The longest prompt that a module can come to on a task: an agent's `longest(task, chunks)` lists them, so that
    what cannot fit the model is known before anything is run."""

    what: str
    """The turn, for people: ``a turn that reads``."""
    module: str
    messages: list[Message]
    """The prompt without what turns before it wrote."""
    written: int
    """Most tokens of what they wrote."""
    reply: int
    """Most tokens of the reply."""
    fix: str
    likely: bool = True
    """False: only many long replies together come to `written`, which few episodes do."""


class Agent(Protocol):
    """Anything with this `run` is an agent."""

    async def run(self, task: Task, policy: Policy, store: Any = None) -> Episode:
        """Work on `task` and return everything that happened.

        Args:
            task: the problem.
            policy: where turns come from.
            store: memory to start from, of the kind the agent keeps (a text, a bank), e.g. a restored snapshot; None
                starts empty. It is written to.
        """
        ...

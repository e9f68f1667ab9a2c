"""What an agent is: ordinary async code that composes modules.

The same `run` trains, evaluates and serves; it never asks which of the three is going on.
"""

from __future__ import annotations

from typing import Any, Protocol

from memfactory.episode import Episode, Task
from memfactory.policy.base import Policy


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

"""What a memory module is: it renders a state to messages and parses what comes back.

A module does no I/O, knows no device and no tokenizer, so it can be tested with strings and swapped
from a recipe.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

from memfactory.episode import Message

StateT = TypeVar("StateT", contravariant=True)
ResultT = TypeVar("ResultT", covariant=True)


WRITERS = ("write", "update")
"""Names of the modules whose turns change the memory: what rewards on writing speak about."""


class Module(Protocol[StateT, ResultT]):
    """One memory operation."""

    name: str
    """Name on the turns it makes, and in recipes."""

    def render(self, state: StateT) -> list[Message]:
        """The prompt for `state`."""
        ...

    def parse(self, text: str) -> ResultT:
        """What `text` says to do.

        Raises:
            ModelOutputError: the text cannot be used. The agent records it on the turn and goes on.
        """
        ...

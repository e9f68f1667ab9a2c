"""What a memory module is: it renders a state to messages and parses what comes back.

A module does no I/O, knows no device and no tokenizer, so it can be tested with strings and swapped
from a recipe.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

import jinja2

from memfactory.episode import Message

StateT = TypeVar("StateT", contravariant=True)
ResultT = TypeVar("ResultT", covariant=True)
OwnT = TypeVar("OwnT")


WRITERS = ("write", "update")
"""Names of the modules whose turns change the memory: what rewards on writing speak about."""


class Module(Protocol[StateT, ResultT]):
    """One memory operation that a language model carries out."""

    @property
    def name(self) -> str:
        """Name on the turns it makes, and in recipes."""
        ...

    def render(self, state: StateT) -> list[Message]:
        """The prompt for `state`."""
        ...

    def parse(self, text: str) -> ResultT:
        """What `text` says to do.

        Raises:
            ModelOutputError: the text cannot be used. The agent records it on the turn and goes on.
        """
        ...


class Teachable(Module[StateT, OwnT], Protocol):
    """A module whose syntax can also be written, so that a teacher needs to know only what is right."""

    def write(self, result: OwnT) -> str:
        """A text that `parse` reads as `result`."""
        ...


class Rule(Protocol[StateT, ResultT]):
    """One memory operation without a model: no turn, no tokens, nothing to train."""

    @property
    def name(self) -> str: ...

    def apply(self, state: StateT) -> ResultT: ...


# Values are inserted as data: text written by a model cannot become template code.
JINJA = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False, keep_trailing_newline=False)


def user_message(template: str, **values: object) -> list[Message]:
    """One user message: the Jinja `template` with `values` put in as data."""
    return [{"role": "user", "content": _compiled(template).render(values)}]


_TEMPLATES: dict[str, jinja2.Template] = {}


def _compiled(template: str) -> jinja2.Template:
    if template not in _TEMPLATES:
        _TEMPLATES[template] = JINJA.from_string(template)
    return _TEMPLATES[template]

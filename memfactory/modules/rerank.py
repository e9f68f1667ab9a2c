"""Reranking by a language model: it names the entries that a question needs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from memfactory.episode import Message
from memfactory.errors import ModelOutputError
from memfactory.memory.entries import Entry
from memfactory.modules.base import user_message
from memfactory.modules.parsing import strip_reasoning

_ID = re.compile(r"(?<![A-Za-z0-9_])e[1-9][0-9]{0,17}(?![A-Za-z0-9_])")


@dataclass(frozen=True, slots=True)
class ChooseState:
    """What a reranker sees."""

    question: str
    candidates: tuple[Entry, ...]
    """Best first, as the retriever ranked them."""
    m: int
    """How many to choose."""


PROMPT = (
    "Below are entries of a memory and a question. Name the {{ m }} entries that help most to answer it, best first.\n"
    "<entries>\n{% for entry in candidates %}{{ entry.id }}{% if entry.time %} ({{ entry.time }}){% endif %}: "
    "{{ entry.text }}\n{% endfor %}</entries>\n<question>{{ question }}</question>\n"
    "Reply with their ids, separated by commas, and nothing else."
)
WORDS_PROMPT = (
    "{% for entry in candidates %}{{ entry.id }} {{ entry.text }} {% endfor %}question : {{ question }} choose {{ m }}"
)


@dataclass(frozen=True)
class ModelReranker:
    """A model reads question and candidates and names `m` ids, best first."""

    m: int = 5
    """Entries kept."""
    prompt: str = PROMPT
    """Jinja template; variables `question`, `candidates` and `m`."""
    name: str = "rerank"

    def render(self, state: ChooseState) -> list[Message]:
        return user_message(self.prompt, question=state.question, candidates=state.candidates, m=state.m)

    def parse(self, text: str) -> list[str]:
        """The ids named behind the reasoning, in order, each once, at most `m`.

        Raises:
            ModelOutputError: the reply names none.
        """
        reply = strip_reasoning(text)
        found = ids_in(reply)
        if not found:
            raise ModelOutputError("the reply names no entry", reply[:40])
        return found[: self.m]

    def write(self, result: Sequence[str]) -> str:
        return " ".join(result)


def ids_in(text: str) -> list[str]:
    """Ids of entries that stand in `text`, in order, each once."""
    return list(dict.fromkeys(_ID.findall(text)))

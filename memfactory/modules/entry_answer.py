"""Answering from entries of a bank, and saying which of them were used."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from memfactory.episode import Message
from memfactory.errors import ModelOutputError
from memfactory.memory.entries import Entry
from memfactory.modules.base import user_message
from memfactory.modules.parsing import strip_reasoning
from memfactory.modules.rerank import ids_in


@dataclass(frozen=True, slots=True)
class EntriesState:
    """What an answer over entries sees."""

    question: str
    entries: tuple[Entry, ...]
    """Best first."""
    when: str = ""
    """When the question is asked, as the dataset writes it; empty where it does not say."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer and the entries it rests on."""

    text: str
    cited: tuple[str, ...] = ()


_ENTRIES = (
    "{% for entry in entries %}{{ entry.id }}{% if entry.time %} ({{ entry.time }}){% endif %}: {{ entry.text }}\n"
    "{% else %}(the memory holds nothing about this)\n{% endfor %}"
)

DISTILL_PROMPT = (
    "Below are entries of a memory of conversations, with the times they are from. First name the entries that help "
    "to answer the question; then answer from them alone, in at most six words. Where entries contradict each other, "
    "the newest is right. Turn relative dates into calendar dates.\n"
    "<entries>\n" + _ENTRIES + "</entries>\n<question>{{ question }}</question>\n"
    "Reply with two lines:\nUseful: ids of the entries\nAnswer: the answer"
)
CITE_PROMPT = (
    "You talk with a user whom you have met before. Below are entries of your memory of them.\n"
    "<entries>\n" + _ENTRIES + "</entries>\n<user>{{ question }}</user>\n"
    "Reply briefly. End your reply with the ids of the entries you used in square brackets, like [e1, e4], or with "
    "[NO_CITE] if you used none."
)
DIRECT_PROMPT = (
    "Below are entries of a memory.\n<entries>\n" + _ENTRIES + "</entries>\n<question>{{ question }}</question>\n"
    "Answer from them alone, in at most six words, and write nothing else."
)
WORDS_PROMPT = (
    "{% for entry in entries %}{{ entry.id }} {{ entry.text }} {% else %}none {% endfor %}"
    "question : {{ question }} write answer"
)

_MARKER = re.compile(r"(?:\*\*)?\banswer\b\s*:\s*(?:\*\*)?", re.IGNORECASE)
_CITATION = re.compile(r"\[([^\[\]]{0,400})\]")


@dataclass(frozen=True)
class DistilledAnswer:
    """Memory distillation: useful entries are named first, then the answer (Memory-R1, arXiv 2508.19828, sec. 3)."""

    prompt: str = DISTILL_PROMPT
    """Jinja template; variables `question`, `entries` and `when`."""
    name: str = "answer"

    def render(self, state: EntriesState) -> list[Message]:
        return _render(self.prompt, state)

    def parse(self, text: str) -> Reply:
        """What follows the last ``Answer:``, up to the end of its line, and the ids named before it.

        Raises:
            ModelOutputError: there is no ``Answer:``, or nothing behind it.
        """
        reply = strip_reasoning(text)
        markers = list(_MARKER.finditer(reply))
        if not markers:
            raise ModelOutputError("the reply has no line `Answer:`", reply[:40])
        answer = next((line.strip() for line in reply[markers[-1].end() :].splitlines() if line.strip()), "")
        if not answer:
            raise ModelOutputError("nothing stands behind `Answer:`")
        return Reply(answer, tuple(ids_in(reply[: markers[-1].start()])))

    def write(self, result: Reply) -> str:
        return f"Useful: {', '.join(result.cited) or 'none'}\nAnswer: {result.text}"


@dataclass(frozen=True)
class CitedAnswer:
    """A reply that ends with the entries it used, in one call (RMM's response with citations, arXiv 2503.08026)."""

    prompt: str = CITE_PROMPT
    """Jinja template; variables `question`, `entries` and `when`."""
    name: str = "answer"

    def render(self, state: EntriesState) -> list[Message]:
        return _render(self.prompt, state)

    def parse(self, text: str) -> Reply:
        """The reply without its citations, and every id cited anywhere in square brackets.

        Raises:
            ModelOutputError: nothing is left without them.
        """
        reply = strip_reasoning(text)
        cited: dict[str, None] = {}

        def strip(match: re.Match[str]) -> str:
            inside = ids_in(match[1])
            cited.update(dict.fromkeys(inside))
            return "" if inside or "NO_CITE" in match[1] else match[0]

        answer = " ".join(_CITATION.sub(strip, reply).split())
        if not answer:
            raise ModelOutputError("the reply is empty but for its citations")
        return Reply(answer, tuple(cited))

    def write(self, result: Reply) -> str:
        return f"{result.text} [{', '.join(result.cited) or 'NO_CITE'}]"


@dataclass(frozen=True)
class DirectAnswer:
    """The whole reply is the answer, and nothing says what it rests on."""

    prompt: str = DIRECT_PROMPT
    """Jinja template; variables `question`, `entries` and `when`."""
    name: str = "answer"

    def render(self, state: EntriesState) -> list[Message]:
        return _render(self.prompt, state)

    def parse(self, text: str) -> Reply:
        """The reply behind its reasoning.

        Raises:
            ModelOutputError: it is empty.
        """
        reply = strip_reasoning(text)
        if not reply:
            raise ModelOutputError("the reply is empty")
        return Reply(reply)

    def write(self, result: Reply) -> str:
        return result.text


@dataclass(frozen=True)
class WordAnswer:
    """``e3 goat``: the ids the answer rests on, and the answer, for models that know a few hundred words."""

    prompt: str = WORDS_PROMPT
    """Jinja template; variables `question`, `entries` and `when`."""
    cite: Literal["first", "last"] = "first"
    """Whether ids stand before the answer or behind it (``goat e3``); read wherever they stand."""
    name: str = "answer"

    def render(self, state: EntriesState) -> list[Message]:
        return _render(self.prompt, state)

    def parse(self, text: str) -> Reply:
        """The answer, and the ids before and behind it.

        Raises:
            ModelOutputError: there is no answer.
        """
        words = strip_reasoning(text).split()
        plain = [place for place, word in enumerate(words) if ids_in(word) != [word]]
        if not plain:
            raise ModelOutputError("the reply holds no answer", " ".join(words)[:40])
        start, end = plain[0], plain[-1] + 1
        return Reply(" ".join(words[start:end]), tuple(dict.fromkeys([*words[:start], *words[end:]])))

    def write(self, result: Reply) -> str:
        return " ".join([*result.cited, result.text] if self.cite == "first" else [result.text, *result.cited])


def _render(prompt: str, state: EntriesState) -> list[Message]:
    return user_message(prompt, question=state.question, entries=state.entries, when=state.when)

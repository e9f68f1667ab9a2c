"""Extraction: what of a chunk is worth remembering, as facts."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from memfactory.episode import Message
from memfactory.errors import ModelOutputError
from memfactory.modules.base import user_message
from memfactory.modules.parsing import strip_reasoning
from memfactory.modules.reading_json import json_items, sound, text_of

_MOST = 256
"""Facts that one reply may bring; what follows is left out."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing that a chunk says."""

    text: str
    key: str = ""
    """What it is about, e.g. ``anna.city``; empty where nothing names it."""
    time: str = ""
    """When it was said or is true, as ISO 8601; empty where unknown."""
    source: str = ""
    """The words it was taken from, or the numbers of the lines; empty where not given."""
    speaker: str = ""


@dataclass(frozen=True, slots=True)
class ReadState:
    """What extraction sees."""

    chunk: str
    when: str = ""
    """When it was said, as the dataset writes it; what relative dates are relative to."""
    time: str = ""
    """The same as ISO 8601; empty where unknown."""
    speakers: tuple[str, ...] = ()
    speaker: str = ""
    """Whom to extract facts about, for extractors that go through the speakers one by one."""


FACTS_PROMPT = (
    "You keep a memory of a conversation. Below is one session{% if when %}, held on {{ when }}{% endif %}. List "
    "every fact in it{% if speaker %} about {{ speaker }}{% endif %} that may matter later: about people, plans, "
    "preferences, events. One sentence each, with names instead of pronouns, and with relative dates (yesterday, next "
    "week) resolved to calendar dates.\n"
    "<session>\n{{ chunk }}\n</session>\n"
    'Reply with a JSON list of objects {"text": the fact, "key": person.topic, "time": YYYY-MM-DD or "", '
    '"speaker": who said it, "source": the words it is taken from}. Reply [] if nothing matters.'
)

TOPICS_PROMPT = (
    "Below is one session of a conversation{% if when %}, held on {{ when }}{% endif %}; its lines are numbered. "
    "Summarise what it says about {{ speaker or 'the speakers' }}, one or two sentences for each topic, with the "
    "numbers of the lines it rests on.\n"
    "<session>\n{% for line in lines %}[{{ loop.index0 }}] {{ line }}\n{% endfor %}</session>\n"
    'Reply with a JSON list of objects {"summary": text, "reference": [line numbers]}, or with NO_TRAIT if there is '
    "nothing about {{ speaker or 'them' }}."
)


@dataclass(frozen=True)
class FactExtractor:
    """A model lists facts with keys, times and sources (the extraction of Mem0 and Memory-R1, arXiv 2508.19828)."""

    prompt: str = FACTS_PROMPT
    """Jinja template; variables `chunk`, `when`, `time`, `speakers`, and `speaker` under `per_speaker`."""
    name: str = "extract"
    per_speaker: bool = False
    """One turn for each speaker instead of one for the chunk."""

    def render(self, state: ReadState) -> list[Message]:
        return user_message(self.prompt, **asdict(state))

    def parse(self, text: str) -> list[Fact]:
        """The facts; items that are none are left out.

        Raises:
            ModelOutputError: no JSON list, or a list in which nothing is a fact.
        """
        items = json_items(text, "facts", "memory")
        found = [fact for item in items[:_MOST] if (fact := _fact(item)) is not None]
        if items and not found:
            raise ModelOutputError("no item of the list is a fact", "each needs a text")
        return found

    def write(self, result: Sequence[Fact]) -> str:
        return json.dumps([_written(fact) for fact in result])


@dataclass(frozen=True)
class TopicExtractor:
    """Prospective reflection, first half: topic summaries of a session for each speaker (RMM, arXiv 2503.08026)."""

    prompt: str = TOPICS_PROMPT
    """Jinja template; variables as of `FactExtractor`, and `lines` of the chunk."""
    name: str = "extract"
    per_speaker: bool = True

    def render(self, state: ReadState) -> list[Message]:
        return user_message(self.prompt, lines=state.chunk.splitlines(), **asdict(state))

    def parse(self, text: str) -> list[Fact]:
        """The summaries as facts, line numbers in `source`.

        Raises:
            ModelOutputError: neither a JSON list nor NO_TRAIT.
        """
        try:
            items = json_items(text, "extracted_memories", "topics", "summaries")
        except ModelOutputError:
            if _NOTHING in strip_reasoning(text):
                return []
            raise
        items = [item for item in items[:_MOST] if item != _NOTHING]
        found = [fact for item in items if (fact := _fact(item)) is not None]
        if items and not found:
            raise ModelOutputError("no item of the list is a topic", "each needs a summary")
        return found

    def write(self, result: Sequence[Fact]) -> str:
        if not result:
            return _NOTHING
        numbers = [[int(word) for word in fact.source.split() if _NUMBER.fullmatch(word)] for fact in result]
        return json.dumps([{"summary": f.text, "reference": lines} for f, lines in zip(result, numbers, strict=True)])


_NOTHING = "NO_TRAIT"
"""What stands instead of topics where there are none."""
_NUMBER = re.compile(r"[0-9]{1,9}")
_LINE = re.compile(r"\s*([^:\n]{1,80}?)\s*:\s+(\S.*)")


@dataclass(frozen=True)
class LineExtractor:
    """Every line that somebody says is a fact, as it stands: no model, nothing is lost, nothing is resolved."""

    name: str = "extract"
    keep_speaker: bool = True
    """Whether the text begins with the speaker's name."""

    def apply(self, state: ReadState) -> list[Fact]:
        found = []
        for line in state.chunk.splitlines():
            match = _LINE.fullmatch(line)
            # where the speakers are known, a line by nobody (a date, a heading) is no fact
            if match is None or (state.speakers and match[1] not in state.speakers):
                continue
            text = line.strip() if self.keep_speaker else match[2].strip()
            found.append(Fact(text, time=state.time, source=line.strip(), speaker=match[1]))
        return found


def _written(fact: Fact) -> dict[str, str]:
    fields = {"text": fact.text, "key": fact.key, "time": fact.time, "source": fact.source}
    return fields | ({"speaker": fact.speaker} if fact.speaker else {})


@dataclass(frozen=True)
class ChunkExtractor:
    """The chunk is one fact, as it stands: for data whose chunks are facts already, e.g. bank files. No model."""

    name: str = "extract"

    def apply(self, state: ReadState) -> list[Fact]:
        text = state.chunk.strip()
        return [Fact(text, time=state.time, source=text)] if text else []


def _fact(item: object) -> Fact | None:
    if isinstance(item, str) and item.strip():
        return Fact(sound(item).strip())
    if not isinstance(item, dict):
        return None
    try:
        text = text_of(item, "text", "fact", "summary", "memory")
        reference = item.get("reference")
        if isinstance(reference, list):
            numbers = [str(n) for n in reference if isinstance(n, int | str) and not isinstance(n, bool)]
            source = " ".join(number for number in numbers if _NUMBER.fullmatch(number))
        else:
            source = text_of(item, "source")
        fact = Fact(text, text_of(item, "key"), text_of(item, "time"), source, text_of(item, "speaker"))
    except TypeError:
        return None
    return fact if fact.text else None

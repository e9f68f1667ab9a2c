"""Updating: what new facts change in the bank, as operations on its entries."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from memfactory.episode import Message, Operation
from memfactory.errors import ModelOutputError
from memfactory.memory.entries import Entry, Verb
from memfactory.memory.operations import Refusal
from memfactory.modules.base import user_message
from memfactory.modules.facts import Fact
from memfactory.modules.parsing import strip_reasoning
from memfactory.modules.reading_json import json_items, sound, text_of

_MOST = 256
"""Operations that one reply may ask for; the rest is refused."""
TOO_MANY = "too many operations in one reply"

_SPELLINGS = {
    **{verb.value: verb.value for verb in Verb},
    **{"INSERT": "ADD", "CREATE": "ADD", "MODIFY": "UPDATE", "REMOVE": "DELETE", "DEL": "DELETE"},
    **{"NOOP": "NONE", "NO-OP": "NONE", "NO_OP": "NONE", "NOP": "NONE"},
}
"""Verbs as models write them."""


@dataclass(frozen=True, slots=True)
class UpdateState:
    """What an update sees."""

    facts: tuple[Fact, ...]
    related: tuple[Entry, ...]
    """Entries of the bank that resemble the facts: what an operation may name."""


_ENTRIES = (
    "{% for entry in related %}{{ entry.id }}{% if entry.time %} ({{ entry.time }}){% endif %}: {{ entry.text }}\n"
    "{% else %}(no related entries)\n{% endfor %}"
)
_FACTS = "{% for fact in facts %}- {{ fact.text }}\n{% endfor %}"
_JOB = (
    "You keep a bank of facts up to date. ADD a fact that is new. UPDATE an entry whose content changed or can be "
    "completed: keep its id and write the whole new text. DELETE an entry that is no longer true and has no "
    "successor. NONE where the bank already says it.\n"
)

CRUD_PROMPT = (
    _JOB + "<facts>\n" + _FACTS + "</facts>\n<entries>\n" + _ENTRIES + "</entries>\n"
    'Reply with a JSON list of operations: {"op": "ADD", "text": ..., "key": ...}, {"op": "UPDATE", "id": ..., '
    '"text": ...}, {"op": "DELETE", "id": ...}, {"op": "NONE"}.'
)

EVENTS_PROMPT = (
    _JOB + "<facts>\n" + _FACTS + "</facts>\n<memory>\n" + _ENTRIES + "</memory>\n"
    'Reply with a JSON object {"memory": [...]} that lists every entry above and every new one as {"id": ..., '
    '"text": ..., "event": "ADD" | "UPDATE" | "DELETE" | "NONE"}; with UPDATE also "old_memory": the text before.'
)

MERGE_PROMPT = (
    "Below are entries of a memory and a new summary. If the new summary speaks about the same topic as an entry, "
    "merge the two into one text that keeps what both say and is right where they differ.\n"
    "<entries>\n" + _ENTRIES + "</entries>\n<new>\n" + _FACTS + "</new>\n"
    "Reply with one line: Add() if it is a new topic, or Merge(ID, merged text)."
)

WORDS_PROMPT = (
    "{% for entry in related %}{{ entry.id }} {{ entry.text }} {% else %}none {% endfor %}"
    "fact : {% for fact in facts %}{{ fact.text }} {% endfor %}write update"
)


@dataclass(frozen=True)
class CrudUpdater:
    """One reply with a JSON list of ADD, UPDATE, DELETE and NONE over all facts of a chunk."""

    prompt: str = CRUD_PROMPT
    """Jinja template; variables `facts` and `related`."""
    name: str = "update"
    per_fact: bool = False
    """One turn for each fact instead of one for the chunk. Then an operation without text takes the fact's."""

    def render(self, state: UpdateState) -> list[Message]:
        return _render(self.prompt, state)

    def parse(self, text: str) -> list[Operation]:
        """The operations. What is wrong with one of them stands in its `error` and leaves the others alone.

        Raises:
            ModelOutputError: the reply holds no JSON list.
        """
        items = json_items(text, "operations", "memory")
        return _capped([_operation(item, ("op", "operation", "event", "action")) for item in items])

    def write(self, result: Sequence[Operation]) -> str:
        return json.dumps([_item(operation, "op") for operation in result])


@dataclass(frozen=True)
class EventUpdater:
    """The whole list of related entries with an event each: Mem0's form, which Memory-R1 trains (arXiv 2508.19828)."""

    prompt: str = EVENTS_PROMPT
    """Jinja template; variables `facts` and `related`."""
    name: str = "update"
    per_fact: bool = False

    def render(self, state: UpdateState) -> list[Message]:
        return _render(self.prompt, state)

    def parse(self, text: str) -> list[Operation]:
        """The events as operations, NONE included; the id of an ADD is the bank's to give.

        Raises:
            ModelOutputError: the reply holds no JSON list.
        """
        return _capped([_operation(item, ("event", "op")) for item in json_items(text, "memory")])

    def write(self, result: Sequence[Operation]) -> str:
        return json.dumps({"memory": [_item(operation, "event") for operation in result]})


_MERGE = re.compile(r"Merge\(\s*([^\s,()]{1,64})\s*,", re.IGNORECASE)
_BRACKETS = re.compile(r"[()\n]")
_LINE_END = re.compile(r"\)(?=[\s.;`*\"']*(?:\n|\Z))")
_ADD = re.compile(r"Add\(\s*\)", re.IGNORECASE)


@dataclass(frozen=True)
class MergeUpdater:
    """Prospective reflection, second half: a topic is added or merged into an entry (RMM, arXiv 2503.08026)."""

    prompt: str = MERGE_PROMPT
    """Jinja template; variables `facts` (one) and `related`."""
    name: str = "update"
    per_fact: bool = True

    def render(self, state: UpdateState) -> list[Message]:
        return _render(self.prompt, state)

    def parse(self, text: str) -> list[Operation]:
        """ADD, whose text is the topic's, or UPDATE.

        Raises:
            ModelOutputError: neither Add() nor Merge(ID, text).
        """
        reply = strip_reasoning(text)
        merge = _MERGE.search(reply)
        if merge is not None and (merged := _closed(reply[merge.end() :])) is not None:
            return [Operation(Verb.UPDATE.value, sound(merge[1]), sound(merged).strip())]
        if _ADD.search(reply) is not None:
            return [Operation(Verb.ADD.value)]
        raise ModelOutputError("the reply says neither Add() nor Merge(ID, text)", reply[:40])

    def write(self, result: Sequence[Operation]) -> str:
        verbs = {"ADD": "Add()", "UPDATE": "Merge({0.target}, {0.text})"}
        return "\n".join(verbs[operation.verb].format(operation) for operation in result)


def _closed(text: str) -> str | None:
    """What stands before the bracket that closes a Merge; None where there is none.

    Brackets in pairs belong to the text, or to prose behind it; one too many on the same line is a later end, as
    after a smiley. Where more are opened than closed, the first that ends a line counts, else the last.
    """
    depth, end = 1, -1
    for bracket in _BRACKETS.finditer(text):
        if bracket[0] == "\n":
            if end >= 0:
                break
            continue
        depth += 1 if bracket[0] == "(" else -1
        if depth < 0 or (depth == 0 and end < 0):
            depth, end = 0, bracket.start()
    if end < 0:
        found = _LINE_END.search(text)
        end = found.start() if found else text.rfind(")")
    return text[:end] if end >= 0 else None


@dataclass(frozen=True)
class WordUpdater:
    """One decision in plain words, ``ADD``, ``UPDATE e3``, ``DELETE e3`` or ``NONE``: for models that know no JSON.

    What is added, or stands there after an update, is the fact itself.
    """

    prompt: str = WORDS_PROMPT
    """Jinja template; variables `facts` (one) and `related`."""
    name: str = "update"
    per_fact: bool = True

    def render(self, state: UpdateState) -> list[Message]:
        return _render(self.prompt, state)

    def parse(self, text: str) -> list[Operation]:
        """The one operation.

        Raises:
            ModelOutputError: the reply does not begin with a verb.
        """
        words = strip_reasoning(text).split()
        verb = _SPELLINGS.get(words[0].upper()) if words else None
        if verb is None:
            raise ModelOutputError(
                "the reply begins with no verb", " ".join(words)[:40], "ADD, UPDATE, DELETE or NONE"
            )
        named = verb in (Verb.UPDATE.value, Verb.DELETE.value)
        return [Operation(verb, words[1] if named and len(words) > 1 else "")]

    def write(self, result: Sequence[Operation]) -> str:
        return "\n".join(f"{operation.verb} {operation.target}".strip() for operation in result)


@dataclass(frozen=True)
class AddAll:
    """Every fact is added, whatever the bank holds: the memory that never forgets and never corrects. No model."""

    name: str = "update"
    per_fact: bool = False
    looks_up: bool = False
    """It reads no related entries, so none are searched for."""

    def apply(self, state: UpdateState) -> list[Operation]:
        return [
            Operation(Verb.ADD.value, "", fact.text, fact.key, (fact.speaker,) if fact.speaker else (), fact.time)
            for fact in state.facts
        ]


def _render(prompt: str, state: UpdateState) -> list[Message]:
    return user_message(prompt, facts=state.facts, related=state.related)


def _operation(item: object, verbs: tuple[str, ...]) -> Operation:
    """One item of a JSON list as an operation; one that cannot be read carries why."""
    if not isinstance(item, dict):
        return _unreadable(item)
    try:
        verb = text_of(item, *verbs)
        target, tags = item.get("id", item.get("target", "")), item.get("tags", [])
        if isinstance(target, int) and not isinstance(target, bool):
            target = str(target)  # a bare number names no entry; the bank says so
        fields = text_of(item, "text", "memory", "content"), text_of(item, "key"), text_of(item, "time")
        labels = tuple(sound(tag) for tag in tags if isinstance(tag, str)) if isinstance(tags, list) else ()
        if target is not None and not isinstance(target, str):
            raise TypeError("id")
    except TypeError:
        return _unreadable(item)
    text, key, time = fields
    spelled = _SPELLINGS.get(verb.upper(), verb[:64])
    if spelled in (Verb.ADD.value, Verb.NONE.value):
        target = "" if spelled == Verb.ADD.value else target
    return Operation(spelled, sound(target or ""), text, key, labels, time)


def _unreadable(item: object) -> Operation:
    try:
        text = json.dumps(item)[:200]
    except RecursionError:  # nested just as deep as it could be read
        text = "nested too deeply"
    return Operation("", text=text, error=Refusal.WRONG_TYPE.value)


def _item(operation: Operation, verb: str) -> dict[str, Any]:
    fields: dict[str, Any] = {"id": operation.target, "text": operation.text, "key": operation.key}
    fields |= {"time": operation.time, "tags": list(operation.tags)}
    return {verb: operation.verb} | {name: value for name, value in fields.items() if value}


def _capped(operations: list[Operation]) -> list[Operation]:
    """`operations`, the one behind the limit refused and the rest left out."""
    if len(operations) <= _MOST:
        return operations
    return [*operations[:_MOST], Operation("", error=TOO_MANY)]

"""What an operation must say to be carried out: the rules that every bank shares, apart from where entries lie."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import StrEnum

from memfactory.episode import Operation
from memfactory.memory.entries import Entry, Verb


class Refusal(StrEnum):
    """Why an operation was not carried out: the whole set, in words that never vary, so that they can be counted."""

    UNKNOWN_VERB = "unknown verb"
    WRONG_TYPE = "a field is not text"
    MISSING_ID = "missing id"
    """UPDATE or DELETE that names no entry."""
    UNKNOWN_ID = "unknown id"
    """No such entry in this bank: never given, already deleted, or another owner's."""
    MISSING_TEXT = "missing text"
    """ADD or UPDATE whose text is empty or only white space."""
    TEXT_TOO_LONG = "text too long"
    LABEL_TOO_LONG = "key, tags or time too long"


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one operation may bring in. A model that does not stop writes megabytes."""

    text: int = 20_000
    """Characters of an entry's text."""
    label: int = 1_000
    """Characters of the key, of the time, and of each tag."""
    tags: int = 64
    """Tags of one entry."""


VERBS: dict[str, Verb] = {verb.value: verb for verb in Verb}
_ADD, _DELETE, _NONE = Verb.ADD, Verb.DELETE, Verb.NONE  # members of an enum are slow to look up

# ASCII digits and no leading zero: every entry has exactly one spelling. 18 digits stay within 64 bits.
_ID = re.compile(r"e([1-9][0-9]{0,17})")


def entry_id(number: int) -> str:
    """The id of the `number`-th entry that a bank was given, counted from 1."""
    return f"e{number}"


def entry_number(id: object) -> int | None:
    """The number behind an id; None where `id` is nothing that a bank gives out."""
    match = _ID.fullmatch(id) if isinstance(id, str) else None
    return int(match[1]) if match else None


def refusal(operation: Operation, limits: Limits) -> Refusal | None:
    """What is wrong with `operation` by itself, before any bank is looked into; None where nothing is.

    Types are checked too: a parser hands over what a model wrote, and JSON has numbers and lists.
    """
    verb = VERBS.get(operation.verb) if isinstance(operation.verb, str) else None
    if verb is None:
        return Refusal.UNKNOWN_VERB
    if verb is _NONE:
        return None
    if not isinstance(operation.target, str):
        return Refusal.WRONG_TYPE
    if verb is not _ADD and not operation.target:
        return Refusal.MISSING_ID
    if verb is _DELETE:
        return None
    text, key, time, tags = operation.text, operation.key, operation.time, operation.tags
    if not (isinstance(text, str) and isinstance(key, str) and isinstance(time, str) and isinstance(tags, tuple)):
        return Refusal.WRONG_TYPE
    if tags and not all(isinstance(tag, str) for tag in tags):
        return Refusal.WRONG_TYPE
    if not text or text.isspace():
        return Refusal.MISSING_TEXT
    if len(text) > limits.text:
        return Refusal.TEXT_TOO_LONG
    if len(key) > limits.label or len(time) > limits.label or len(tags) > limits.tags:
        return Refusal.LABEL_TOO_LONG
    if tags and max(map(len, tags)) > limits.label:
        return Refusal.LABEL_TOO_LONG
    return None


def refused(operation: Operation, reason: Refusal) -> Operation:
    """`operation` as it comes back when it was not carried out. The error is a plain ``str``, as records hold it."""
    return replace(operation, error=reason.value)


def with_target(operation: Operation, id: str) -> Operation:
    """`operation` as it comes back after ADD. Spelled out: ``dataclasses.replace`` would cost half of an ADD."""
    return Operation(operation.verb, id, operation.text, operation.key, operation.tags, operation.time)


def added(operation: Operation, id: str, owner: str, turn: int | None) -> Entry:
    """The entry that ADD makes."""
    return Entry(id, operation.text, operation.key, operation.tags, operation.time, owner, turn)


def updated(before: Entry, operation: Operation, turn: int | None) -> Entry:
    """The entry after UPDATE: same id, new text; what the operation leaves empty stays as it was."""
    return Entry(
        before.id,
        operation.text,
        operation.key or before.key,
        operation.tags or before.tags,
        operation.time or before.time,
        before.owner,
        turn,
    )

"""From chat messages to a task: what is new in them, and how it is read.

The last message is the question; what stands before it is read, piece by piece, once:

- a message of the user that nobody answered is a document, read as it stands;
- one with its answer is an exchange, read as two lines, ``user: ...`` and ``assistant: ...``;
- any other message is read as ``ROLE: ...``;
- one that is empty says nothing, and is passed over.

So the pieces of a task, sent as messages of the user with its question behind them, are the stream of that task. A
message that carries a name is read as ``NAME: ...``.

Clients send the whole conversation again with every request. Each message has a mark, a hash over itself and all that
stands before it; what was read is remembered by its marks.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from hashlib import blake2b


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a conversation."""

    role: str
    """``system``, ``developer``, ``user`` or ``assistant``."""
    content: str
    name: str = ""
    """Of the participant; empty where none is given."""

    @property
    def said(self) -> str:
        """The message as what somebody said."""
        return f"{self.name or self.role}: {self.content}"


@dataclass(frozen=True, slots=True)
class Exchange:
    """A question and its answer: what the next request reads first."""

    question: ChatMessage
    answer: str
    asked: bytes
    """Mark of the question."""
    replied: bytes
    """Mark of the answer."""

    @property
    def said(self) -> str:
        return _exchange(self.question, ChatMessage("assistant", self.answer))


@dataclass(frozen=True, slots=True)
class Plan:
    """What a request asks, and what is to be read before."""

    question: ChatMessage
    stream: tuple[str, ...]
    """Pieces that were not read yet."""
    marks: tuple[bytes, ...]
    """Of what is read with it."""
    asked: bytes
    """Mark of the question."""

    def answered(self, answer: str) -> Exchange:
        """The question with its answer."""
        return Exchange(self.question, answer, self.asked, _mark(self.asked, ChatMessage("assistant", answer)))


def marks_of(messages: Sequence[ChatMessage]) -> list[bytes]:
    """The mark of each message, 16 bytes."""
    found: list[bytes] = []
    for message in messages:
        found.append(_mark(found[-1] if found else b"", message))
    return found


def plan(messages: Sequence[ChatMessage], read: Collection[bytes] = (), last: Exchange | None = None) -> Plan:
    """What of `messages` is to be read, and asked.

    Args:
        messages: a conversation; its last message is the question.
        read: marks of what was read before; others than those of `messages` do not matter.
        last: the exchange that nobody has read yet. Where the conversation holds its question, it decides: it goes on
            behind the answer, or has another one, or asks again. Else the exchange is from another conversation, and
            is read first.
    """
    marks = marks_of(messages)
    before = messages[:-1]
    start = max((place for place, mark in enumerate(marks[:-1], start=1) if mark in read), default=0)
    stream, new = pieces(before[start:]), marks[start:-1]
    if last is not None and last.asked not in marks:
        stream, new = [last.said, *stream], [last.asked, last.replied, *new]
    return Plan(messages[-1], tuple(stream), tuple(new), marks[-1])


def pieces(messages: Sequence[ChatMessage]) -> list[str]:
    """`messages` as they are read, see the module's docstring."""
    found: list[str] = []
    messages = [message for message in messages if message.content.strip()]
    place = 0
    while place < len(messages):
        message = messages[place]
        answer = messages[place + 1] if place + 1 < len(messages) else None
        if message.role == "user" and answer is not None and answer.role == "assistant":
            found.append(_exchange(message, answer))
            place += 1
        elif message.role == "user" and not message.name:
            found.append(message.content)
        else:
            found.append(message.said)
        place += 1
    return found


def _exchange(question: ChatMessage, answer: ChatMessage) -> str:
    return f"{question.said}\n{answer.said}"


def _mark(before: bytes, message: ChatMessage) -> bytes:
    # half of a surrogate pair, which JSON can spell, has no UTF-8
    parts = [part.encode("utf-8", "surrogatepass") for part in (message.role, message.name, message.content)]
    digest = blake2b(before, digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)  # the lengths keep parts apart
    return digest.digest()

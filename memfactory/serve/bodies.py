"""The bodies of requests and replies: OpenAI's chat completions, as far as an agent with a memory can keep to them."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from memfactory.plugins import reason
from memfactory.policy.base import Sampling
from memfactory.runs import episode_record
from memfactory.serve.desk import Asked, Replied, owner_of
from memfactory.serve.refusals import Refused
from memfactory.serve.transcript import ChatMessage

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": (),
}
"""What cannot be done here, with the values that ask for nothing; null always does."""
_WITHOUT_MEANING = {
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
}
"""What changes no answer, and is passed over."""


def _sound(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("half of a surrogate pair is no text") from error
    return text


Text = Annotated[str, AfterValidator(_sound)]
"""Text that a tokenizer takes."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Part(_Model):
    """A part of a message that is sent in parts."""

    type: Literal["text"]
    text: Text


class Sent(_Model):
    """A message as it is sent."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]
    name: Text | None = Field(default=None, max_length=64)
    refusal: None = None
    """Clients send replies back as they came, empty fields and all."""
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: list[Any] | None = Field(default=None, max_length=0)

    @property
    def message(self) -> ChatMessage:
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        return ChatMessage(self.role, "\n".join(parts), self.name or "")


class StreamOptions(_Model):
    include_usage: bool = False
    include_obfuscation: bool = False


class Body(_Model):
    """A request. Fields mean what they mean at OpenAI, but for the last."""

    model: str
    messages: list[Sent] = Field(min_length=1)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    user: str | None = Field(default=None, max_length=256)
    return_episode: bool = False
    """Send the whole episode with the answer: every turn with its tokens, and the memory."""

    def asked(self, user: str, default: Sampling) -> Asked:
        """The request of `user`; what it leaves open is as in `default`."""
        temperature = self.temperature if self.temperature is not None else default.temperature
        top_p = self.top_p if self.top_p is not None else default.top_p
        limits = [limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None]
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Asked(
            owner_of(user, self.user or ""),
            [sent.message for sent in self.messages],
            Sampling(temperature, top_p),
            self.seed % 2**63 if self.seed is not None else None,
            min(limits, default=None),
            tuple(text for text in stop if text),
            self.return_episode,
        )


def read_body(raw: bytes, model: str) -> Body:
    """The request in `raw`.

    Raises:
        Refused: it is none, or asks for what cannot be done, or for another model.
    """
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Refused(400, "the body is not JSON", "invalid_json") from error
    if not isinstance(data, dict):
        raise Refused(400, "the body is not a JSON object", "invalid_json")
    for name, neutral in _NEUTRAL.items():
        if data.pop(name, None) not in (None, *neutral):
            raise Refused(400, f"{name} is not supported by this server; leave it out", "unsupported", param=name)
    try:
        body = Body.model_validate({key: value for key, value in data.items() if key not in _WITHOUT_MEANING})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part not in ("str", "list[Part]", "list[str]"))
        what = "it is not known here; leave it out" if first["type"] == "extra_forbidden" else reason(first)
        raise Refused(400, f"{where}: {what}", "invalid_value", param=where) from error
    if body.model != model:
        raise Refused(404, f"there is no model {body.model!r} here; it is {model!r}", "model_not_found", param="model")
    if body.messages[-1].role != "user" or not body.messages[-1].message.content.strip():
        raise Refused(400, "the last message must be the user's question", "invalid_value", param="messages")
    return body


def model_card(name: str, created: int) -> dict[str, Any]:
    """The entry of the one model in ``/v1/models``."""
    return {"id": name, "object": "model", "created": created, "owned_by": "memfactory"}


def usage(replied: Replied) -> dict[str, int]:
    """Tokens over all turns of the agent."""
    prompt, completion = replied.prompt_tokens, replied.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class Writer:
    """Writes the replies to one request, which share its id.

    Args:
        body: the request.
    """

    def __init__(self, body: Body) -> None:
        self.body = body
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}

    def whole(self, replied: Replied) -> dict[str, Any]:
        """The reply in one piece."""
        message = {"role": "assistant", "content": replied.text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": _finish(replied), "logprobs": None}
        reply = {**self.head, "object": "chat.completion", "choices": [choice], "usage": usage(replied)}
        return reply | self._episode(replied)

    def pieces(self, replied: Replied) -> list[dict[str, Any]]:
        """The reply in pieces, word by word; joined they are the answer."""
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
        deltas += [{"content": word} for word in _words(replied.text)]
        chunks = [self._chunk([{"index": 0, "delta": delta, "finish_reason": None}]) for delta in deltas]
        chunks.append(self._chunk([{"index": 0, "delta": {}, "finish_reason": _finish(replied)}]))
        if self.body.stream_options is not None and self.body.stream_options.include_usage:
            chunks.append(self._chunk([]) | {"usage": usage(replied)})
        chunks[-1] |= self._episode(replied)
        return chunks

    def _chunk(self, choices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {**self.head, "object": "chat.completion.chunk", "choices": list(choices)}

    def _episode(self, replied: Replied) -> dict[str, Any]:
        return {"episode": episode_record(replied.episode)} if self.body.return_episode else {}


def _finish(replied: Replied) -> str:
    return "length" if replied.cut else "stop"


def _words(text: str) -> list[str]:
    """`text` cut behind white space."""
    found, begin = list[str](), 0
    for place in range(1, len(text)):
        if text[place - 1].isspace() and not text[place].isspace():
            found.append(text[begin:place])
            begin = place
    return [*found, text[begin:]] if text else []

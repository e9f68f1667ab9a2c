"""Chat completions of an OpenAI-compatible endpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx

from memfactory.endpoints.endpoint import Endpoint
from memfactory.endpoints.failures import Failure, RequestFailed, of_error

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class Completion:
    """The first choice of a chat completion."""

    text: str | None
    """None where it has no text: a refusal, a tool call, or all tokens spent on thinking."""
    finish: str = ""
    """``finish_reason``: ``stop``, ``length``, ...; empty where the server did not say."""
    usage: Mapping[str, Any] = field(default_factory=dict)


class ChatEndpoint(Endpoint):
    """Asks one endpoint one thing at a time; many may ask at once, in any number of event loops."""

    async def ask(self, body: Mapping[str, Any], read: Callable[[Completion], ResultT]) -> ResultT:
        """What `read` makes of the reply to `body`, after as many attempts as allowed.

        Args:
            body: the request, with its `messages`.
            read: raises RequestFailed for a completion that cannot be used.

        Raises:
            RequestFailed: no reply came that can be used; says why and what to change.
        """

        characters = sum(len(message["content"]) for message in body["messages"])
        return await self.post("/chat/completions", body, read_completion, read, characters)


def read_completion(response: httpx.Response) -> Completion:
    """The chat completion in `response`.

    Raises:
        RequestFailed: the body is something else, or speaks of an error.
    """
    try:
        data = response.json()
        error = data.get("error")
        if error:
            raise of_error(error, response)
        choice = data["choices"][0]
        message, finish, usage = choice["message"], choice.get("finish_reason"), data.get("usage")
        text = message.get("content")
        if choice.get("error") or finish == "error":
            raise of_error(choice.get("error") or "finish_reason is error", response)
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        shown = " ".join(response.text[:200].split())
        raise RequestFailed(Failure.GARBAGE, f"the reply is no chat completion: {shown!r}") from error
    return Completion(
        text if isinstance(text, str) else None,
        finish if isinstance(finish, str) else "",
        usage if isinstance(usage, dict) else {},
    )

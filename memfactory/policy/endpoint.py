"""A model behind an OpenAI-compatible API, for modules that are not trained."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from memfactory.endpoints import is_address
from memfactory.episode import Message, StopReason, Turn
from memfactory.errors import RecipeError, ServiceError, boundary
from memfactory.loops import BackgroundLoop
from memfactory.recipe import PolicySection

try:
    from memfactory.endpoints.chat import ChatEndpoint, Completion
    from memfactory.endpoints.failures import Failure, Fixes, RequestFailed
    from memfactory.endpoints.tally import Tally
except ModuleNotFoundError as missing:
    why = f"needs {missing.name}"
    raise RecipeError("policies: base_url", why, 'pip install "memfactory[judge]"') from missing

LOOP = BackgroundLoop("memfactory-endpoints")
"""Where requests are made. A policy in this process holds up the loop of the episodes while it decodes: there, a reply
would lie unread until its deadline had passed. A loop of its own, too, because a reward function that blocks the one
of the judges must not take the answers of modules along."""


_DEADLINE = "raise the policy's deadline, or lower its concurrency"
_LENGTH = "check the policy's model, and that prompt and reply fit its context (agent.max_..._tokens)"
FIXES = Fixes(
    {
        Failure.RATE_LIMIT: "lower the policy's concurrency",
        Failure.TIMEOUT: _DEADLINE,
        Failure.SERVER: "look at the log of the policy's server",
        Failure.CONNECTION: "check the policy's base_url and that its server runs",
        Failure.CUT: "look at the log of the policy's server, or of the proxy before it",
        Failure.GARBAGE: "base_url must be an OpenAI-compatible endpoint, e.g. http://localhost:8000/v1",
        Failure.EMPTY: "raise the module's token limit (agent.max_..._tokens), or turn thinking off at the server",
        Failure.REFUSED: "see the server's message",
        Failure.ADDRESS: "check the policy's base_url and the key in its api_key_env",
        Failure.DEADLINE: _DEADLINE,
    },
    {
        400: _LENGTH,
        401: "put a valid key into the environment variable named by the policy's api_key_env",
        403: "the key may not use this model: check the policy's model and api_key_env",
        404: "check the policy's base_url (it usually ends in /v1) and model",
        413: "the prompt is too long for the server: smaller chunks, or fewer entries retrieved",
        422: _LENGTH,
    },
)


class EndpointPolicy:
    """Asks an endpoint for each turn. Its turns have no tokens and are never trained.

    Args:
        section: an entry of the recipe's `policies:` that has a `base_url`.

    Raises:
        RecipeError: the address is none.
    """

    def __init__(self, section: PolicySection) -> None:
        self.section = section
        if not is_address(section.base_url or ""):
            why = f"{section.base_url!r} is not an address"
            raise RecipeError(f"policies: base_url of '{section.model}'", why, "e.g. http://localhost:8000/v1")
        self._chat = ChatEndpoint(
            base_url=section.base_url or "",
            settings="the policy's ",
            fixes=FIXES,
            tally=Tally(),
            api_key_env=section.api_key_env,
            concurrency=section.concurrency,
            deadline=section.deadline,
            attempts=section.attempts,
        )

    async def generate(self, messages: list[Message], *, module: str, max_tokens: int) -> Turn:
        """See :meth:`memfactory.policy.base.Policy.generate`.

        Raises:
            ServiceError: no reply with a text came, after as many attempts as the recipe allows.
        """
        body: dict[str, Any] = {
            "model": self.section.model,
            "messages": messages,
            "temperature": self.section.temperature,
            "max_tokens": max_tokens,
        }
        if self.section.top_p < 1:  # some servers refuse what they do not know
            body["top_p"] = self.section.top_p
        return await self._turn(body, module)

    async def _turn(self, body: dict[str, Any], module: str) -> Turn:
        """The turn that answers `body`, a request for a chat completion."""
        what = f"the endpoint of '{self.section.model}' gave no reply to module '{module}'"
        with boundary(ServiceError, what):
            try:
                reply = await asyncio.wrap_future(LOOP.start(self._chat.ask(body, _with_text)))
            except RequestFailed as failed:
                raise ServiceError(what, failed.why, failed.fix) from failed
        return Turn(
            module=module,
            prompt_ids=[],
            completion_ids=[],
            logprobs=[],
            text=reply.text or "",
            stop=StopReason.LENGTH if reply.finish == "length" else StopReason.STOP,
            messages=body["messages"],
            trainable=False,
            counts=(_count(reply, "prompt_tokens"), _count(reply, "completion_tokens")),
        )

    @property
    def greedy(self) -> bool:
        return self.section.temperature == 0

    def split(self, text: str, max_tokens: int) -> list[str]:
        """Not possible: an endpoint has no tokenizer to count with.

        Raises:
            RecipeError: always.
        """
        raise RecipeError(
            f"the endpoint of '{self.section.model}' cannot cut a text into chunks",
            "chunks are cut by the trained policy, whose tokens they are counted in",
            "give the endpoint to single modules (`modules:`) and leave a trained policy, or let the environment cut",
        )

    def metrics(self) -> dict[str, float]:
        """What happened since the last call, see :class:`memfactory.endpoints.tally.Tally`. Safe from any thread."""
        return self._chat.tally.take()

    def close(self) -> None:
        """Close its connections; the next call opens new ones. Not from within a coroutine of :data:`LOOP`."""
        LOOP.start(self._chat.aclose()).result(timeout=10)


def _count(reply: Completion, name: str) -> int:
    """Tokens as the endpoint counts them; 0 where it does not say."""
    count = reply.usage.get(name)
    return count if isinstance(count, int) else 0


def _with_text(completion: Completion) -> Completion:
    """`completion`, which has a text.

    Raises:
        RequestFailed: it has none, or one that a filter cut. That is no answer, so it must not count as an empty one.
    """
    if completion.finish == "content_filter":
        raise RequestFailed(Failure.EMPTY, "a filter of the server withheld the reply", "see the server's filter")
    if not completion.text:
        spent = completion.usage.get("completion_tokens")
        cost = f" though {spent} tokens were spent" if isinstance(spent, int) and spent else ""
        finish = f" (finish_reason {completion.finish})" if completion.finish else ""
        raise RequestFailed(Failure.EMPTY, f"the reply has no text{cost}{finish}")
    # half of a surrogate pair, which JSON can spell, is no character: tokenizers refuse it
    return replace(completion, text=completion.text.encode("utf-8", "replace").decode())

"""An endpoint's model in the place of the trained one: what an evaluation of an API asks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from transformers import PreTrainedTokenizerBase

from memfactory.draws import episode_seed
from memfactory.episode import Message, Turn
from memfactory.errors import ServiceError
from memfactory.policy.base import Sampling
from memfactory.policy.endpoint import EndpointPolicy
from memfactory.policy.rendering import pieces
from memfactory.recipe import PolicySection, nearest


class EndpointModel(EndpointPolicy):
    """A model behind an OpenAI-compatible API that answers for every module.

    Args:
        section: address, name and limits.
        tokenizer: chunks and baselines are cut in its tokens; the endpoint's own are not known.
        max_positions: longest prompt and completion together that the endpoint takes.
    """

    version: int | None = None
    elsewhere = True

    def __init__(
        self, section: PolicySection, tokenizer: PreTrainedTokenizerBase, max_positions: int | None = None
    ) -> None:
        super().__init__(section)
        self.tokenizer, self.max_positions = tokenizer, max_positions
        self._sampling, self._seed = Sampling(), 0

    async def generate(self, messages: list[Message], *, module: str, max_tokens: int) -> Turn:
        """See :meth:`EndpointPolicy.generate`. Draws are asked for by the episode's seed; a server may ignore it."""
        body: dict[str, Any] = {
            "model": self.section.model,
            "messages": messages,
            "temperature": self._sampling.temperature,
            "max_tokens": max_tokens,
        }
        if self._sampling.top_p < 1:
            body["top_p"] = self._sampling.top_p
        seed = episode_seed(self._seed, repr(messages).encode("utf-8", "replace"))
        if seed is not None and not self.greedy:
            body["seed"] = seed
        return await self._turn(body, module)

    @property
    def greedy(self) -> bool:
        return self._sampling.temperature == 0

    @contextmanager
    def drawing(self, sampling: Sampling, seed: int) -> Iterator[None]:
        """Ask for draws by `sampling`, from `seed` on."""
        before = self._sampling, self._seed
        self._sampling, self._seed = sampling, seed
        try:
            yield
        finally:
            self._sampling, self._seed = before

    def seed(self, seed: int) -> None:
        self._seed = seed

    def split(self, text: str, max_tokens: int) -> list[str]:
        """See :meth:`memfactory.policy.base.Policy.split`."""
        return pieces(self.tokenizer, text, max_tokens)

    def use(self, model: Any, version: int | None = None) -> None:
        """There is nothing to send: the endpoint has weights of its own."""

    def confirm(self) -> None:
        """Nobody can tell which weights an endpoint has."""


def check_endpoint(section: PolicySection) -> None:
    """Ask the endpoint for its models, before anything long is begun.

    Raises:
        ServiceError: it does not answer, refuses the key, or does not serve the model.
    """
    url = (section.base_url or "").rstrip("/") + "/models"
    key = os.environ.get(section.api_key_env, "")
    what = f"the endpoint {section.base_url}"
    try:
        reply = httpx.get(url, headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=30.0)
    except httpx.HTTPError as error:
        raise ServiceError(what, f"{type(error).__name__}: {error}", "check the address and that it runs") from error
    if reply.status_code in (401, 403):
        fix = f"put a valid key into the environment variable {section.api_key_env}"
        raise ServiceError(what, f"it refuses the key (HTTP {reply.status_code})", fix)
    if reply.status_code == 404:
        return  # not every API lists its models
    try:
        reply.raise_for_status()
        served = [str(model["id"]) for model in reply.json()["data"]]
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        why = f"it does not list its models (HTTP {reply.status_code})"
        raise ServiceError(what, why, "it must be OpenAI-compatible, and usually ends in /v1") from error
    if section.model not in served:
        raise ServiceError(what, f"it does not serve '{section.model}'", nearest(str(section.model), served))

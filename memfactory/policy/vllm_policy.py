"""The vLLM backend: turns come from servers that hold the trained weights."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from memfactory.draws import episode_seed, seed_of
from memfactory.episode import Message, StopReason, Turn
from memfactory.loops import BackgroundLoop
from memfactory.policy.base import Sampling
from memfactory.policy.rendering import check_fits, digest, pieces, prompt_of
from memfactory.policy.vllm_pool import ServerPool
from memfactory.policy.vllm_server import Draw

LOG = logging.getLogger("memfactory.rollouts")
CLOSING = 60.0
"""Seconds for leaving all servers."""
LOOP = BackgroundLoop("memfactory-vllm")
"""Where servers are spoken to. A frozen model in this process holds up the loop of the episodes while it decodes."""


@dataclass
class VLLMPolicy:
    """A policy whose turns are sampled by vLLM servers.

    Each completion is drawn from a seed of its own, made from the seed of the rollout, the prompt, and how often that
    prompt was asked before, or from the episode's own (:mod:`memfactory.draws`): the order in which requests arrive
    decides nothing.
    """

    pool: ServerPool
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    eos_ids: Sequence[int]
    template_options: dict[str, Any] = field(default_factory=dict)
    base: bool = False
    """Sample from the base model, the weights as they were before training."""
    push: Callable[[Any, int | None], None] | None = None
    """Sends a model's weights to the servers; None where another policy of the same pool does."""
    ends: list[Callable[[], object]] = field(default_factory=list)
    """What there is to do when it is closed: end a server of this process's own, remove a folder."""
    version: int | None = None
    """Optimizer steps behind the weights that are served; None before any were sent."""
    elsewhere: bool = True
    """Its log-probs are another engine's than the trainer's."""
    _seed: int = 0
    _asked: Counter[bytes] = field(default_factory=Counter)

    async def generate(self, messages: list[Message], *, module: str, max_tokens: int) -> Turn:
        """See :meth:`memfactory.policy.base.Policy.generate`."""
        prompt_ids = prompt_of(self.tokenizer, messages, module, self.template_options)
        check_fits(len(prompt_ids), max_tokens, self.max_positions, module)
        draw = Draw(prompt_ids, self.sampling, max_tokens, self.eos_ids, self._next_seed(prompt_ids))
        sampled = await asyncio.wrap_future(LOOP.start(self.pool.sample(draw, base=self.base)))
        return Turn(
            module=module,
            prompt_ids=prompt_ids,
            completion_ids=sampled.ids,
            logprobs=sampled.logprobs,
            text=cast(str, self.tokenizer.decode(sampled.ids, skip_special_tokens=True)),
            stop=StopReason.LENGTH if sampled.finish == "length" else StopReason.STOP,
            messages=messages,
            policy_version=(self.version if sampled.version is None else sampled.version) or 0,
        )

    @property
    def greedy(self) -> bool:
        return self.sampling.temperature == 0

    @property
    def max_positions(self) -> int | None:
        """Longest prompt and completion together; None where no server says."""
        return self.pool.positions

    def use(self, model: Any, version: int | None = None) -> None:
        """Have the servers sample from the weights of `model`; nothing is sent where they have that `version`.

        Raises:
            EngineError: the weights could not be sent, or a server shows others.
        """
        if self.push is not None and (version is None or version != self.version):
            self.push(model, version)
        self.version = version

    @contextmanager
    def drawing(self, sampling: Sampling, seed: int) -> Iterator[None]:
        """Draw by `sampling` from `seed` on; afterwards everything is as it was."""
        before = self.sampling, self._seed, self._asked
        self.sampling = sampling
        self.seed(seed)
        try:
            yield
        finally:
            self.sampling, self._seed, self._asked = before

    def seed(self, seed: int) -> None:
        """Begin the draws anew from `seed`."""
        self._seed, self._asked = seed, Counter()

    def split(self, text: str, max_tokens: int) -> list[str]:
        """See :meth:`memfactory.policy.base.Policy.split`."""
        return pieces(self.tokenizer, text, max_tokens)

    def beside(self, sampling: Sampling, *, base: bool) -> VLLMPolicy:
        """The same servers for modules that are not trained: the weights of now, or those from before training."""
        return VLLMPolicy(self.pool, self.tokenizer, sampling, self.eos_ids, self.template_options, base)

    def apart(self) -> VLLMPolicy:
        """The same weights at the same servers for another batch at the same time, with draws of its own."""
        return replace(self, push=None, ends=[], _asked=Counter())

    def confirm(self) -> None:
        """See :meth:`memfactory.policy.base.TrainedPolicy.confirm`."""
        LOOP.start(self.pool.confirm()).result()

    def metrics(self) -> dict[str, float]:
        """What happened at the servers since the last call. Safe from any thread."""
        taken = self.pool.servers[0].tally.take()
        taken |= {"canary_difference": self.pool.difference, "taken_out": float(self.pool.taken_out)}
        hits = LOOP.start(self.pool.cache_hit_rate()).result()
        return taken if hits is None else taken | {"prefix_cache_hit_rate": hits}

    def close(self) -> None:
        """Have the servers forget the adapters, and close the connections. The one that pushes does it for all."""
        try:
            if self.push is not None:
                LOOP.start(self._left()).result()
        finally:
            for end in self.ends:
                end()

    async def _left(self) -> None:
        """What it takes to close never spoils a run that has ended: what a server keeps, the next one clears away."""
        try:
            async with asyncio.timeout(CLOSING):
                await self.pool.aclose()
        except Exception as error:
            urls = ", ".join(server.url for server in self.pool.servers)
            why = f"not within {CLOSING:g} s" if isinstance(error, TimeoutError) else str(error)
            LOG.warning("adapters of this run may be left at %s: %s; its next start unloads them", urls, why)

    def _next_seed(self, prompt_ids: Sequence[int]) -> int:
        prompt = digest(prompt_ids)
        own = episode_seed(self._seed, prompt)
        if own is not None:
            return own
        self._asked[prompt] += 1
        return seed_of(f"{self._seed}/{self._asked[prompt]}/", prompt)

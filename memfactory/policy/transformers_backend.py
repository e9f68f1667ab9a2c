"""The transformers backend: pending `generate` calls of all episodes are decoded together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from random import Random
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memfactory.draws import episode_seed
from memfactory.episode import Message, StopReason, Turn
from memfactory.errors import EngineError
from memfactory.policy.base import Sampling
from memfactory.policy.decoding import Decoding, Prefilled, Sampler, decode
from memfactory.policy.prefix_support import Support
from memfactory.policy.rendering import check_fits, digest, pieces, prompt_of


@dataclass(slots=True)
class _Request:
    sequence: Decoding
    reply: asyncio.Future[None]
    wave: int = 0
    """Counts the moments at which a batch was chosen: requests that were new at the same one have the same number."""

    @property
    def size(self) -> int:
        """Most positions it can take."""
        return len(self.sequence.prompt_ids) + self.sequence.max_tokens


class TransformersPolicy:
    """A model in this process behind a queue.

    The first `generate` call of a quiet moment starts a drain. The drain waits until no episode that
    can still run adds a request, and decodes what is pending in batches of similar length within the
    token budget, the newest requests first. Between decoding steps the event loop runs, so an episode
    whose turn has ended goes on while the others are still being decoded.

    Everything happens in the thread of the event loop: a second thread would bring a second OpenMP
    pool that fights with the first for the same cores.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        sampling: Sampling | None = None,
        eos_ids: Sequence[int] | None = None,
        token_budget: int = 65536,
        seed: int = 0,
        version: int = 0,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        template_options: dict[str, Any] | None = None,
        around: Callable[[], AbstractContextManager[object]] | None = None,
        share_prefix: bool = True,
    ) -> None:
        """
        Args:
            model: causal language model, already on its device.
            tokenizer: its tokenizer, with a chat template.
            sampling: how tokens are drawn; default temperature 1.
            eos_ids: ids that end a turn; default the tokenizer's.
            token_budget: most cache positions (sequences x longest sequence) in one batch.
            seed: seed of the draws.
            version: optimizer steps behind the weights, recorded on every turn.
            autocast: context in which the model runs, e.g. bfloat16 autocast.
            template_options: extra variables of the chat template.
            around: context entered for every forward pass and left before other policies on the same model may
                run, e.g. one in which its adapter is off.
            share_prefix: compute what pending prompts have in common once, if the model lets itself.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.sampling = sampling or Sampling()
        self.eos_ids = list(eos_ids or [tokenizer.eos_token_id])
        self.token_budget = token_budget
        self.version: int | None = version
        self.elsewhere = False
        self.autocast = autocast
        self.template_options = template_options or {}
        self.around = around
        plain = cast(Any, model).get_base_model() if hasattr(model, "peft_config") else model
        self.share_prefix = share_prefix
        self._sharing = Support(plain, share_prefix)
        self._prefilled = Prefilled()
        self.generator = torch.Generator(device=model.device).manual_seed(seed)
        self._seed = seed
        self.seconds = 0.0
        """Time spent in the model, decoding included."""
        self.generated_tokens = 0
        self._pending: list[_Request] = []
        self._wave = 0
        self._drain: asyncio.Task[None] | None = None

    async def generate(self, messages: list[Message], *, module: str, max_tokens: int) -> Turn:
        """See :meth:`memfactory.policy.base.Policy.generate`."""
        prompt_ids = prompt_of(self.tokenizer, messages, module, self.template_options)
        check_fits(len(prompt_ids), max_tokens, self.max_positions, module)
        loop = asyncio.get_running_loop()
        own = episode_seed(self._seed, digest(prompt_ids))
        random = Random(own) if own is not None else None
        request = _Request(Decoding(prompt_ids, max_tokens, random=random), loop.create_future())
        self._pending.append(request)
        if self._drain is None or self._drain.done():
            self._drain = loop.create_task(self._run())
        await request.reply
        sequence = request.sequence
        assert sequence.stop is not None
        ids = sequence.completion_ids
        return Turn(
            module=module,
            prompt_ids=prompt_ids,
            completion_ids=ids,
            logprobs=sequence.logprobs,
            text=cast(str, self.tokenizer.decode(ids, skip_special_tokens=True)),
            stop=StopReason(sequence.stop),
            messages=messages,
            policy_version=self.version or 0,
        )

    @property
    def greedy(self) -> bool:
        return self.sampling.temperature == 0

    @property
    def max_positions(self) -> int | None:
        """Longest prompt and completion together; None where the model does not say."""
        return getattr(self.model.config, "max_position_embeddings", None)

    @contextmanager
    def drawing(self, sampling: Sampling, seed: int) -> Iterator[None]:
        """Draw by `sampling` from `seed` on; afterwards everything is as it was."""
        before = self.sampling, self._seed, self.generator.get_state()
        self.sampling = sampling
        self.seed(seed)
        try:
            yield
        finally:
            self.sampling, self._seed, state = before
            self.generator.set_state(state)

    def seed(self, seed: int) -> None:
        """Begin the draws anew from `seed`."""
        self._seed = seed
        self.generator.manual_seed(seed)

    def split(self, text: str, max_tokens: int) -> list[str]:
        """See :meth:`memfactory.policy.base.Policy.split`."""
        return pieces(self.tokenizer, text, max_tokens)

    def use(self, model: PreTrainedModel, version: int | None = None) -> None:
        """Sample from `model`, which is in this process; without `version` that stays what it was."""
        self.model = model
        self.version = self.version if version is None else version

    def confirm(self) -> None:
        """Turns come from the model that `use` gave, and no other."""

    def close(self) -> None:
        """Nothing stays open."""

    def metrics(self) -> dict[str, float]:
        """Ids of prompts since the last call, over those that were computed; above 1 where prefixes were shared."""
        counted, self._prefilled = self._prefilled, Prefilled()
        return {"real_over_computed_prefill": counted.raw / counted.computed} if counted.raw else {}

    async def _run(self) -> None:
        while self._pending:
            waiting = -1
            while waiting != len(self._pending):  # until no running episode adds a request
                waiting = len(self._pending)
                for _ in range(3):  # an episode needs a few turns of the loop from reply to next request
                    await asyncio.sleep(0)
            # a cancelled call, of this rollout or of one that failed, is nobody's any more
            self._pending = [request for request in self._pending if not request.reply.done()]
            batch = self._next_batch()
            try:
                await self._decode(batch)
            except Exception as error:
                failure = EngineError("generation failed", f"{type(error).__name__}: {error}")
                failure.__cause__ = error
                for request in [*batch, *self._pending]:
                    if not request.reply.done():
                        request.reply.set_exception(failure)
                self._pending = []
                return

    def _next_batch(self) -> list[_Request]:
        """Take what is decoded now from the queue: the requests that came last, the longest first, as many as fit.

        Last come, first served lets the episodes of one batch go on to their end before others begin, where not all
        fit: their scoring (a judge, a tool) then overlaps with the generation of the rest.
        """
        self._wave += 1
        for request in self._pending:
            request.wave = request.wave or self._wave
        batch: list[_Request] = []
        left: list[_Request] = []
        for request in sorted(self._pending, key=lambda r: (-r.wave, -r.size)):
            # a batch costs its sequences times the longest of them, which is its first
            fits = not batch or (
                request.size <= batch[0].size and (len(batch) + 1) * batch[0].size <= self.token_budget
            )
            (batch if fits else left).append(request)
        self._pending = left
        return batch

    async def _decode(self, batch: list[_Request]) -> None:
        replies = {id(request.sequence): request.reply for request in batch}
        steps = decode(
            self.model,
            [request.sequence for request in batch],
            Sampler(self.sampling, self.generator),
            eos_ids=self.eos_ids,
            pad_id=self.tokenizer.pad_token_id,
            sharing=self._sharing,
            prefilled=self._prefilled,
        )
        with _kept_casts():
            while True:
                begin = time.perf_counter()
                # entered for each pass: another policy may decode in between, in a context of its own
                with self.autocast(), self.around() if self.around is not None else nullcontext():
                    finished = next(steps, None)
                self.seconds += time.perf_counter() - begin
                if finished is None:
                    return
                for sequence in finished:
                    self.generated_tokens += len(sequence.completion_ids)
                    reply = replies[id(sequence)]
                    if not reply.done():  # done already: its caller was cancelled
                        reply.set_result(None)
                if finished:
                    await asyncio.sleep(0)


@contextmanager
def _kept_casts() -> Iterator[None]:
    """Inside, the weights that autocast has cast are kept from one of its contexts to the next."""
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()

"""Batched decoding with a key-value cache that hands back each sequence as soon as it ends.

`model.generate` returns when the longest sequence is done and keeps computing the finished ones.
Here a finished sequence is yielded at once and leaves the batch at the next compaction, the sampled
ids and their log-probabilities are recorded on the way, and nothing but :class:`Sampling` decides how
tokens are drawn. The logit filters themselves are `transformers`' own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from memfactory.episode import StopReason
from memfactory.policy.base import Sampling
from memfactory.policy.branches import KEYWORD
from memfactory.policy.decode_attention import grouped
from memfactory.policy.few_rows import gaining, turned
from memfactory.policy.prefill import Prefilled, Started, prefill
from memfactory.policy.prefix_support import Support

# Share of finished sequences at which the cache is compacted: copying it costs about as much as one
# decoding step of the sequences that stay, so doing it for every single one would not pay.
_COMPACT_AT = 0.25


@dataclass(slots=True)
class Decoding:
    """One sequence being decoded."""

    prompt_ids: list[int]
    max_tokens: int
    completion_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stop: StopReason | None = None
    random: Random | None = None
    """Where its draws come from; None: from the sampler's generator, which all sequences share."""


class Sampler:
    """Draws next tokens and records their log-probabilities."""

    def __init__(self, sampling: Sampling, generator: torch.Generator) -> None:
        self.sampling = sampling
        self.generator = generator
        self.filters = LogitsProcessorList()
        if sampling.temperature > 0:
            if sampling.top_k > 0:
                self.filters.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                self.filters.append(TopPLogitsWarper(sampling.top_p))
            if sampling.min_p > 0:
                self.filters.append(MinPLogitsWarper(sampling.min_p))
        self.penalty = (
            RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty) if sampling.repetition_penalty != 1 else None
        )

    def draw(
        self, logits: Tensor, context_ids: Tensor | None, own: Sequence[Random | None] = ()
    ) -> tuple[Tensor, Tensor]:
        """Next ids (B,) and their log-probs (B,) from `logits` (B, V).

        Log-probs are those of the full softmax at the sampling temperature, which is what the trainer
        computes again; filters change only which ids can be drawn. `context_ids` (B, L) is what the
        repetition penalty looks at, `own` (B) each sequence's own random numbers, where it has some.
        """
        logits = logits.float()
        temperature = self.sampling.temperature
        log_probs = (logits / temperature if temperature > 0 else logits).log_softmax(-1)  # (B, V)
        scores = log_probs
        if self.penalty is not None:
            penalised = self.penalty(cast(Any, context_ids), cast(Any, logits))
            scores = penalised / temperature if temperature > 0 else penalised
        if temperature == 0:
            ids = scores.argmax(-1)
        else:
            if self.filters:
                scores = self.filters(cast(Any, context_ids), cast(Any, scores))
            ids = self._choose(scores.softmax(-1), own)
        return ids, log_probs.gather(1, ids[:, None]).squeeze(1)

    def _choose(self, probs: Tensor, own: Sequence[Random | None]) -> Tensor:
        """One id per row of `probs` (B, V), by inverting the cumulative distribution.

        `torch.multinomial` draws a random number for every word of the vocabulary, on CPU one after the other.
        Double precision keeps the smallest probabilities apart.
        """
        cumulative = probs.double().cumsum(-1)  # (B, V)
        draw = self._uniform(len(probs), own).to(probs.device)[:, None]
        # the first id whose cumulative probability exceeds the draw; ids of probability 0 never do
        ids = torch.searchsorted(cumulative, draw * cumulative[:, -1:], right=True)
        return ids.squeeze(1).clamp(max=probs.shape[-1] - 1)

    def _uniform(self, count: int, own: Sequence[Random | None]) -> Tensor:
        """(B,) in [0, 1)"""
        numbers = [random.random() for random in own if random is not None]
        if len(numbers) == count:
            return torch.tensor(numbers, dtype=torch.float64)
        drawn = torch.rand(count, generator=self.generator, device=self.generator.device, dtype=torch.float64)
        rows = [row for row, random in enumerate(own) if random is not None]
        drawn[rows] = torch.tensor(numbers, dtype=torch.float64, device=drawn.device)
        return drawn


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    sequences: Sequence[Decoding],
    sampler: Sampler,
    *,
    eos_ids: Sequence[int],
    pad_id: int,
    sharing: Support,
    prefilled: Prefilled,
) -> Iterator[list[Decoding]]:
    """Decode `sequences` together; after every step yield those that just finished (often none).

    The caller may do other work between steps. Peak memory is the cache of
    ``len(sequences) x (longest prompt + tokens so far)`` positions. A prompt that several sequences share,
    as in the first turn of a group, is computed once.

    Args:
        sharing: whether beginnings that prompts have in common are computed once as well.
        prefilled: counts ids of prompts, all of them and those that were computed.
    """
    with grouped(model):
        prompts = [sequence.prompt_ids for sequence in sequences]
        started = prefill(
            model,
            prompts,
            pad_id,
            sharing=sharing,
            keep_ids=sampler.penalty is not None,
            count=prefilled,
        )
        yield from _decode(model, sequences, sampler, eos_ids, started)


def _decode(
    model: PreTrainedModel, sequences: Sequence[Decoding], sampler: Sampler, eos_ids: Sequence[int], started: Started
) -> Iterator[list[Decoding]]:
    device = model.device
    live = list(sequences)
    cache, logits, mask, positions = started.cache, started.logits, started.mask, started.positions
    context, kept = started.context, started.kept
    ends, layers = frozenset(eos_ids), gaining(model)
    done: list[bool] = [False] * len(live)
    while True:
        next_ids, logprobs = sampler.draw(logits, context, [sequence.random for sequence in live])
        finished: list[Decoding] = []
        for row, (token, logprob) in enumerate(zip(next_ids.tolist(), logprobs.tolist(), strict=True)):
            if done[row]:
                continue
            sequence = live[row]
            sequence.completion_ids.append(token)
            sequence.logprobs.append(logprob)
            if token in ends:
                sequence.stop = StopReason.STOP
            elif len(sequence.completion_ids) >= sequence.max_tokens:
                sequence.stop = StopReason.LENGTH
            if sequence.stop is not None:
                done[row] = True
                finished.append(sequence)
        yield finished

        if all(done):
            return
        if sum(done) >= _COMPACT_AT * len(done):
            keep = torch.tensor([row for row, over in enumerate(done) if not over], device=device)
            cache.batch_select_indices(keep)
            if kept is not None:
                kept.select(keep)
            next_ids, mask, positions = next_ids[keep], mask[keep], positions[keep]
            context = context[keep] if context is not None else None
            live = [sequence for sequence, over in zip(live, done, strict=True) if not over]
            done = [False] * len(live)
        step_ids = next_ids[:, None]
        mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
        positions = positions + 1
        if context is not None:
            context = torch.cat([context, step_ids], dim=1)
        how: dict[str, Any] = {"attention_mask": mask}
        if kept is not None:
            how = {"attention_mask": mask[:, None, None].bool(), KEYWORD: kept}
        with turned(layers):
            logits = model(
                input_ids=step_ids,
                **how,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]  # (B, V)

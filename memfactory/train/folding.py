"""From our rows to what TRL's asynchronous trainer takes: one advantage for a sample, and a mean over tokens.

TRL's loss of a forward pass is, over its trained tokens i with the sample's advantage A_i and the ratio r_i,

    - sum_i min(r_i A_i, clip(r_i) A_i) / N

with N the trained tokens of that pass. Two things make it the loss of :mod:`memfactory.train.rows`, exactly and
whatever the passes:

- A weight w > 0 of a row is folded into the advantage: min(r w A, clip(r) w A) = w min(r A, clip(r) A).
- N is that of the whole generation batch, in every pass (:func:`passes`), and an update is made from all passes over
  one batch. TRL's own batcher closes a pass when the next sample does not fit and averages over passes, so that a
  token of a small pass would count more than one of a large pass.

A row whose tokens have several advantages becomes as many samples, each of which trains the tokens of one. They share
all of their tokens, which TRL's packing computes once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from trl.experimental.async_grpo.async_grpo_trainer import DataCollatorForRollout
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample
from trl.experimental.async_grpo.packing import TreeRow

from memfactory.train.rows import Row


@dataclass(frozen=True)
class Folded:
    """A sample of TRL's, and the episode it comes from."""

    sample: RolloutSample
    episode: int
    """Index in the batch."""


def fold(rows: Sequence[Row], weights: Sequence[float], groups: Sequence[int]) -> list[Folded]:
    """Samples of `rows`; tokens without an advantage are in none, because they have no gradient.

    Args:
        weights: of each row's tokens, see :func:`memfactory.train.rows.loss_weights`; above 0.
        groups: number of the group of each episode.
    """
    found: list[Folded] = []
    for row, weight in zip(rows, weights, strict=True):
        before = len(row.prompt_ids)
        ids = np.array([*row.prompt_ids, *row.completion_ids], dtype=np.int64)  # (T,)
        trained = np.array([0] * before + row.trained, dtype=np.int64)
        advantages = np.array([0.0] * before + row.advantages)
        logprobs = np.array([0.0] * before + row.logprobs, dtype=np.float32)
        for value in dict.fromkeys(advantages[trained == 1].tolist()):
            if value == 0:
                continue
            mask = ((advantages == value) & (trained == 1)).astype(np.int64)
            sample = RolloutSample(
                prompt=[],
                completion=[],
                input_ids=ids,
                completion_mask=mask,
                old_log_probs=logprobs,
                advantage=value * weight,
                model_version=row.version,
                group_id=groups[row.episode],
                metrics={},
            )
            found.append(Folded(sample, row.episode))
    return found


def split_stale(samples: Sequence[Folded], step: int, most: int) -> tuple[list[Folded], list[Folded]]:
    """Those sampled by weights at most `most` updates older than those after `step` updates, and the others."""
    fresh = [own for own in samples if step - own.sample.model_version <= most]
    return fresh, [own for own in samples if step - own.sample.model_version > most]


def pack(samples: Sequence[Folded], budget: int) -> list[TreeRow]:
    """Forward passes of at most `budget` tokens each; a prefix that samples of a pass share is counted once.

    A sample longer than the budget gets a pass of its own: it cannot be cut.
    """
    passes: list[TreeRow] = []
    # in lexical order those with the longest prefix in common stand beside each other
    for own in sorted((own.sample for own in samples), key=lambda sample: sample.input_ids.tolist()):
        entry = {
            "input_ids": own.input_ids,
            "completion_mask": own.completion_mask,
            "old_log_probs": own.old_log_probs,
            "advantage": own.advantage,
            "group_id": own.group_id,
            "metrics": own.metrics,
        }
        if not passes or not passes[-1].fits(entry, budget):
            passes.append(TreeRow())
        passes[-1].add(entry)
    return passes


def passes(
    samples: Sequence[Folded], budget: int, tokens: float, collate: DataCollatorForRollout
) -> list[Mapping[str, Any]]:
    """What TRL's ``compute_loss`` takes, one for each forward pass of the update.

    Args:
        tokens: N, the trained tokens of the generation batch, those without signal included.
        collate: TRL's collator, for one process.
    """
    batches: list[Mapping[str, Any]] = []
    for row in pack(samples, budget):
        batch = collate([[row]])
        batch["global_n_tokens"] = torch.full_like(batch["global_n_tokens"], max(tokens, 1.0))
        batches.append(batch)
    return batches

"""Rows: from turns with credit to training sequences.

Turns whose prompt continues the sequence before it merge into one row; a rewritten context starts a
new row. Every sampled id of a trainable turn stands in exactly one row, exactly as it was sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from memfactory.episode import Episode


@dataclass(slots=True)
class Row:
    """One training sequence: a prompt and the tokens after it.

    The lists after `prompt_ids` have one entry per token after the prompt.
    """

    episode: int
    """Index of its episode in the batch."""
    prompt_ids: list[int]
    completion_ids: list[int] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)
    """1 where the policy sampled the token, 0 where it came from outside."""
    advantages: list[float] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """The sampler's; 0 where not trained."""
    prefix_key: str = ""
    """Rows of a group with the same key were prompted alike up to the memory."""
    shared_prefix: int = 0
    """Leading prompt tokens this row has in common with every other row of the same `prefix_key`."""
    version: int = 0
    """Of the oldest weights that sampled one of its turns."""

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def trained_tokens(self) -> int:
        return sum(self.trained)


def build_rows(episodes: Sequence[Episode]) -> list[Row]:
    """Rows of all trainable turns, in episode and turn order."""
    rows: list[Row] = []
    for index, episode in enumerate(episodes):
        last: Row | None = None
        for turn in episode.turns:
            if not turn.trainable:
                continue
            size = len(turn.completion_ids)
            whole = last.prompt_ids + last.completion_ids if last is not None else []
            if last is not None and turn.prompt_ids[: len(whole)] == whole:
                outside = turn.prompt_ids[len(whole) :]
                last.completion_ids += outside + turn.completion_ids
                last.trained += [0] * len(outside) + [1] * size
                last.advantages += [0.0] * len(outside) + [turn.advantage] * size
                last.logprobs += [0.0] * len(outside) + turn.logprobs
                last.version = min(last.version, turn.policy_version)
            else:
                last = Row(
                    index,
                    list(turn.prompt_ids),
                    list(turn.completion_ids),
                    [1] * size,
                    [turn.advantage] * size,
                    list(turn.logprobs),
                    turn.prefix_key,
                    version=turn.policy_version,
                )
                rows.append(last)
    _mark_shared_prefixes(rows)
    return rows


def _mark_shared_prefixes(rows: Sequence[Row]) -> None:
    by_key: dict[str, list[Row]] = {}
    for row in rows:
        if row.prefix_key:
            by_key.setdefault(row.prefix_key, []).append(row)
    for members in by_key.values():
        if len(members) < 2:
            continue
        # the first and the last in lexical order differ earliest
        low, high = min(r.prompt_ids for r in members), max(r.prompt_ids for r in members)
        shared = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
        for row in members:
            row.shared_prefix = shared


def loss_weights(
    rows: Sequence[Row],
    tokens_per_episode: Sequence[int],
    loss_type: str,
    max_length: int,
    *,
    total: float | None = None,
    episodes: float | None = None,
) -> list[float]:
    """Weight of each row's trained tokens under TRL's ``dapo`` reduction, so that `loss_type`'s own
    normalisation results, whatever the rows and micro-batches.

    ``dapo`` divides the sum over tokens by N, the trained tokens of the generation batch. With a weight
    w on a token its share becomes w / N. E is the number of episodes, n_e the trained tokens of
    episode e, L the longest completion allowed:

    - ``dapo``, ``bnpo``, ``cispo``, ``vespo``: 1 / N, so w = 1
    - ``grpo``: 1 / (E n_e), the mean over episodes of the mean over their tokens
    - ``dr_grpo``: 1 / (E L)
    - ``luspo``: 1 / E

    Args:
        rows: rows that are trained.
        tokens_per_episode: trained tokens of every episode of the batch, dead groups included, as in TRL.
        loss_type: TRL's `loss_type`.
        max_length: TRL's `max_completion_length`.
        total: N where the batch is spread over ranks; default the sum of `tokens_per_episode`.
        episodes: E where the batch is spread over ranks; default those of `tokens_per_episode` above 0.
    """
    total = sum(tokens_per_episode) if total is None else total
    episodes = sum(tokens > 0 for tokens in tokens_per_episode) if episodes is None else episodes
    if loss_type in ("dapo", "bnpo", "cispo", "vespo"):
        return [1.0] * len(rows)
    if loss_type == "grpo":
        return [total / (episodes * tokens_per_episode[row.episode]) for row in rows]
    if loss_type == "dr_grpo":
        return [total / (episodes * max_length)] * len(rows)
    assert loss_type == "luspo", loss_type
    return [total / episodes] * len(rows)


def collate(rows: Sequence[Row], weights: Sequence[float], pad_id: int, size: int | None = None) -> dict[str, Tensor]:
    """The tensors TRL's loss takes: prompts padded left (B, P), completions padded right (B, T).

    ``tool_mask`` (B, T) carries the loss weight of each token: TRL multiplies its token mask by it.
    With `size`, padding rows of one masked token fill the batch up, so that ranks hold equally many.
    """
    count = max(size or 0, len(rows))
    prompt_width = max((len(row.prompt_ids) for row in rows), default=1)
    width = max((len(row.completion_ids) for row in rows), default=1)
    prompt_ids = torch.full((count, prompt_width), pad_id)
    prompt_mask = torch.zeros((count, prompt_width), dtype=torch.long)
    completion_ids = torch.full((count, width), pad_id)
    completion_mask = torch.zeros((count, width), dtype=torch.long)
    weight = torch.zeros((count, width))
    advantages = torch.zeros((count, width))
    logprobs = torch.zeros((count, width))
    for i, (row, w) in enumerate(zip(rows, weights, strict=True)):
        p, t = len(row.prompt_ids), len(row.completion_ids)
        prompt_ids[i, prompt_width - p :] = torch.tensor(row.prompt_ids)
        prompt_mask[i, prompt_width - p :] = 1
        completion_ids[i, :t] = torch.tensor(row.completion_ids)
        completion_mask[i, :t] = 1
        weight[i, :t] = torch.tensor(row.trained, dtype=torch.float) * w
        advantages[i, :t] = torch.tensor(row.advantages)
        logprobs[i, :t] = torch.tensor(row.logprobs)
    for i in range(len(rows), count):
        # one real prompt token and one completion token: the forward is defined, the loss weight is zero
        prompt_mask[i, -1] = 1
        completion_mask[i, 0] = 1
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "tool_mask": weight,
        "advantages": advantages,
        "sampling_per_token_logps": logprobs,
    }

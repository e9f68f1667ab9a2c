"""From prompts to a cache that decoding starts from: what prompts have in common is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from memfactory.policy.branches import Branches, able, groups
from memfactory.policy.decode_attention import GrowingLayer, growing_cache
from memfactory.policy.prefix_sharing import Packed, worth
from memfactory.policy.prefix_support import Support

PIECE = 8192
"""Most positions that are prefilled in one forward pass, where prompts are packed."""


@dataclass(slots=True)
class Prefilled:
    """Ids of prompts."""

    raw: int = 0
    computed: int = 0


@dataclass(slots=True)
class Started:
    """B sequences whose prompts are in the cache."""

    cache: DynamicCache
    logits: Tensor
    """(B, V), of the next token."""
    mask: Tensor
    """(B, P), 0 on the padding at the left: so every next token has the same index. With `kept`, of what follows."""
    positions: Tensor
    """(B, 1) of the last id."""
    context: Tensor | None
    """(B, P), what the repetition penalty sees: the prompt's own tokens also where the padding stands."""
    kept: Branches | None = None
    """Prefixes that are not in the cache, because several sequences continue them."""


def prefill(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    pad_id: int,
    *,
    sharing: Support,
    keep_ids: bool,
    count: Prefilled,
) -> Started:
    """Compute B `prompts`, each different one once.

    Args:
        sharing: whether beginnings that several have in common are computed once too.
        keep_ids: whether decoding wants to see the prompts' ids.
        count: what is computed is added here.
    """
    different = sum(map(len, set(map(tuple, prompts))))
    count.raw += sum(map(len, prompts))
    packed = Packed(prompts) if sharing.possible else None
    if packed is not None and worth(different, packed.unique) and sharing.settle(model, model.device):
        count.computed += packed.unique
        return _shared(model, packed, keep_ids=keep_ids)
    count.computed += different
    return _separate(model, prompts, pad_id, keep_ids=keep_ids)


def _separate(model: PreTrainedModel, prompts: Sequence[list[int]], pad_id: int, *, keep_ids: bool) -> Started:
    """Every different prompt by itself, in one forward pass."""
    different = list(dict.fromkeys(map(tuple, prompts)))  # U of them, U <= B
    rows, real = _left_padded([torch.tensor(prompt) for prompt in different], pad_id)
    ids, mask = rows.to(model.device), real.to(model.device)  # (U, P)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = growing_cache(model)
    logits = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]  # (U, V)
    if len(different) < len(prompts):  # from prompts to sequences
        row_of = {prompt: row for row, prompt in enumerate(different)}
        members = torch.tensor([row_of[tuple(prompt)] for prompt in prompts], device=model.device)  # (B,)
        cache.batch_select_indices(members)
        ids, logits, mask, positions = ids[members], logits[members], mask[members], positions[members]
    context = torch.where(mask.bool(), ids, ids[:, -1:]) if keep_ids else None
    return Started(cache, logits, mask, positions[:, -1:], context)


def _shared(model: PreTrainedModel, packed: Packed, *, keep_ids: bool) -> Started:
    """What prompts have in common once, in pieces. Prefixes stay where they are, if attention can read them there, and
    the cache has what is each sequence's own; else each gets a copy of all."""
    device = model.device
    cache = growing_cache(model)
    last = torch.tensor([int(path[-1]) for path in packed.paths])  # (B,) places
    rows: list[Tensor] = []
    order: list[Tensor] = []
    for piece in packed.pieces(device, PIECE):
        here = ((last >= piece.first) & (last < piece.first + piece.ids.shape[1])).nonzero()[:, 0]
        ends = (last[here] - piece.first).to(device)
        asked = ends if len(here) else torch.zeros_like(last[:1], device=device)  # "none" would mean all
        logits = model(**piece.arguments(), past_key_values=cache, use_cache=True, logits_to_keep=asked).logits[0]
        order.append(here)
        rows.append(logits[: len(here)])
    back = torch.cat(order).argsort().to(device)
    kept = None
    skip = [0] * len(packed.paths)
    if able(model, cache):
        found = groups(packed.paths)
        kept = Branches(cache, packed.paths, found, device)
        for members, prefix in found:
            for member in members:
                skip[member] = prefix
    own = [path[begin:] for path, begin in zip(packed.paths, skip, strict=True)]
    places, mask = _left_padded(own)
    for layer in cache.layers:
        cast(GrowingLayer, layer).spread(places.to(device))
    positions = torch.tensor([[len(path) - 1] for path in packed.paths])
    context = None
    if keep_ids:
        everything, real = _left_padded(packed.paths)
        ids = packed.ids[everything]
        context = torch.where(real.bool(), ids, ids[:, -1:]).to(device)
    return Started(cache, torch.cat(rows)[back], mask.to(device), positions.to(device), context, kept)


def _left_padded(rows: Sequence[Tensor], filling: int = 0) -> tuple[Tensor, Tensor]:
    """Rows and mask (B, L), 0 on the padding."""
    longest = max(map(len, rows))
    filled = torch.full((len(rows), longest), filling)
    mask = torch.zeros_like(filled)
    for number, row in enumerate(rows):
        filled[number, longest - len(row) :] = row
        mask[number, longest - len(row) :] = 1
    return filled, mask

"""Decoding from prefixes that are kept once: each sequence looks back at its group's prefix, and at what is its own.

A decoding step reads the whole cache of every sequence, which costs more than the weights do once prompts are a few
hundred tokens long. Members of a group that read the same copy of their prefix read it once for all of them: their
queries become one matrix. Scores of both parts go through one softmax, so results are those of separate caches up to
rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

KEYWORD = "prefix_branches"
"""Under this name a model's forward pass hands :class:`Branches` down to attention."""


def able(model: PreTrainedModel, cache: DynamicCache) -> bool:
    """Whether attention can say which layer it is, and computes in float32: scores of half precision would be rounded
    before the softmax, which fused kernels do not do."""
    layers = {getattr(module, "layer_idx", None) for module in model.modules()}
    keys = cast(DynamicLayer, cache.layers[0]).keys
    return layers >= set(range(len(cache.layers))) and keys is not None and keys.dtype == torch.float32


def groups(paths: Sequence[Tensor]) -> list[tuple[list[int], int]]:
    """Sequences by the prefix that is kept for them once, so that fewest positions are kept: members, its length.

    At least one position of each sequence is its own.

    Args:
        paths: places of each sequence's ids in a packed one (:class:`memfactory.policy.prefix_sharing.Packed`).
    """
    order = sorted(range(len(paths)), key=lambda index: paths[index].tolist())
    lengths = [len(paths[index]) for index in order]
    shared = [0, *(_common(paths[one], paths[other]) for one, other in pairwise(order))]
    fewest, begins = [0], [0]  # for the sequences before each one
    for end in range(1, len(order) + 1):
        best, begin = fewest[end - 1] + lengths[end - 1], end - 1
        prefix, total, most = lengths[end - 1] - 1, lengths[end - 1], 1
        for start in range(end - 2, -1, -1):
            prefix = min(prefix, shared[start + 1], lengths[start] - 1)
            if prefix <= 0:
                break
            total, most = total + lengths[start], most + 1
            if (cost := fewest[start] + total - (most - 1) * prefix) < best:
                best, begin = cost, start
        fewest.append(best)
        begins.append(begin)
    found: list[tuple[list[int], int]] = []
    end = len(order)
    while end:
        start = begins[end]
        prefix = min([*shared[start + 1 : end], *(length - 1 for length in lengths[start:end])])
        found.append((order[start:end], prefix))
        end = start
    return found[::-1]


def _common(one: Tensor, other: Tensor) -> int:
    size = min(len(one), len(other))
    differ = (one[:size] != other[:size]).nonzero()
    return int(differ[0, 0]) if len(differ) else size


class Branches:
    """T prefixes of at most C positions, and which of them each of B sequences continues.

    Args:
        cache: of one packed sequence, all layers (1, K, N, D); it is read.
        paths: as for :func:`groups`.
        found: what :func:`groups` found.
        device: of the model.
    """

    def __init__(
        self,
        cache: DynamicCache,
        paths: Sequence[Tensor],
        found: Sequence[tuple[list[int], int]],
        device: torch.device,
    ) -> None:
        longest = max(1, *(prefix for _, prefix in found))
        places = torch.zeros(len(found), longest, dtype=torch.long)
        padding = torch.ones(len(found), longest, dtype=torch.bool)
        group_of = torch.zeros(len(paths), dtype=torch.long)
        for number, (members, prefix) in enumerate(found):
            places[number, :prefix] = paths[members[0]][:prefix]
            padding[number, :prefix] = False
            group_of[members] = number
        places = places.to(device)
        layers = [cast(DynamicLayer, layer) for layer in cache.layers]
        self._keys = [_taken(cast(Tensor, layer.keys), places) for layer in layers]  # (T, K, C, D)
        self._values = [_taken(cast(Tensor, layer.values), places) for layer in layers]
        self._padding = padding.to(device)  # (T, C)
        self._padded = bool(padding.any())
        self._arrange(group_of.to(device))

    def _arrange(self, group_of: Tensor) -> None:
        """Where the queries of B sequences stand among those of their groups, each filled up to the largest, G."""
        self._group_of = group_of  # (B,)
        counts = group_of.bincount(minlength=len(self._padding))
        self._largest = int(counts.max())
        order = group_of.argsort(stable=True)
        first = counts.cumsum(0) - counts
        within = torch.arange(len(order), device=order.device) - first[group_of[order]]
        self._place = torch.empty_like(group_of)  # (B,) in T G
        self._place[order] = group_of[order] * self._largest + within
        self._member = torch.zeros(len(counts) * self._largest, dtype=torch.long, device=order.device)  # (T G,)
        self._member[self._place] = torch.arange(len(order), device=order.device)
        own = torch.arange(len(self._member), device=order.device)
        self._in_order = len(own) == len(order) and torch.equal(self._member, own)
        """Whether sequences stand group by group, in groups of one size: then nothing needs to be moved."""

    def select(self, rows: Tensor) -> None:
        """Keep the sequences `rows`, and the prefixes that one of them continues."""
        alive, group_of = self._group_of[rows].unique(return_inverse=True)
        if len(alive) < len(self._padding):
            self._padding = self._padding[alive]
            self._padded = bool(self._padding.any())
            self._keys = [keys[alive] for keys in self._keys]
            self._values = [values[alive] for values in self._values]
        self._arrange(group_of)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float | None
    ) -> Tensor:
        """Attention of one new token per sequence.

        Args:
            module: the layer's attention.
            query: (B, H, 1, D).
            key: (B, K, S, D), each sequence's own; K divides H.
            value: as `key`.
            seen: (B, 1, 1, S), False on padding.

        Returns:
            (B, 1, H, D).
        """
        size, heads, _, width = query.shape
        key_heads = key.shape[1]
        layer = int(module.layer_idx)  # type: ignore[arg-type]  # `able` has seen that it is there
        q = query.reshape(size, key_heads, heads // key_heads, width) * (scale or width**-0.5)  # (B, K, H / K, D)
        shared = self._grouped(q) @ self._keys[layer].transpose(-1, -2)  # (T, K, G H / K, C)
        if self._padded:
            shared.masked_fill_(self._padding[:, None, None], float("-inf"))
        own = (q @ key.transpose(-1, -2)).masked_fill_(~seen, float("-inf"))  # (B, K, H / K, S)
        # scores of prefixes stay with their groups: there are more of them than of what is each sequence's own
        share = torch.cat([shared, self._grouped(own)], dim=-1).softmax(-1)  # (T, K, G H / K, C + S)
        over_shared, over_own = share.split([shared.shape[-1], own.shape[-1]], dim=-1)
        out = self._alone(over_shared @ self._values[layer], q.shape[2])
        out += self._alone(over_own, q.shape[2]) @ value
        return out.reshape(size, 1, heads, width)

    def _grouped(self, states: Tensor) -> Tensor:
        """(B, K, R, X) of sequences as (T, K, G R, X) of groups."""
        taken = states if self._in_order else states[self._member]
        return taken.unflatten(0, (-1, self._largest)).transpose(1, 2).flatten(2, 3)  # from (T, G, K, R, X)

    def _alone(self, states: Tensor, times: int) -> Tensor:
        """The way back; `times` is R."""
        parted = states.unflatten(2, (self._largest, times)).transpose(1, 2).flatten(0, 1)  # (T G, K, R, X)
        return parted if self._in_order else parted[self._place]


def _taken(states: Tensor, places: Tensor) -> Tensor:
    """(1, K, N, D) at `places` (T, C), as (T, K, C, D)."""
    return states[0].transpose(0, 1)[places].transpose(1, 2).contiguous()

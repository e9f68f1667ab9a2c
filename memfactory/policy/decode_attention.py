"""What decoding does to the key-value cache, without copying it.

Two copies cost more than the arithmetic of a small model's decoding step: `DynamicCache` concatenates every
layer's cache with the new token, and with grouped-query attention the cache is repeated for every query head.
:class:`GrowingLayer` writes into spare room instead, and :func:`grouped_attention` attends to the cache as it
is. Results are those of `transformers`' own `sdpa` up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from memfactory.policy import branches, prefix_sharing

NAME = "memfactory_sdpa"
"""Under this name transformers knows :func:`grouped_attention`."""
_ROOM = 64
"""Positions of spare room made at a time: one copy of the cache in 64 decoding steps instead of 64."""


class GrowingLayer(DynamicLayer):
    """A cache layer with spare room behind its last position. `keys` and `values` are views (B, heads, L, D)."""

    _keys: Tensor
    _values: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._keys, self._values = key_states, value_states  # a prefill needs no room until it is continued
            self.keys, self.values = key_states, value_states
            return self.keys, self.values
        assert self.keys is not None
        assert self.values is not None
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        if end > self._keys.shape[-2]:
            self._keys = _with_room(self.keys, end + _ROOM)
            self._values = _with_room(self.values, end + _ROOM)
        self._keys[:, :, start:end] = key_states
        self._values[:, :, start:end] = value_states
        self.keys, self.values = self._keys[:, :, :end], self._values[:, :, :end]
        return self.keys, self.values

    def spread(self, places: Tensor) -> None:
        """From one packed sequence (1, heads, N, D) to B of them: `places` (B, L) says where their positions are."""
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = (
            states[0].transpose(0, 1)[places].transpose(1, 2).contiguous() for states in (self.keys, self.values)
        )  # (B, heads, L, D)
        self._keys, self._values = self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences at `indices`, and no spare room until the next token."""
        super().batch_select_indices(indices)
        assert self.keys is not None
        assert self.values is not None
        self._keys, self._values = self.keys, self.values


def _with_room(states: Tensor, size: int) -> Tensor:
    """`states` (B, heads, L, D) at the front of a tensor with L = `size`."""
    larger = states.new_empty(*states.shape[:2], size, states.shape[3])
    larger[:, :, : states.shape[2]] = states
    return larger


def growing_cache(model: PreTrainedModel) -> DynamicCache:
    """A cache for `model` whose full-attention layers grow in place; other kinds of layers stay as they are."""
    cache = DynamicCache(config=model.config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of `query` (B, H, Q, D) to `key` and `value` (B, K, L, D) without repeating them H / K times.

    With a plan of shared prefixes, or prefixes that are kept once, these decide. One new token per sequence: the H / K
    query heads of a key head become its queries, which is the same sum in another order. On CPU longer queries use
    torch's own grouped kernel. Everything else is left to `transformers`.
    """
    plan: prefix_sharing.Plan | None = kwargs.pop(prefix_sharing.KEYWORD, None)
    kept: branches.Branches | None = kwargs.pop(branches.KEYWORD, None)
    if kept is not None and attention_mask is not None:
        return kept.attend(module, query, key, value, attention_mask, scaling), None
    if plan is not None:
        layer = getattr(module, "layer_idx", None)
        return plan.attend(query, key, value, layer=layer, scale=scaling, dropout=dropout), None
    size, heads, queries, width = query.shape
    key_heads = key.shape[1]
    if attention_mask is not None and heads != key_heads:
        if queries == 1:
            folded = query.reshape(size, key_heads, heads // key_heads, width)
            out = scaled_dot_product_attention(folded, key, value, attn_mask=attention_mask, scale=scaling)
            return out.reshape(size, 1, heads, width), None
        if query.device.type == "cpu":
            out = scaled_dot_product_attention(
                query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True
            )
            return out.transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


@contextmanager
def grouped(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a model that uses `sdpa` attends by :func:`grouped_attention`; any other is left alone."""
    config: Any = model.config
    if config._attn_implementation != "sdpa":
        yield
        return
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"

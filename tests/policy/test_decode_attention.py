"""Decoding without copies gives what `transformers` gives with them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from memfactory.policy import decode_attention
from memfactory.policy.decode_attention import GrowingLayer, grouped, grouped_attention, growing_cache


class _Groups(torch.nn.Module):
    """What `transformers`' own function reads from an attention layer."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups
        self.is_causal = True


@given(
    size=st.integers(1, 3),
    key_heads=st.integers(1, 3),
    groups=st.integers(1, 4),
    queries=st.sampled_from([1, 1, 2, 7]),
    past=st.integers(0, 9),
    masked=st.booleans(),
)
@settings(max_examples=80)
def test_grouped_attention_is_attention_over_repeated_heads(size, key_heads, groups, queries, past, masked) -> None:
    generator = torch.Generator().manual_seed(size + 10 * key_heads + 100 * past)
    length, width = past + queries, 8
    query = torch.randn(size, key_heads * groups, queries, width, generator=generator)
    key, value = (torch.randn(size, key_heads, length, width, generator=generator) for _ in range(2))
    mask = None
    if masked:
        left = torch.randint(0, past + 1, (size,), generator=generator)  # left padding
        seen = torch.arange(length)[None, :] <= past + torch.arange(queries)[:, None]  # (Q, L)
        mask = (seen[None] & (torch.arange(length)[None, None] >= left[:, None, None]))[:, None]  # (B, 1, Q, L)
    expected, _ = sdpa_attention_forward(_Groups(groups), query, key, value, mask, scaling=0.3)
    got, _ = grouped_attention(_Groups(groups), query, key, value, mask, scaling=0.3)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@given(steps=st.lists(st.integers(1, 5), min_size=1, max_size=40), room=st.integers(1, 7), data=st.data())
@settings(max_examples=40)
def test_a_growing_layer_holds_what_a_dynamic_one_holds(steps, room, data) -> None:
    original, decode_attention._ROOM = decode_attention._ROOM, room
    try:
        layer = GrowingLayer()
        expected_keys = expected_values = None
        size, generator = 5, torch.Generator().manual_seed(0)
        for count in steps:
            keys, values = (torch.randn(size, 2, count, 4, generator=generator) for _ in range(2))
            got_keys, got_values = layer.update(keys.clone(), values.clone())
            expected_keys = keys if expected_keys is None else torch.cat([expected_keys, keys], 2)
            expected_values = values if expected_values is None else torch.cat([expected_values, values], 2)
            assert torch.equal(got_keys, expected_keys)
            assert torch.equal(got_values, expected_values)
            assert layer.get_seq_length() == expected_keys.shape[2]
            if data.draw(st.booleans()):
                picked = torch.tensor(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=6)))
                layer.batch_select_indices(picked)
                expected_keys, expected_values = expected_keys[picked], expected_values[picked]
                size = len(picked)
    finally:
        decode_attention._ROOM = original


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_only_sdpa_models_are_switched_and_switched_back(implementation: str) -> None:
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=implementation,
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.tensor([[3, 4, 5, 6], [0, 0, 7, 8]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    plain = model(input_ids=ids, attention_mask=mask).logits
    with grouped(model):
        inside = model(input_ids=ids, attention_mask=mask, past_key_values=growing_cache(model)).logits
        assert (model.config._attn_implementation == implementation) == (implementation == "eager")
    assert model.config._attn_implementation == implementation
    torch.testing.assert_close(inside[mask.bool()], plain[mask.bool()], atol=1e-5, rtol=1e-5)

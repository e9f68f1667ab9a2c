"""Tiny models and two kinds of tokenizer: one token per word, and byte-pair merges over characters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from memfactory.policy.tiny import tiny_tokenizer

WORDS = [f"w{i}" for i in range(43)]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_model(kind: str, vocabulary: int, *, positions: int = 512, spread: float = 0.3, seed: int = 0) -> Any:
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": positions,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "bos_token_id": None,
        "initializer_range": spread,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(seed)
    if kind == "gpt2":  # positions are learned, so that an offset shows, as it does not with rotations
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": positions}
        names = ("vocab_size", "initializer_range", "pad_token_id", "eos_token_id", "bos_token_id")
        config = GPT2Config(**shape, **{name: sizes[name] for name in names})
        return GPT2LMHeadModel(config).eval()
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    return Qwen3ForCausalLM(Qwen3Config(head_dim=8, **sizes)).eval()


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-pair encoding over a, b, c: what the model spells as `a` `b` is encoded again as `ab`."""
    pieces = ["<pad>", "<unk>", "<end>", *"abc", "ab", "bc", "abc", "aa", "aab"]
    merges = [("a", "b"), ("ab", "c"), ("b", "c"), ("a", "a"), ("a", "ab")]
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="<end>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<end>{% endfor %}"
    return tokenizer


class Bench:
    make_model = staticmethod(make_model)
    merging_tokenizer = staticmethod(merging_tokenizer)


@pytest.fixture(scope="session")
def bench() -> type[Bench]:
    return Bench


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer(WORDS)

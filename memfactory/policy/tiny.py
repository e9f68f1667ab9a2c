"""A policy small enough to train on a laptop CPU in a minute, built from nothing.

A standard `transformers` architecture (Qwen3) and a word-level tokenizer made with `tokenizers`, so
everything downstream (chat template, generation, TRL, PEFT) treats it like any other model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from memfactory.recipe import TinyModel

_PAD, _UNKNOWN, _END, _USER, _ASSISTANT = "<pad>", "<unk>", "<end>", "<user>", "<assistant>"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<' + message['role'] + '> ' + message['content'] + ' <end> ' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<assistant>' }}{%- endif -%}"
)


def tiny_tokenizer(vocabulary: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word of `vocabulary`; words are separated by white space."""
    words = [_PAD, _UNKNOWN, _END, _USER, _ASSISTANT, *vocabulary]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=_UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=_PAD,
        unk_token=_UNKNOWN,
        eos_token=_END,
        additional_special_tokens=[_USER, _ASSISTANT],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_config(section: TinyModel, tokenizer: PreTrainedTokenizerBase) -> Qwen3Config:
    """What :func:`tiny_model` is built from."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=section.hidden_size,
        intermediate_size=section.mlp_size,
        num_hidden_layers=section.layers,
        num_attention_heads=section.heads,
        num_key_value_heads=section.heads,
        head_dim=section.hidden_size // section.heads,
        initializer_range=section.initializer_range,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )


def tiny_model(section: TinyModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A randomly initialised model for `tokenizer`; `seed` decides the weights."""
    config = tiny_config(section, tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)

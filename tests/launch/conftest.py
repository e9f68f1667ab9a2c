"""Configurations of real model classes, from shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from memfactory.launch.shapes import Shape

CONFIGS: dict[str, Any] = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


@pytest.fixture(params=CONFIGS)
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind of model."""
    return str(request.param)


@pytest.fixture(scope="session")
def config_of() -> Callable[[str, Shape], PreTrainedConfig]:
    """``config_of(kind, shape)``: what transformers builds a model of that kind and shape from."""

    def make(kind: str, shape: Shape) -> PreTrainedConfig:
        config: PreTrainedConfig = CONFIGS[kind](
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            intermediate_size=shape.mlp,
            vocab_size=shape.vocabulary,
            tie_word_embeddings=shape.tied,
        )
        return config

    return make

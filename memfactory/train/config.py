"""The recipe's `train:` section: TRL's `GRPOConfig`, checked before a model is loaded."""

from __future__ import annotations

import dataclasses
import functools
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from trl import GRPOConfig

from memfactory.errors import MemFactoryError, RecipeError
from memfactory.recipe import nearest

# Values that differ from TRL's because a run of this project needs them; a recipe can set any of them.
_DEFAULTS: dict[str, Any] = {
    "bf16": False,  # TRL turns it on unless told otherwise; a laptop CPU has no use for it
    "gradient_checkpointing": False,  # micro-batches are bounded by a token budget instead
    "report_to": "none",
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 50,
    "save_total_limit": 2,
    "shuffle_dataset": True,
    "remove_unused_columns": False,
    "ddp_find_unused_parameters": False,  # every parameter is used in every pass; looking for others costs time
}
# Set by the recipe or decided by the run; naming them in `train:` would contradict it.
_OWNED = {
    "output_dir": "output_dir at the top of the recipe",
    "seed": "seed at the top of the recipe",
    "resume_from_checkpoint": "the option --resume",
    "reward_weights": "weight of each entry of rewards:",
    "max_prompt_length": "agent.chunk_tokens and agent.max_memory_tokens",
    "max_completion_length": "agent.max_memory_tokens and agent.max_answer_tokens",
    "model_init_kwargs": "the section model:",
}
_PER_PASS = "TRL computes it per micro-batch, so rollout.train_token_budget would change results; leave it out"
# TRL options that assume one prompt and one completion per episode, and what to use instead.
_REFUSED: dict[str, tuple[Any, str]] = {
    "use_vllm": (False, "leave it out: `rollout: {engine: vllm}` samples with vLLM"),
    "use_transformers_continuous_batching": (False, "episodes are batched by our own scheduler; leave it out"),
    "use_liger_kernel": (False, "TRL deprecates it; leave it out"),
    "multi_objective_aggregation": ("sum_then_normalize", "use `aggregate: {name: normalize_then_sum}`"),
    "entropy_coef": (0.0, _PER_PASS),
    "use_adaptive_entropy": (False, _PER_PASS),
    "top_entropy_quantile": (1.0, _PER_PASS),
    "log_completions": (False, "episodes are written to episodes.jsonl and shown in the report"),
}


# What people type who come from other trainers.
_ALIASES = {
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "kl_coef": "beta",
    "steps": "max_steps",
}


@dataclass
class EpisodeGRPOConfig(GRPOConfig):
    """TRL's configuration, and what only episodes have a use for.

    Args:
        share_prefix: compute what several prompts or rows begin with once, in generation and in training, where the
            model lets itself (:mod:`memfactory.policy.prefix_support`). Results stay the same up to rounding.
    """

    share_prefix: bool = field(default=True, metadata={"help": "Compute shared beginnings of prompts once."})


@functools.cache
def known_keys() -> dict[str, Any]:
    """Name and type of every field of :class:`EpisodeGRPOConfig` that a recipe may set."""
    hints = typing.get_type_hints(EpisodeGRPOConfig)
    hints["fsdp"] = bool | str | list[str] | None  # transformers says `str | None`, and in its help to pass True
    return {f.name: hints[f.name] for f in dataclasses.fields(EpisodeGRPOConfig) if f.init and f.name not in _OWNED}


def alone(generations: int) -> RecipeError:
    """What is wrong with groups that have nobody to compare with."""
    return RecipeError(
        f"train.num_generations: {generations}",
        "GRPO compares the episodes of one task with each other, and a group of one has nothing to compare",
        "use at least 2 (papers use 8 or 16), or compare with no group: credit.advantage batch or none",
    )


def check_train(section: dict[str, Any], *, groups: bool = True) -> list[MemFactoryError]:
    """Every error in a recipe's `train:`, without building anything.

    Args:
        groups: whether something is compared inside groups; without, one episode for each task is enough.
    """
    from memfactory.train.trainer import SUPPORTED_LOSS_TYPES

    errors: list[MemFactoryError] = []
    known = known_keys()
    for key, value in section.items():
        if key in _OWNED:
            errors.append(RecipeError(f"train.{key}: is not set here", "", f"use {_OWNED[key]}"))
        elif key not in known:
            fix = nearest(_ALIASES.get(key, key), list(known))
            errors.append(RecipeError(f"train.{key}: unknown key of TRL's GRPOConfig", "", fix))
        elif key in _REFUSED and value != _REFUSED[key][0]:
            errors.append(RecipeError(f"train.{key}: {value!r} is not supported", "", _REFUSED[key][1]))
        else:
            try:
                TypeAdapter(known[key]).validate_python(value)
            except ValidationError as error:
                # a union reports one error per member; the first names the type people mean
                errors.append(RecipeError(f"train.{key}: {error.errors()[0]['msg']} (got {value!r})"))
            except Exception:  # a type pydantic has no schema for: TRL checks it itself
                continue
    loss_type = section.get("loss_type", "dapo")
    if isinstance(loss_type, str) and loss_type not in SUPPORTED_LOSS_TYPES:
        errors.append(
            RecipeError(
                f"train.loss_type: '{loss_type}' is not supported with episodes",
                "it averages over rows, so its value would change when an episode is cut into more rows",
                f"use one of {', '.join(SUPPORTED_LOSS_TYPES)}",
            )
        )
    generations = section.get("num_generations", 8)
    if isinstance(generations, int) and generations < 1 + groups:
        errors.append(alone(generations))
    return errors


def build_config(
    section: dict[str, Any], *, checkpoints: Path, seed: int, max_completion_length: int, **extra: Any
) -> EpisodeGRPOConfig:
    """The trainer's configuration from a checked `train:` section.

    Args:
        section: the recipe's `train:`.
        checkpoints: where checkpoints go.
        seed: the recipe's seed.
        max_completion_length: longest turn the agent allows, in tokens.

    Raises:
        RecipeError: TRL or transformers reject the combination of values; their words are passed on.
    """
    values = _DEFAULTS | {"use_cpu": not _has_accelerator()} | section
    single = values.get("num_generations") == 1
    if single:  # TRL insists on two; who trains without groups (RMM's REINFORCE) gets one, see below
        values["num_generations"] = values.setdefault("per_device_train_batch_size", 8)
    if values.get("eval_strategy", "no") != "no":
        values.setdefault("per_device_eval_batch_size", values.get("num_generations", 8))
    try:
        config = EpisodeGRPOConfig(
            output_dir=str(checkpoints),
            seed=seed,
            max_completion_length=max_completion_length,
            **values,
            **extra,
        )
        if single:
            config.num_generations = 1
        return config
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError("train: TRL rejects these values", str(error)) from error


def _has_accelerator() -> bool:
    return torch.accelerator.is_available()

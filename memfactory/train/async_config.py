"""`rollout.engine: async`: what a recipe may ask of it, and TRL's `AsyncGRPOConfig` for it.

The recipe's `train:` stays TRL's `GRPOConfig`: changing the engine changes no other key. What TRL's asynchronous
trainer does not have is refused, so that no key is without effect.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

from trl import GRPOConfig

from memfactory.errors import EngineError, MemFactoryError, RecipeError, boundary
from memfactory.recipe import Recipe
from memfactory.train.config import EpisodeGRPOConfig

with warnings.catch_warnings():  # that it may change is why its version is pinned and its contract tested
    warnings.simplefilter("ignore")
    from trl.experimental.async_grpo import AsyncGRPOConfig, packing

LOSS_TYPES = ("dapo", "grpo", "bnpo", "dr_grpo", "luspo")
"""Those whose term for a token is the clipped one; they differ in how tokens are averaged."""
_OTHER_ENGINES = "rollout.engine vllm or transformers has it"
# GRPOConfig's fields that AsyncGRPOConfig lacks, and that do here what they do elsewhere.
_OURS = ("loss_type", "scale_rewards", "shuffle_dataset", "mask_truncated_completions")
# The same, where one value is what happens anyway.
_NEUTRAL: dict[str, Any] = {
    "beta": 0.0,
    "num_iterations": 1,
    "importance_sampling_level": "token",
    "disable_dropout": False,
    "multi_objective_aggregation": "sum_then_normalize",
    "log_unique_prompts": False,
    "ds3_gather_for_generation": True,
    "use_vllm": False,
    "entropy_coef": 0.0,
    "top_entropy_quantile": 1.0,
    "use_adaptive_entropy": False,
    "sync_ref_model": False,
    "share_prefix": False,
}
_WHY = {
    "share_prefix": "TRL's asynchronous trainer packs rows in its own way",
    "beta": "TRL's asynchronous trainer has no reference model, so there is no KL term",
    "num_iterations": "an episode is trained once; how old it may be then is rollout.async_grpo.max_staleness",
}


def check_async(recipe: Recipe) -> list[MemFactoryError]:
    """What in a recipe does not go with `rollout.engine: async`; empty for any other engine."""
    if recipe.rollout.engine != "async":
        return []
    return [*_train_errors(recipe.train), *_model_errors(recipe), *_rollout_errors(recipe)]


def _train_errors(train: dict[str, Any]) -> list[MemFactoryError]:
    errors: list[MemFactoryError] = []
    theirs = {field.name for field in dataclasses.fields(AsyncGRPOConfig)}
    known = {field.name for field in dataclasses.fields(EpisodeGRPOConfig)}
    arithmetic = ("steps_per_generation", "generation_batch_size")
    for key, value in train.items():
        if key in theirs or key not in known or key in _OURS or key in arithmetic:
            continue  # unknown ones are told by `check_train`
        if key not in _NEUTRAL or value != _NEUTRAL[key]:
            why = _WHY.get(key, "TRL's AsyncGRPOConfig does not have it")
            fix = f"leave it out; {_OTHER_ENGINES}"
            errors.append(RecipeError(f"train.{key}: {value!r} with rollout.engine async", why, fix))
    if (loss := train.get("loss_type", "dapo")) not in LOSS_TYPES:
        why = "its term for a token is not the clipped one, and TRL's asynchronous loss has no other"
        errors.append(RecipeError(f"train.loss_type: {loss} with rollout.engine async", why, ", ".join(LOSS_TYPES)))
    accumulated = train.get("gradient_accumulation_steps", 1)
    steps, size = train.get("steps_per_generation"), train.get("generation_batch_size")
    episodes = train.get("per_device_train_batch_size", 8) * accumulated
    if (steps is not None and steps != accumulated) or (size is not None and size != episodes):
        what, value = ("steps_per_generation", steps) if steps is not None else ("generation_batch_size", size)
        why = f"a generation batch is one update: {episodes} episodes (per_device_train_batch_size x accumulation)"
        errors.append(RecipeError(f"train.{what}: {value} with rollout.engine async", why, "leave it out"))
    for key in ("deepspeed", "fsdp"):
        if train.get(key):
            why = "one training process has everything"
            errors.append(RecipeError(f"train.{key}: with rollout.engine async", why, f"train.{key}=null"))
    return errors


def _model_errors(recipe: Recipe) -> list[MemFactoryError]:
    errors: list[MemFactoryError] = []
    lora = recipe.model.lora
    if lora is None:
        why = "turns that are under way keep the weights they began with, which servers can do for adapters alone"
        fix = "add `lora: {r: 16}` to `model:`, or rollout.engine=vllm"
        errors.append(RecipeError("model.lora: absent with rollout.engine async", why, fix))
    elif "lm_head" in lora.target_modules:
        why = "TRL's asynchronous trainer reads the head's own weight and would leave its adapter out"
        errors.append(RecipeError("model.lora.target_modules: lm_head with rollout.engine async", why, "all-linear"))
    for name, section in recipe.policies.items():
        if section.base_url is None:
            why = "a model in this process would decode in the middle of training steps"
            fix = f"serve it, and set policies.{name}.base_url; {_OTHER_ENGINES}"
            errors.append(RecipeError(f"policies.{name}: no base_url with rollout.engine async", why, fix))
    return errors


def _rollout_errors(recipe: Recipe) -> list[MemFactoryError]:
    errors: list[MemFactoryError] = []
    rollout, section = recipe.rollout, recipe.rollout.async_grpo
    if rollout.vllm.mode != "server":
        why = "a server that shares the trainer's device cannot sample while it trains"
        fix = "rollout.vllm.mode=server and `memfactory serve-rollouts`, or rollout.engine=vllm"
        errors.append(RecipeError(f"rollout.vllm.mode: {rollout.vllm.mode} with rollout.engine async", why, fix))
    if rollout.rerolls.share:
        why = "a chunk is run again from a store that older weights have written"
        errors.append(RecipeError("rollout.rerolls: with rollout.engine async", why, _OTHER_ENGINES))
    if section.weight_sync_steps > section.max_staleness + 1:
        why = (
            f"weights would be up to {section.weight_sync_steps - 1} updates old when they are asked, and "
            f"max_staleness allows {section.max_staleness}: sampling and training would wait for each other"
        )
        fix = f"at most {section.max_staleness + 1}, or raise max_staleness"
        errors.append(RecipeError(f"rollout.async_grpo.weight_sync_steps: {section.weight_sync_steps}", why, fix))
    return errors


def several_processes(processes: int) -> RecipeError:
    """What is wrong with `processes` that train."""
    return RecipeError(
        f"rollout.engine: async on {processes} processes",
        "one process trains; sampling, which takes most of the time, is spread over rollout.vllm.base_urls",
        "train in one process (memfactory launch --config single_gpu --gpus 1), or rollout.engine=vllm",
    )


def check_attention() -> None:
    """See that TRL's packed attention is to be had, before a model is loaded or warmed up.

    Raises:
        EngineError: it is not.
    """
    with boundary(
        EngineError,
        "TRL's asynchronous trainer cannot attend on this machine",
        "train on an NVIDIA GPU that FlashAttention 3 runs on, with `pip install kernels`, where its kernel is cached "
        "or can be loaded from the Hub; or rollout.engine=vllm",
    ):
        packing._flash_attn()


def build_async_config(config: GRPOConfig, recipe: Recipe, tasks: int) -> AsyncGRPOConfig:
    """TRL's asynchronous configuration that does what `config` says.

    TRL's loop makes an update from one pass of one batch; ours makes it from a generation batch in as many passes as
    `rollout.train_token_budget` needs, so nothing is accumulated over TRL's own steps.

    Args:
        config: from :func:`memfactory.train.config.build_config`, of a recipe that `check_async` finds nothing in.
        tasks: how many there are to train on; they make `max_steps` where the recipe counts passes.
    """
    common = {field.name for field in dataclasses.fields(AsyncGRPOConfig) if field.init}
    common &= {field.name for field in dataclasses.fields(GRPOConfig) if field.init}
    values = {name: getattr(config, name) for name in common}
    episodes = int(config.generation_batch_size or 1)
    per_pass = max(tasks * int(config.num_generations or 1) // episodes, 1)
    section = recipe.rollout.async_grpo
    values |= {
        "per_device_train_batch_size": episodes,
        "gradient_accumulation_steps": 1,
        "max_steps": config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * per_pass),
        "dtype": recipe.model.dtype,
        "trust_remote_code": recipe.model.trust_remote_code,
        "token_budget": recipe.rollout.train_token_budget,
        "vllm_server_base_url": recipe.rollout.vllm.base_urls[0],
        "ignore_data_skip": True,  # a resumed run goes on in the order by itself
        "max_staleness": section.max_staleness,
        "weight_sync_steps": section.weight_sync_steps,
        "fork_threshold_tokens": 0,  # every sampled token is trained: rows are ours, and this would mask some
        # set again by the trainer: TRL's takes no held-out set
        "eval_strategy": "no",
        "load_best_model_at_end": False,
    }
    return AsyncGRPOConfig(**values)

"""Whether the recipe fits the memory of this machine, by the estimate of `memfactory launch`; else what to change."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from memfactory.doctor.check import Check, Level
from memfactory.doctor.machine import GpuMemory
from memfactory.doctor.ports import Address
from memfactory.launch.plan import Layout, Plan, Request, make_plan, size_text
from memfactory.recipe import Recipe, apply_overrides
from memfactory.train.prepare import Prepared

RESERVE = 1.1
"""What is not counted (CUDA's context, fragmentation), as a factor: see `memfactory.launch.memory`."""
_LEAST = 1024
"""Smallest token budget that is proposed."""


def check_memory(
    prepared: Prepared, request: Request, layout: Layout, plan: Plan, gpus: Sequence[GpuMemory], host: int | None
) -> Iterable[Check]:
    """The estimated peak of one device against the smallest device, and of all processes against the machine.

    Args:
        gpus: of this machine; unused for a plan on CPUs.
        host: bytes of the machine's memory; None where they cannot be told.
    """
    cpu = plan.settings.cpu
    name = "memory for the run" if cpu else "GPU memory"
    if plan.memory is None:
        fix = "download the model (or its config.json), and name its folder in model.name"
        yield Check(name, f"the size of {plan.recipe.model.name} is not known here", "", Level.NOTE, fix)
        return
    peak = plan.memory.peak
    if cpu and host is not None:
        yield _verdict(name, peak * plan.per_node, host, host, _fixes(prepared, request, layout, host / plan.per_node))
    elif not cpu and not gpus:
        yield Check(name, f"{size_text(peak)} on each of {plan.per_node} GPUs; no GPU here", "", Level.NOTE)
    elif not cpu:
        least = min(gpus[: plan.per_node], key=lambda gpu: gpu.total)
        free = min(gpu.free for gpu in gpus[: plan.per_node])
        yield _verdict(name, peak, least.total, free, _fixes(prepared, request, layout, least.total))
        if host is not None and plan.memory.host * plan.per_node > host:
            kept = f"{size_text(plan.memory.host * plan.per_node)} kept there by {plan.per_node} processes"
            yield Check("memory for the run", size_text(host), kept, Level.WRONG, "--config zero3, without offloading")


def _verdict(name: str, need: float, have: float, free: float, fixes: Iterator[str]) -> Check:
    found, wanted = size_text(have), f"about {size_text(need)} at its peak"
    if need > have:
        return Check(name, found, wanted, Level.WRONG, next(fixes))
    if need * RESERVE > have:
        return Check(name, found, f"{wanted}, and a tenth more", Level.NOTE, next(fixes))
    if need > free:
        fix = "another program holds the rest: end it, or choose another GPU (CUDA_VISIBLE_DEVICES)"
        return Check(name, f"{found}, {size_text(free)} free", wanted, Level.NOTE, fix)
    return Check(name, found, wanted)


def _fixes(prepared: Prepared, request: Request, layout: Layout, have: float) -> Iterator[str]:
    """What to type; worked out only where it is asked for."""
    changes, peak = smaller(prepared, request, layout, have)
    typed = " ".join(changes)
    if changes and peak * RESERVE <= have:
        yield f"{typed} (then {size_text(peak)})"
    more = "more GPUs with --config fsdp2 or zero3, or a smaller model"
    yield f"{typed} (then {size_text(peak)}), and {more}" if changes else more


def smaller(prepared: Prepared, request: Request, layout: Layout, have: float) -> tuple[list[str], float]:
    """Overrides under which the peak of one device and a tenth more is at most `have`, and that peak.

    Tried in the order in which they cost least: speed first (recomputing, smaller passes), then what is trained.
    Those without effect are left out. Where all of them are not enough, all are returned.
    """
    recipe = prepared.recipe
    chosen: dict[str, Any] = {}
    best = _peak(prepared, request, layout, {})
    for key, value in _candidates(recipe):
        if best * RESERVE <= have:
            break
        peak = _peak(prepared, request, layout, chosen | {key: value})
        if peak < 0.999 * best:
            chosen[key], best = value, peak
    return [shlex.quote(f"{key}={_typed(value)}") for key, value in chosen.items()], best


def _candidates(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """Settings that take less, the cheapest first; a budget is halved again and again."""
    yield "train.gradient_checkpointing", True
    # the larger of the two phases is the peak: each is lowered in turn
    passes, cache = recipe.rollout.train_token_budget, recipe.rollout.generate_token_budget
    while max(passes, cache) > 2 * _LEAST:
        passes, cache = max(passes // 2, _LEAST), max(cache // 2, _LEAST)
        yield "rollout.train_token_budget", passes
        yield "rollout.generate_token_budget", cache
    lora = recipe.model.lora is not None
    if recipe.train.get("bf16") and recipe.model.dtype == "float32" and lora:
        yield "model.dtype", "bfloat16"
    if not lora:
        yield "model.lora", {"r": 32, "alpha": 64}
        yield "model.dtype", "bfloat16"
    if recipe.model.tiny is None and recipe.warmup is None and recipe.rollout.engine == "transformers":
        yield "model.quantization", {"bits": 4}


def _peak(prepared: Prepared, request: Request, layout: Layout, changes: Mapping[str, Any]) -> float:
    overrides = [f"{key}={_typed(value)}" for key, value in changes.items()]
    recipe = Recipe.model_validate(apply_overrides(prepared.recipe.dump(), overrides))
    memory = make_plan(dataclasses.replace(prepared, recipe=recipe), request, layout).memory
    assert memory is not None, "the size is known"
    return memory.peak


def _typed(value: Any) -> str:
    """As it is written in an override on the command line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_typed(inner)}" for key, inner in value.items()) + "}"
    return json.dumps(value).strip('"')


def check_shared(plan: Plan, gpus: int) -> Iterable[Check]:
    """Whether servers on this machine would be left a GPU of their own.

    Args:
        gpus: of this machine.
    """
    section = plan.recipe.rollout
    local = section.served and any(Address.of(url).local for url in section.vllm.base_urls)
    if section.vllm.mode == "colocate" or not local or plan.settings.cpu or gpus == 0 or plan.per_node < gpus:
        return
    share = f"rollout.vllm.gpu_memory_utilization is {section.vllm.gpu_share:g}"
    fix = (
        f"leave the servers one: --gpus {gpus - 1}, and CUDA_VISIBLE_DEVICES={gpus - 1} for serve-rollouts"
        if gpus > 1
        else "lower it, so that both fit, or serve on another machine"
    )
    yield Check("GPUs", f"{plan.per_node} of {gpus} train, and servers run here too: {share}", "", Level.NOTE, fix)

"""Whole weights of a model that is spread over ranks: to sample from it, and to save it.

Episodes of different ranks have different numbers of turns and tokens. A forward pass of a sharded model gathers its
weights with all ranks, so sampling with sharded weights would leave the rank with the longer episodes waiting for
ever. Therefore weights are gathered once for a rollout and given back after it: every rank must have room for the
model's weights (not for gradients and optimizer) beside its share.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch.distributed.fsdp import FSDPModule


@contextmanager
def unsharded(model: torch.nn.Module) -> Iterator[None]:
    """Inside, a model of FSDP2 has all its weights on every rank, and forward passes talk to no other rank.

    Must be entered on every rank; does nothing for other models. Weights must not be changed inside.
    """
    states = {id(s): s for m in model.modules() if isinstance(m, FSDPModule) for s in [m._get_fsdp_state()]}
    if not states:
        yield
        return
    assert isinstance(model, FSDPModule), "the root of a sharded model is sharded"
    model._get_fsdp_state()._lazy_init()  # else done by the first forward pass, which has not been yet at step 1
    groups = [group for state in states.values() for group in state._fsdp_param_groups]
    # what the groups do after a forward pass: most give their weights back, and so would gather them in the next
    before = [group.post_forward_mesh_info for group in groups]
    model.set_reshard_after_forward(False)
    for group in groups:
        group.unshard()
        group.wait_for_unshard()
    try:
        yield
    finally:
        for group, info in zip(groups, before, strict=True):
            group.post_forward_mesh_info = info
            group.reshard()


@contextmanager
def placed(model: Any, device: torch.device) -> Iterator[None]:
    """Inside, `model` is on `device`. FSDP and DeepSpeed bring it there only when training begins."""
    before = model.device
    model.to(device)
    try:
        yield
    finally:
        model.to(before)


@contextmanager
def loaded_whole() -> Iterator[None]:
    """Inside, `from_pretrained` gives every rank all weights, whatever they will be sharded over.

    Otherwise transformers loads under ZeRO-3 by collectives, which a rank that loads alone (for the warm-up) would
    wait in for ever, and with FSDP's `cpu_ram_efficient_loading` gives all ranks but the first no weights at all,
    which the evaluation before training would then sample from. The price is a whole model in host memory per process.
    """
    from transformers.integrations import deepspeed

    name, reference = "FSDP_CPU_RAM_EFFICIENT_LOADING", deepspeed._hf_deepspeed_config_weak_ref
    efficient = os.environ.get(name)
    deepspeed._hf_deepspeed_config_weak_ref = None
    os.environ[name] = "false"
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference
        del os.environ[name]
        if efficient is not None:
            os.environ[name] = efficient


def whole_state_dict(model: Any, accelerator: Accelerator) -> dict[str, Any] | None:
    """The whole weights of a model of FSDP2 or DeepSpeed on rank 0 (other ranks: anything); None for any other model.

    Must be called on every rank.
    """
    weights: dict[str, Any]
    if isinstance(model, FSDPModule):
        weights = accelerator.get_state_dict(model)
    elif not hasattr(model, "zero_optimization_stage"):
        return None
    elif model.zero_optimization_stage() == 3:
        # named for 16 bits, but the weights keep their type; None on ranks that are not to save
        adapter = isinstance(model.module, PeftModel)
        weights = model._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=adapter) or {}
    else:
        weights = accelerator.get_state_dict(model)
    for name, source in getattr(accelerator.unwrap_model(model), "all_tied_weights_keys", {}).items():
        # a copy has no storage in common with the weights it is tied to, so it would be saved twice
        if name in weights and source in weights and torch.equal(weights[name], weights[source]):
            del weights[name]
    return weights

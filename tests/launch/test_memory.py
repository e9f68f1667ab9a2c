"""The estimate: against published numbers, numbers made by hand, and what PyTorch really keeps."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

from memfactory.launch.memory import GIB, Load, Sharding, activation_bytes, estimate
from memfactory.launch.shapes import Shape, from_config, known

QWEN = known("Qwen/Qwen2.5-7B-Instruct")
assert QWEN is not None
# 7.5 B parameters, the model of the paper's figure 1: one matrix that is its own output head
PAPER = Shape(hidden=1, layers=0, heads=1, kv_heads=1, head_dim=1, mlp=1, vocabulary=7_499_999_999, tied=True)
FULL = Load(QWEN, processes=8, sharding=Sharding.ZERO3, mixed=True)


@pytest.mark.parametrize(
    ("sharding", "gigabytes"),  # ZeRO, arXiv 1910.02054, figure 1: 7.5 B, 64 devices, K = 12
    [(Sharding.ZERO1, 31.4), (Sharding.ZERO2, 16.6), (Sharding.ZERO3, 1.9)],
)
def test_states_are_those_of_the_zero_paper(sharding: Sharding, gigabytes: float) -> None:
    assert PAPER.parameters == 7_500_000_000
    memory = estimate(Load(PAPER, processes=64, sharding=sharding, mixed=True))
    assert sum(memory.states.values()) / 1e9 == pytest.approx(gigabytes, abs=0.06)


def test_without_sharding_the_paper_has_120_gigabytes() -> None:
    memory = estimate(Load(PAPER, processes=1, sharding=Sharding.ZERO1, mixed=True))
    assert sum(memory.states.values()) == 120e9
    # the same sixteen bytes where float32 weights are their own masters: 4 + 4 + 8
    assert sum(estimate(Load(PAPER, processes=1, sharding=Sharding.NONE)).states.values()) == 120e9


def test_qwen_7b_on_eight_gpus_by_hand() -> None:
    p = 7_615_616_512
    memory = estimate(FULL)
    assert memory.states == {"weights": 2 * p / 8, "gradients": 2 * p / 8, "optimizer states": 12 * p / 8}
    assert memory.generation["weights gathered for generation"] == 2 * p
    # 28 layers x keys and values x 4 heads x 128 x 2 bytes = 57344 bytes a token
    assert memory.generation["key-value cache"] == 57344 * 65536
    plain = estimate(dataclasses.replace(FULL, sharding=Sharding.DDP))
    assert plain.states["DDP's buckets"] == 4 * p
    assert sum(plain.states.values()) == 20 * p
    divided = estimate(dataclasses.replace(FULL, sharding=Sharding.FSDP))
    assert sum(divided.states.values()) == 16 * p / 8
    assert divided.device is not None
    assert plain.device is None  # 152 GB of states alone: no GPU of the list holds that and the activations


def test_lora_trains_adapters_only() -> None:
    adapted = dataclasses.replace(FULL, sharding=Sharding.DDP, stored=2, adapters=10_000_000)
    memory = estimate(adapted)
    assert memory.states["weights"] == 2 * QWEN.parameters + 4 * 10_000_000
    assert memory.states["gradients"] == 40_000_000
    assert memory.states["optimizer states"] == 80_000_000
    offloaded = estimate(dataclasses.replace(adapted, sharding=Sharding.ZERO3, offload_weights=True))
    assert "weights" not in offloaded.states
    assert offloaded.host == 2 * (QWEN.parameters + 10_000_000) / 8


def test_a_model_that_only_generates_has_no_training_part() -> None:
    memory = estimate(dataclasses.replace(FULL, sharding=Sharding.NONE, processes=1, stored=2, trained=False))
    assert memory.states == {"weights": 2 * QWEN.parameters}
    assert memory.training == {}
    assert memory.peak == 2 * QWEN.parameters + 57344 * 65536


def test_the_peak_is_states_and_the_larger_phase() -> None:
    memory = estimate(FULL)
    phases = sum(memory.training.values()), sum(memory.generation.values())
    assert memory.peak == sum(memory.states.values()) + max(phases)
    elsewhere = estimate(dataclasses.replace(FULL, cache_tokens=0))
    assert elsewhere.generation == {}


SMALL = Shape(hidden=64, layers=3, heads=4, kv_heads=2, head_dim=16, mlp=160, vocabulary=97, tied=False)


def saved_bytes(config, layers: int, mixed: bool, dtype: torch.dtype) -> int:
    """Bytes that PyTorch keeps for the backward pass, weights aside."""
    config.num_hidden_layers = layers
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            seen[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    ids = torch.randint(0, 97, (2, 64))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=mixed),
    ):
        model.base_model(ids)
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


@pytest.mark.parametrize(
    ("mixed", "dtype", "tolerance"),
    [(False, torch.float32, 0.02), (True, torch.float32, 0.15), (True, torch.bfloat16, 0.15)],
    ids=["float32", "autocast", "bfloat16"],
)
def test_activations_are_what_pytorch_keeps(
    config_of, kind: str, mixed: bool, dtype: torch.dtype, tolerance: float
) -> None:
    config = config_of(kind, SMALL)
    shape = from_config(config.to_dict())
    assert shape is not None
    two_layers = saved_bytes(config, 3, mixed, dtype) - saved_bytes(config, 1, mixed, dtype)
    if mixed and dtype == torch.float32:
        two_layers -= 2 * 2 * shape.layer  # the bfloat16 copies of the weights, which are a part of their own
    measured = two_layers / 2 / 128  # of one layer and token
    assert activation_bytes(shape, mixed, dtype.itemsize) == pytest.approx(measured, rel=tolerance)


def test_checkpointing_keeps_one_layer_and_the_inputs_of_the_others() -> None:
    whole = estimate(dataclasses.replace(FULL, sharding=Sharding.FSDP)).training["activations"]
    less = estimate(dataclasses.replace(FULL, sharding=Sharding.FSDP, checkpointing=True)).training["activations"]
    layer = activation_bytes(QWEN, True) * FULL.pass_tokens
    assert whole == 28 * layer
    assert less == layer + 28 * 4 * 3584 * FULL.pass_tokens
    assert less / GIB < 15 < whole / GIB

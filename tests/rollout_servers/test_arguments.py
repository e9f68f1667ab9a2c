"""What vLLM is started with, by recipe and command line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from memfactory.errors import RecipeError
from memfactory.policy.vllm_process import ServerOptions, arguments, environment
from memfactory.recipe import Recipe

RUN = Path("/runs/one")
ALWAYS = {
    "--served-model-name": "base",
    "--host": "127.0.0.1",
    "--port": "8000",
    "--dtype": "float32",
    "--logprobs-mode": "processed_logprobs",
    "--generation-config": "vllm",
    "--enable-prefix-caching": "",
}
ON_A_CPU = ALWAYS | {"--enforce-eager": "", "--no-enable-chunked-prefill": "", "--block-size": "32"}
ON_A_GPU = ALWAYS | {"--gpu-memory-utilization": "0.9"}
WHOLE = {"--model": str(RUN / "served")}


def lora(rank: int, places: int = 2, kept: int = 4) -> dict[str, str]:
    sizes = {"--max-lora-rank": str(rank), "--max-loras": str(places), "--max-cpu-loras": str(kept)}
    return {"--model": "org/model", "--enable-lora": ""} | sizes


def recipe(model: dict[str, Any] | None = None, rollout: dict[str, Any] | None = None, **more: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "flags",
            "model": {"name": "org/model"} | (model or {}),
            "environment": {"name": "fact_words"},
            "rewards": [{"name": "answer.exact_match"}],
            "rollout": {"engine": "vllm"} | (rollout or {}),
        }
        | more
    )


def parsed(flags: list[str]) -> dict[str, str]:
    """By flag; empty for one without a value."""
    return dict(re.findall(r"(--\S+)((?: (?!--)\S+)*)", " ".join(flags)))


@pytest.mark.parametrize(
    ("made", "options", "gpu", "wanted"),
    [
        ({}, {}, False, ON_A_CPU | WHOLE),
        ({}, {}, True, ON_A_GPU | WHOLE),
        ({"model": {"lora": {"r": 8}}}, {}, True, ON_A_GPU | lora(8)),
        ({"model": {"lora": {"r": 9}}}, {}, False, ON_A_CPU | lora(16)),
        (
            {"model": {"lora": {"r": 8}}, "rollout": {"engine": "async", "async_grpo": {"max_staleness": 5}}},
            {},
            True,
            ON_A_GPU | lora(8, 7, 7),
        ),
        ({"train": {"bf16": True}}, {}, True, ON_A_GPU | WHOLE | {"--dtype": "bfloat16"}),
        ({"train": {"bf16": True}}, {}, False, ON_A_CPU | WHOLE),
        ({"model": {"dtype": "bfloat16"}}, {}, False, ON_A_CPU | WHOLE | {"--dtype": "bfloat16"}),
        ({"model": {"trust_remote_code": True}}, {}, False, ON_A_CPU | WHOLE | {"--trust-remote-code": ""}),
        ({"rollout": {"vllm": {"max_model_len": 99}}}, {}, False, ON_A_CPU | WHOLE | {"--max-model-len": "99"}),
        (
            {"rollout": {"vllm": {"mode": "colocate"}}},
            {},
            True,
            ON_A_GPU | WHOLE | {"--gpu-memory-utilization": "0.3"},
        ),
        (
            {"rollout": {"vllm": {"base_urls": ["https://node7", "http://node8:1"]}}},
            {},
            False,
            ON_A_CPU | WHOLE | {"--port": "443"},
        ),
        (
            {},
            {"host": "0.0.0.0", "port": 81, "tensor_parallel": 2, "data_parallel": 4, "extra": ["--seed", "3"]},
            True,
            ON_A_GPU
            | WHOLE
            | {"--host": "0.0.0.0", "--port": "81", "--tensor-parallel-size": "2", "--data-parallel-size": "4"}
            | {"--seed": "3"},
        ),
    ],
)
def test_flags(made: dict[str, Any], options: dict[str, Any], gpu: bool, wanted: dict[str, str]) -> None:
    found = arguments(recipe(**made), RUN, ServerOptions(**options), gpu=gpu)
    assert {name: value.strip() for name, value in parsed(found).items()} == wanted


def test_what_is_typed_comes_last() -> None:
    """vLLM takes the last of two."""
    found = arguments(recipe(), RUN, ServerOptions(extra=["--block-size", "16"]), gpu=False)
    assert found[-2:] == ["--block-size", "16"]


def test_a_recipe_that_samples_here_is_told() -> None:
    with pytest.raises(RecipeError, match=r"rollout\.engine is transformers"):
        arguments(recipe(rollout={"engine": "transformers"}), RUN, ServerOptions(), gpu=False)


def test_adapters_can_always_be_loaded() -> None:
    """Whatever the shell says; the size of the cache is the shell's."""
    made = environment({"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "0", "VLLM_CPU_KVCACHE_SPACE": "7"}, gpu=False)
    assert made["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    assert made["VLLM_SERVER_DEV_MODE"] == "1"
    assert made["VLLM_CPU_KVCACHE_SPACE"] == "7"
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment({}, gpu=True)

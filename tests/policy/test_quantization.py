"""4-bit base weights: what is refused, what is trained, and that plain transformers and PEFT read what is saved."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from memfactory.cli.recipes import find_recipe
from memfactory.environments import build_environment
from memfactory.errors import RecipeError, RecipeErrors
from memfactory.launch.memory import Load, Sharding, estimate, packed_bytes
from memfactory.launch.plan import Request, lay_out, make_plan
from memfactory.launch.shapes import known
from memfactory.policy.tiny import tiny_model, tiny_tokenizer
from memfactory.recipe import TinyModel, load_recipe
from memfactory.train import run
from memfactory.train.prepare import prepare
from memfactory.train.start import load_policy

QLORA = "memagent/qwen3-8b-qlora"
FOUR_BITS = ["model.quantization={bits: 4}", "model.lora={r: 8}"]


# ---- without the library -----------------------------------------------------------------------


def refused(*overrides: str, name: str = QLORA) -> str:
    with pytest.raises(RecipeErrors) as caught:
        prepare(find_recipe(name), overrides, splits=())
    return str(caught.value)


def test_what_cannot_work_is_refused_with_a_way_out() -> None:
    assert "add `lora: {r: 16}`" in refused("model.lora=null")
    assert "leave it out with model.tiny" in refused(*FOUR_BITS, name="memagent/quickstart")
    assert "vLLM serves the weights as they are stored" in refused("rollout.engine=vllm")
    assert "the warm-up trains all weights" in refused("warmup={steps: 1}")
    assert "--config ddp" in refused("train.fsdp=true")
    assert "--config ddp" in refused("train.deepspeed={zero_optimization: {stage: 3}}")
    assert "model.quantization.bits" in refused("model.quantization.bits=8")


@pytest.mark.parametrize("config", ["fsdp2", "zero2", "zero3"])
def test_nothing_but_the_batch_is_divided(config: str) -> None:
    prepared = prepare(find_recipe(QLORA), splits=())
    request = Request(config=config, gpus=2)
    with pytest.raises(RecipeErrors, match="4-bit weights are packed bytes"):
        make_plan(prepared, request, lay_out(request))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="it is installed here")
def test_a_missing_library_is_named_before_anything_is_loaded(tmp_path: Path) -> None:
    prepared = prepare(find_recipe(QLORA), [f"output_dir={tmp_path / 'run'}"], splits=())
    with pytest.raises(RecipeError, match=r"pip install 'memfactory\[quant\]'"):
        run.train(prepared, console=Console(quiet=True))
    assert not (tmp_path / "run").exists()


def test_the_estimate_counts_packed_weights() -> None:
    shape = known("Qwen/Qwen3-8B")
    assert shape is not None
    assert packed_bytes(False) == 0.5625
    assert packed_bytes(True) - 0.5 == pytest.approx(
        0.127 / 8, rel=0.001
    )  # the paper, section 3: .127 bits for scales
    load = Load(shape, 1, Sharding.NONE, stored=2, mixed=True, adapters=10_000_000, packed=packed_bytes(True))
    matrices = shape.layers * shape.matrices
    rest = shape.parameters - matrices
    states = estimate(load).states
    assert states["weights"] == pytest.approx(packed_bytes(True) * matrices + 4 * rest + 4 * 10_000_000)
    assert states["optimizer states"] == 80_000_000
    assert estimate(load).generation["key-value cache"] == 65536 * shape.layers * 2 * shape.key_value * 4


def test_the_shipped_recipe_fits_what_it_says() -> None:
    prepared = prepare(find_recipe(QLORA), splits=())
    request = Request(config="single_gpu", gpus=1)
    memory = make_plan(prepared, request, lay_out(request)).memory
    assert memory is not None
    assert memory.device == 24


# ---- with it -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ordinary weights on disk, of a model for the quickstart's words."""
    if importlib.util.find_spec("bitsandbytes") is None:
        message = "bitsandbytes is not installed: pip install 'memfactory[quant]'"
        pytest.fail(message) if os.environ.get("MEMFACTORY_REQUIRE_BITSANDBYTES") == "1" else pytest.skip(message)
    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny_tokenizer(build_environment("fact_words", {}).vocabulary())
    tiny_model(TinyModel(hidden_size=64, heads=2, initializer_range=0.3), tokenizer, 0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def small(base: Path, folder: Path) -> list[str]:
    return [
        "model.tiny=null",
        f"model.name={base}",
        *FOUR_BITS,
        f"output_dir={folder}",
        "warmup=null",
        "environment.train_tasks=4",
        "environment.test_tasks=2",
        "train.max_steps=2",
        "train.per_device_train_batch_size=8",
        "train.num_generations=4",
        "train.eval_strategy=no",
        "train.beta=0.01",
        f"rewards=[{{name: {Path(__file__).parents[1] / 'train' / 'rank_parts.py'}:words}}]",
    ]


def frozen(model: Any) -> dict[str, torch.Tensor]:
    """The weights that are not trained, as they are stored, and the scales of those that are packed."""
    found = {}
    for name, value in model.named_parameters():
        if "lora_" not in name:
            found[name.replace("base_model.model.", "").replace(".base_layer", "")] = value.detach().clone()
            if hasattr(value, "quant_state"):
                found[f"{name} scales"] = value.quant_state.absmax.clone()
    return {name.replace("base_model.model.", "").replace(".base_layer", ""): value for name, value in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_a_run_trains_adapters_alone_and_plain_libraries_load_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: str
) -> None:
    kept: list[Any] = []
    gradients: list[dict[str, float]] = []
    loads, norm = run.starting_model, run.EpisodeGRPOTrainer._get_grad_norm

    def keep(*args: Any, **kwargs: Any) -> Any:
        model = loads(*args, **kwargs)
        kept.append((model, frozen(model)))
        return model

    def measure(self: Any, model: Any, grad_norm: Any = None) -> Any:
        named = self.accelerator.unwrap_model(model).named_parameters()
        gradients.append({name: float(p.grad.norm()) for name, p in named if p.requires_grad})
        return norm(self, model, grad_norm)

    monkeypatch.setattr(run, "starting_model", keep)
    monkeypatch.setattr(run.EpisodeGRPOTrainer, "_get_grad_norm", measure)
    options = [*small(base, tmp_path / "run"), f"train.gradient_checkpointing={checkpointing}"]
    prepared = prepare(find_recipe("memagent/quickstart"), options)
    summary = run.train(prepared, console=Console(quiet=True))
    assert summary["steps"] == 2

    model, before = kept[0]
    assert sum(value.dtype == torch.uint8 for value in before.values()) >= 2 * 7, "matrices are not packed"
    assert all(value.dtype == torch.float32 for name, value in before.items() if "norm" in name)
    after = frozen(model)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), f"{name} has changed"
    # sampling came first: on some CPUs it used to repack weights, and gradients below them were lost
    assert all(size > 0 for name, size in gradients[0].items() if "lora_B" in name), gradients[0]
    assert all(size > 0 for size in gradients[1].values())
    adapter = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    assert {value.dtype for value in adapter.values()} == {torch.float32}
    assert any(value.abs().max() > 0 for name, value in adapter.items() if "lora_B" in name)

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    plain = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    # not in evaluation mode: there some CPUs repack the weights in bfloat16, which our loading turns off
    adapted = PeftModel.from_pretrained(plain, str(tmp_path / "run" / "model")).train()
    ours: Any = load_policy(prepared, tmp_path / "run" / "model").trained
    ids = torch.arange(5, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours.model(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_shipped_recipe_names_its_quantization() -> None:
    recipe = load_recipe(find_recipe(QLORA))
    assert recipe.model.quantization is not None
    assert recipe.model.quantization.model_dump() == {"bits": 4, "type": "nf4", "double": True, "compute_dtype": None}

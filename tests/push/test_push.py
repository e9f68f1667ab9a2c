"""A pushed folder loads in plain transformers or peft, is a candidate of its own recipe, and refusals come first."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from memfactory.cli.push import push
from memfactory.errors import DataError, EngineError, MemFactoryError, RecipeError
from memfactory.evaluate.candidates import check_candidate, find_candidates
from memfactory.policy.models import lora_config
from memfactory.policy.tiny import tiny_model, tiny_tokenizer
from memfactory.push import folder as pushing
from memfactory.push.source import find_pushed
from memfactory.recipe import Lora, Recipe, TinyModel, load_recipe
from memfactory.runs import RunFolder

SIZE = TinyModel(hidden_size=16, layers=1, heads=2, mlp_size=32)
WORDS = ["the", "red", "boat", "sank"]


def make_run(path: Path, *, lora: bool = False, **environment: Any) -> RunFolder:
    recipe = {
        "name": "boats",
        "model": {"tiny": SIZE.model_dump(), **({"lora": {"r": 4}} if lora else {})},
        "environment": {"name": "fact_words", **environment},
        "rewards": [{"name": "answer.exact_match"}],
        "output_dir": str(path),
        "train": {"max_steps": 3},
    }
    run = RunFolder.open(path, Recipe.model_validate(recipe), resume=False)
    tokenizer = tiny_tokenizer(WORDS)
    model: Any = tiny_model(SIZE, tokenizer, 0)
    if lora:
        model.save_pretrained(path / "initial")
        model.config._name_or_path = model.name_or_path = str(path / "initial")
        model = get_peft_model(model, lora_config(Lora(r=4)))
        torch.nn.init.normal_(next(p for name, p in model.named_parameters() if "lora_B" in name))
    model.save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    (path / "model" / "training_args.bin").write_bytes(b"not for others")
    run.write_summary(
        {"name": "boats", "steps": 3, "before": {"sampled_em": 0.25}, "after": {"sampled_em": 0.5, "n": 8}}
    )
    return run


def make_evaluation(path: Path, fingerprint: str) -> Path:
    row = {
        **{"suite": "recipe", "candidate": "boats", "mode": "greedy", "tasks": 8, "episodes": 8, "failed": 0},
        **{"metric": "answer.exact_match", "mean": 0.5, "low": 0.25, "high": 0.75, "samples": 1, "tokens": 90.0},
        **{"seconds": 0.1, "peak_context": 40},
    }
    base = {**row, "candidate": "base | <b>", "mean": None, "low": None, "high": None}
    told = {
        "schema": 1,
        "recipe": "boats",
        "candidates": [{"name": "boats", "fingerprint": fingerprint}],
        "rows": [base, row],
    }
    path.mkdir()
    (path / "evaluation.json").write_text(json.dumps(told), encoding="utf-8")
    return path


def test_a_pushed_model_loads_in_transformers_and_is_a_candidate_of_its_recipe(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run.path / "model" / "rerank.safetensors").write_bytes(b"what learns beside the policy")
    output = tmp_path / "hub"
    push(run.path, output=output, license="apache-2.0")
    assert {file.name for file in run.path.glob("model/*")} - {file.name for file in output.iterdir()} == {
        "training_args.bin"
    }
    loaded, source = (AutoModelForCausalLM.from_pretrained(path) for path in (output, run.path / "model"))
    for one, other in zip(loaded.parameters(), source.parameters(), strict=True):
        assert torch.equal(one, other)
    assert AutoTokenizer.from_pretrained(output).decode(AutoTokenizer.from_pretrained(output)("red boat").input_ids)
    recipe = load_recipe(output / "recipe.yaml")
    (found,) = find_candidates(recipe, [output], base=False)
    check_candidate(found, recipe, AutoTokenizer.from_pretrained(run.path / "model"))
    card = ModelCard.load(output / "README.md")
    assert (card.data.license, card.data.library_name, card.data.base_model) == ("apache-2.0", "transformers", None)
    assert str(tmp_path) not in "".join((output / name).read_text() for name in ("README.md", "recipe.yaml"))
    assert "| accuracy, sampled | 0.25 | 0.5 |" in card.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "run"]


def test_large_files_are_linked_and_small_ones_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    monkeypatch.setattr(pushing, "LARGE", 5000)
    written = pushing.write_folder(find_pushed(run.path), tmp_path / "hub")
    weights = tmp_path / "hub" / "model.safetensors"
    assert "model.safetensors" in written.linked
    assert "config.json" in written.copied
    assert os.path.samefile(weights, run.path / "model" / "model.safetensors")

    def refuse(*_: Any) -> None:
        raise OSError("another disk")

    monkeypatch.setattr(os, "link", refuse)
    written = pushing.write_folder(find_pushed(run.path), tmp_path / "copy")
    assert written.linked == ()
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == weights.read_bytes()


def test_an_adapter_is_pushed_with_the_name_of_its_base_or_merged_into_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", lora=True)
    with pytest.raises(EngineError, match="adapter without its base") as refused:
        push(run.path, output=tmp_path / "hub")
    assert "--merge" in refused.value.fix
    assert not (tmp_path / "hub").exists()

    tokens = torch.tensor([[5, 6, 7]])
    base = AutoModelForCausalLM.from_pretrained(run.path / "initial")
    expected = PeftModel.from_pretrained(base, str(run.path / "model"))(tokens).logits
    push(run.path, output=tmp_path / "merged", merge=True)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(whole(tokens).logits, expected, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(run.path / "initial")(tokens).logits
    assert not torch.allclose(plain, expected, atol=1e-3)
    assert not list((tmp_path / "merged").glob("adapter_*"))

    config = run.path / "model" / "adapter_config.json"
    told = json.loads(config.read_text())
    config.write_text(json.dumps({**told, "base_model_name_or_path": "Qwen/Qwen3-1.7B"}))
    push(run.path, output=tmp_path / "hub")
    data = ModelCard.load(tmp_path / "hub" / "README.md").data
    assert (data.library_name, data.base_model) == ("peft", "Qwen/Qwen3-1.7B")
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(run.path / "initial"), str(tmp_path / "hub")
    )
    assert torch.allclose(again(tokens).logits, expected, atol=1e-6)


def test_the_card_has_the_table_of_an_evaluation_and_valid_yaml(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    fingerprint = find_pushed(run.path).fingerprint
    evaluation = make_evaluation(tmp_path / "ev", fingerprint)
    push(run.path, output=tmp_path / "hub", evaluation=evaluation, repo="ann/boats")
    text = (tmp_path / "hub" / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(text.split("---")[1])
    data = ModelCardData(**head)
    assert data.license is None
    assert "The license is not set" in text
    (result,) = data.eval_results or []
    assert (result.metric_type, result.metric_value) == ("answer.exact_match", 0.5)
    assert result.metric_args == {"low": 0.25, "high": 0.75, "interval": 0.95}
    assert "| recipe | **boats** | greedy | 8 | answer.exact_match | 0.5 [0.25, 0.75] | 90 |" in text
    assert "| base \\| &lt;b> |" in text
    assert 'from_pretrained("ann/boats")' in text
    other = make_evaluation(tmp_path / "other", "f" * 16)
    with pytest.raises(RecipeError, match="is not an evaluation of"):
        push(run.path, output=tmp_path / "again", evaluation=other)


def test_the_card_shows_the_judge_and_what_failed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    evaluation = make_evaluation(tmp_path / "ev", find_pushed(run.path).fingerprint)
    file = evaluation / "evaluation.json"
    told = json.loads(file.read_text())
    told["rows"][1] |= {"judge": {"mean": 0.625, "disagree": 0.125, "kappa": None}, "failed": 1}
    told["rows"][1] |= {"faults": {"service": 1, "judge": 2}}
    file.write_text(json.dumps(told))
    push(run.path, output=tmp_path / "hub", evaluation=evaluation)
    text = (tmp_path / "hub" / "README.md").read_text(encoding="utf-8")
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    head = next(row for row in table if "suite" in row)
    own = dict(zip(head, next(row for row in table if "**boats**" in row), strict=True))
    assert (own["judge"], own["disagree"]) == ("0.625", "0.125")
    assert (own["failed"], own["faults"]) == ("1 of 8", "service 1, judge 2")


def test_datasets_of_the_hub_are_named(tmp_path: Path) -> None:
    from memfactory.push.card import hub_datasets

    run = make_run(tmp_path / "run")
    recipe = yaml.safe_load(run.recipe_file.read_text())
    for environment, expected in (
        ({"name": "hotpotqa-memfactory-train"}, ["nworats/MemFactory", "BytedTsinghua-SIA/hotpotqa"]),
        ({"name": "hub", "path": "ann/boats"}, ["ann/boats"]),
        ({"name": "fact_words"}, []),
    ):
        run.recipe_file.write_text(yaml.safe_dump({**recipe, "environment": environment}))
        assert hub_datasets(find_pushed(run.path)) == expected


def refused(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> MemFactoryError:
    run = make_run(tmp_path / "run")
    options: dict[str, Any] = {"output": tmp_path / "hub"}
    if case == "no model":
        (run.path / "model").rename(run.path / "elsewhere")
    elif case == "no tokenizer":
        (run.path / "model" / "tokenizer_config.json").unlink()
    elif case == "no weights":
        (run.path / "model" / "model.safetensors").unlink()
    elif case == "not empty":
        options["output"] = run.path / "model"
    elif case == "merge":
        options["merge"] = True
    elif case == "no repo":
        options["upload"] = True
    elif case == "no token":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
        options.update(upload=True, repo="ann/boats")
    with pytest.raises((RecipeError, EngineError, DataError)) as found:
        push(tmp_path if case == "no run" else run.path, **options)
    return found.value


@pytest.mark.parametrize(
    ("case", "why", "fix"),
    [
        ("no run", "no run folder", "recipe.yaml"),
        ("no model", "has no finished model", "let it go on"),
        ("no tokenizer", "no tokenizer beside the weights", "RUN/model"),
        ("no weights", "no weights in it", "shards"),
        ("not empty", "the folder is not empty", "choose another"),
        ("merge", "no adapter", "leave --merge out"),
        ("no repo", "needs a name on the Hub", "--repo OWNER/NAME"),
        ("no token", "there is no token", "HF_TOKEN"),
    ],
)
def test_bad_input_is_refused_before_anything_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, why: str, fix: str
) -> None:
    error = refused(tmp_path, case, monkeypatch)
    assert why in str(error)
    assert fix in error.fix
    assert not (tmp_path / "hub").exists()
    assert not list(tmp_path.glob(".hub*"))

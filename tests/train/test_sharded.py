"""Weights that are spread over ranks: the step, the rollouts and the saved model are those of one process."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from memfactory.evaluate.run import evaluate_agent
from memfactory.train.prepare import prepare
from memfactory.train.start import load_policy
from tests.train.launching import ROOT
from tests.train.rank_jobs import CASES, RECIPE, SHARDED

pytestmark = pytest.mark.slow
PAIR = {"ddp": "ddp", "fsdp2": "fsdp2", "fsdp2_offload": "fsdp2"}
PAIR |= dict.fromkeys(("zero1", "zero2", "zero3", "zero3_offload"), "zero")


def flat(file):
    weights = load_file(file)
    return torch.cat([weights[name].double().flatten() for name in sorted(weights)])


@pytest.mark.parametrize(
    ("engine", "name"),
    [(engine, name) for engine in ("fsdp2", "zero2", "zero3") for name in SHARDED] + [("zero1", next(iter(SHARDED)))],
)
def test_gradient_is_that_of_one_process(bench, tokenizer, tmp_path, pairs, engine, name):
    _, results = pairs[PAIR[engine]]
    alone = bench.alone(CASES[SHARDED[name]], tokenizer, tmp_path)
    assert alone.norm() > 1e-4
    assert bench.relative(results[f"{engine}: {name}"], alone) < 1e-5


@pytest.mark.parametrize("engine", sorted(PAIR.keys() - {"zero1"}))
def test_saved_model_is_the_trained_one(pairs, engine):
    folder, results = pairs[PAIR[engine]]
    run = folder / engine
    assert results[f"{engine} run"]["steps"] == 4
    trained, start = flat(run / "model" / "model.safetensors"), flat(run / "initial" / "model.safetensors")
    assert (trained - start).norm() > 1e-2 * start.norm()
    assert torch.equal(trained, flat(run / "checkpoints" / "checkpoint-4" / "model.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()
    # what the trainer's own model said after the last step, the saved one says again
    prepared = prepare(ROOT / "recipes" / "memagent" / "quickstart.yaml", RECIPE)
    again = evaluate_agent(
        prepared.agent, prepared.eval_tasks, load_policy(prepared, run / "model"), prepared.eval_options
    )
    said = [
        [turn["text"] for turn in record["turns"]]
        for record in map(json.loads, (run / "episodes.jsonl").read_text().splitlines())
        if (record["split"], record["step"]) == ("eval_greedy", 4)
    ]
    after = results[f"{engine} run"]["after"]
    greedy = {name for name in again.metrics if name.startswith("greedy_")}
    assert {name: after[name] for name in greedy} == pytest.approx({n: again.metrics[n] for n in greedy}, nan_ok=True)
    assert said == [[turn.text for turn in episode.turns] for episode in again.episodes["eval_greedy"]]
    assert len({len(turns) for turns in said}) > 1, "all episodes have equally many turns: nothing is unequal here"


@pytest.mark.parametrize("engine", ["fsdp2", "fsdp2_offload", "zero2", "zero3", "zero3_offload"])
def test_run_is_that_of_ddp(bench, pairs, engine):
    ddp, sharded = pairs["ddp"][0] / "ddp", pairs[PAIR[engine]][0] / engine
    ours, theirs = flat(sharded / "model" / "model.safetensors"), flat(ddp / "model" / "model.safetensors")
    assert bench.relative(ours, theirs) < 1e-3


@pytest.mark.parametrize("engine", sorted(PAIR.keys() - {"zero1"}))
def test_resumed_equals_uninterrupted(bench, pairs, engine):
    folder, results = pairs[PAIR[engine]]
    whole, resumed = folder / engine, folder / f"{engine}-resumed"
    assert results[f"{engine} resumed"]["steps"] == 4
    assert bench.relative(*(flat(run / "model" / "model.safetensors") for run in (whole, resumed))) < 1e-6
    assert (whole / "rewards.jsonl").read_bytes() == (resumed / "rewards.jsonl").read_bytes()


def test_gradient_checkpointing_changes_nothing(bench, pairs):
    folder, _ = pairs["fsdp2"]
    runs = folder / "fsdp2", folder / "recomputed"
    assert bench.relative(*(flat(run / "model" / "model.safetensors") for run in runs)) < 1e-4


@pytest.mark.parametrize(("engine", "run"), [("fsdp2", "adapter"), ("zero3", "zero3-adapter")])
def test_adapter_is_saved_whole(pairs, engine, run):
    folder, results = pairs[PAIR[engine]]
    assert results[f"{engine} LoRA"]["steps"] == 4
    base = AutoModelForCausalLM.from_pretrained(folder / run / "initial")
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = base(ids).logits
    adapted = PeftModel.from_pretrained(base, str(folder / run / "model"))
    assert (adapted(ids).logits - plain).abs().max() > 1e-3
    shapes = {name: value.shape for name, value in adapted.named_parameters() if "lora_" in name}
    assert len(shapes) == len(load_file(folder / run / "model" / "adapter_model.safetensors"))


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_all_ranks_end_with_the_error_of_one(pairs, engine):
    first, second = pairs[PAIR[engine]][1][f"{engine} failure"]
    assert first == second
    assert "rank 1 failed" in first

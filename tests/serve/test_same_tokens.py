"""A trained agent writes the same tokens in training, in `memfactory eval` and in `memfactory serve`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from memfactory.environments.base import Split
from memfactory.train.prepare import prepare
from tests.forked import Server
from tests.serve.running import AGENTS, Serving, messages_of

PARTS = Path(__file__).parents[1] / "train" / "rank_parts.py"
TASKS = 3
MODEL = {"tiny": {"hidden_size": 32, "layers": 2, "heads": 2, "mlp_size": 48, "initializer_range": 0.5}}


def recipe(kind: str, lora: bool) -> dict[str, Any]:
    """Two updates at a high rate, whose reward differs within every group, then the evaluation."""
    return {
        "name": f"{kind}-trained",
        "model": MODEL | ({"lora": {"r": 4}} if lora else {}),
        "agent": AGENTS[kind],
        "environment": {"name": "fact_words", "test_tasks": TASKS, "train_tasks": 8},
        "rewards": [{"name": f"{PARTS}:words"}],
        "train": {
            "max_steps": 2,
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "learning_rate": 0.02,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_steps": 2,
        },
        "eval": {"samples": 1, "temperature": 1.0, "greedy": True, "metric": "answer.token_f1"},
    }


FIELDS = ("module", "messages", "text", "stop", "prompt_tokens", "completion_tokens")
"""Of a turn. Evaluations keep no ids; with a token for each word, the text, how it ended and the counts tell them."""


def turns(lines: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """What was read and written, by task."""
    return {line["task"]["id"]: [[turn[name] for name in FIELDS] for turn in line["turns"]] for line in lines}


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "lora"), [("text", False), ("bank", True)], ids=["text, all weights", "bank, LoRA"])
def test_training_evaluation_and_server_write_the_same_tokens(
    kind: str, lora: bool, forked: Server, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(kind, lora)), encoding="utf-8")
    forked.run(["train", str(tmp_path / "recipe.yaml"), f"output_dir={run}"])
    logged = [line for line in read(run / "episodes.jsonl") if line["split"] == "eval_greedy"]
    before = turns([line for line in logged if line["step"] == 0])
    trained = turns([line for line in logged if line["step"] == 2])
    assert len(trained) == TASKS
    assert trained != before, "training changed nothing that could be told apart"
    assert len({json.dumps(turns[-1][2]) for turns in trained.values()}) == TASKS, (
        "what is said depends on what is read"
    )

    words = ("eval", str(run / "recipe.yaml"), "--checkpoint", str(run), "--output", "e")
    done = forked.command(*words, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    kept = [line for line in read(tmp_path / "e" / "episodes.jsonl") if line["mode"] == "greedy"]
    by_candidate = {name: [line for line in kept if line["candidate"] == name] for name in ("base", "run")}
    assert turns(by_candidate["run"]) == trained
    assert turns(by_candidate["base"]) == before

    tasks = prepare(run / "recipe.yaml", splits=(Split.TEST,)).eval_tasks
    for where in ([], ["--checkpoint", str(run / "checkpoints" / "checkpoint-2")]):
        with Serving(forked, run, "--stateless", *where) as serving:
            served = [serving.ask(messages_of(task)).episode for task in tasks]
        for task, episode in zip(tasks, served, strict=True):
            assert turns([episode])["served"] == trained[task.id]

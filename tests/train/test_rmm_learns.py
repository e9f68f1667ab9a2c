"""RMM's reranker in the training loop: citations teach it, nothing else moves, and a run resumes to the bit."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from memfactory.agents import build_agent
from memfactory.agents.running import run_episodes
from memfactory.environments import build_environment
from memfactory.environments.base import Split
from memfactory.episode import Episode, StopReason, Task, Turn
from memfactory.plugins import shipped
from memfactory.recipe import load_recipe
from memfactory.train.learners import Learners
from tests.forked import Forked, Server

RECIPE = shipped("recipes") / "rmm" / "quickstart.yaml"


class Citing:
    """Answers as the dialogues' teacher does, which cites the entry that holds the answer if it is shown."""

    def __init__(self, teacher: Any, greedy: bool) -> None:
        self.teacher, self.greedy = teacher, greedy

    async def demonstrate(self, module: Any, state: Any) -> Turn:
        text = module.write(self.teacher(module.name, state))
        return Turn(module.name, [1], [2], [0.0], text, StopReason.STOP, trainable=False)

    async def generate(self, messages: Any, *, module: str, max_tokens: int) -> Turn:
        raise NotImplementedError

    def split(self, text: str, max_tokens: int) -> list[str]:
        return [text]


def run(agent: Any, environment: Any, tasks: Sequence[Task], greedy: bool) -> list[Episode]:
    episodes = []
    for number, task in enumerate(tasks):
        episodes += run_episodes(agent, [task], Citing(environment.teacher(task, number), greedy))
    return episodes


def recall(agent: Any, environment: Any, tasks: Sequence[Task], greedy: bool) -> float:
    """Share of questions whose answer stands in an entry that was shown."""
    found = [
        any(evidence.text in entry.text for evidence in answer.probe.evidence for entry in episode.turns[at].retrieved)
        for episode in run(agent, environment, tasks, greedy)
        for answer in episode.answers
        if (at := answer.turn) is not None
    ]
    return sum(found) / len(found)


@pytest.mark.slow
def test_citations_raise_the_recall_of_the_recipes_reranker_and_shuffled_ones_do_not() -> None:
    """Replies that cite rightly, 30 rollouts of 96 questions: the whole recipe but its language model."""
    recipe = load_recipe(RECIPE)
    environment: Any = build_environment(recipe.environment.name, recipe.environment.options)
    train, test = environment.tasks(Split.TRAIN, 36), environment.tasks(Split.TEST, 12)
    options = recipe.agent.options
    after = {}
    for shuffled in (False, True):
        rerank = options["rerank"] | {"shuffle_citations": shuffled}
        agent: Any = build_agent(recipe.agent.name, options | {"rerank": rerank})
        before = recall(agent, environment, test, greedy=True), recall(agent, environment, test, greedy=False)
        learners = Learners(agent)
        for step in range(30):
            learners.seed(step)
            at = 12 * step % len(train)
            learners.learn(run(agent, environment, train[at : at + 12], greedy=False))
        after[shuffled] = recall(agent, environment, test, True), recall(agent, environment, test, False)
    assert before[0] <= 0.9
    assert before[1] <= 0.3
    assert min(after[False]) >= 0.9
    assert after[True][1] <= 0.5


# ---- the command, with a model that has learned nothing: it cites little, and every update is made ---------------

_SMALL = (
    "train.max_steps=4",
    "train.per_device_train_batch_size=2",
    "train.save_steps=2",
    "train.eval_strategy=no",
    "warmup.steps=2",
    "warmup.batch_rows=8",
    "environment.train_tasks=6",
    "environment.test_tasks=2",
)


def start(forked: Server, folder: Path, *overrides: str, **environment: str) -> Forked:
    return forked.start(
        ["train", "rmm/quickstart", f"output_dir={folder}", *_SMALL, *overrides], environment=environment
    )


def finish(run: Forked) -> str:
    assert run.wait() == 0, run.output[-3000:]
    return run.output


def learned(folder: Path, rank: int = 0, step: int = 4) -> list[torch.Tensor]:
    """The reranker's matrices in a checkpoint, as rank `rank` holds them."""
    path = folder / "checkpoints" / f"checkpoint-{step}" / f"{rank}_rollout_buffer.pt"
    weights: list[torch.Tensor] = torch.load(path, weights_only=False)["learners"]["rerank"]["weights"]
    return weights


@pytest.mark.slow
def test_only_the_reranker_moves_and_a_resumed_run_ends_alike(forked: Server, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    output = finish(start(forked, whole))
    assert "no update" not in output
    initial, model = load_file(whole / "initial/model.safetensors"), load_file(whole / "model/model.safetensors")
    assert all(torch.equal(initial[name], tensor) for name, tensor in model.items())
    matrices = load_file(whole / "model/rerank.safetensors")
    assert all(matrix.any() and torch.isfinite(matrix).all() for matrix in matrices.values())
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    logged = [line["values"] for line in lines if line["phase"] == "train"]
    assert all(1 <= values["rerank/questions"] <= 16 for values in logged)  # replies that cannot be read are left out
    assert not any("groups/count" in values for values in logged)

    shutil.copytree(whole, cut)  # as it was when it was killed after its second step
    shutil.rmtree(cut / "checkpoints" / "checkpoint-4")
    shutil.rmtree(cut / "model")
    summary = json.loads((cut / "summary.json").read_text())
    (cut / "summary.json").write_text(json.dumps(summary | {"stopped": "unfinished"}))
    assert "resuming from" in finish(start(forked, cut, "--resume"))
    for name, matrix in load_file(cut / "model/rerank.safetensors").items():
        assert torch.equal(matrix, matrices[name]), name


@pytest.mark.slow
def test_two_ranks_end_with_the_same_reranker(forked: Server, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    folder = tmp_path / "run"
    ranks = [start(forked, folder, **both, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]
    for rank in ranks:
        finish(rank)
    first, second = learned(folder, 0), learned(folder, 1)
    assert all(torch.equal(ours, theirs) and ours.any() for ours, theirs in zip(first, second, strict=True))
    initial, model = load_file(folder / "initial/model.safetensors"), load_file(folder / "model/model.safetensors")
    assert all(torch.equal(initial[name], tensor) for name, tensor in model.items()), "0 / 0 on ranks without rows"

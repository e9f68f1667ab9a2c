"""Killed and resumed equals uninterrupted, to the bit: episodes, rewards, weights, and what became of every prompt."""

from __future__ import annotations

import json
import random
import signal
import socket
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from memfactory.runs import RunFolder
from memfactory.train.ledger import REASONS
from tests.forked import Server

# 5 tasks, 2 to a batch: one is left over in every pass, and 6 steps are three passes
SMALL = (
    "train.max_steps=6",
    "train.per_device_train_batch_size=8",
    "train.num_generations=4",
    "train.save_steps=2",
    "train.save_total_limit=2",
    "train.eval_strategy=steps",
    "train.eval_steps=3",
    "train.learning_rate=0.003",
    "warmup.steps=12",
    "warmup.batch_rows=16",
    "environment.train_tasks=5",
    "environment.test_tasks=2",
    "rollout.log_episodes=8",
)
KINDS: dict[str, tuple[str, ...]] = {
    "plain": (),
    # a checkpoint can fall between the updates on one generation batch
    "reuse": ("train.steps_per_generation=2", "train.num_iterations=2", "train.save_steps=1"),
    # rewards depend on what earlier batches were like
    "stateful": (f"aggregate.name={Path(__file__).with_name('running_weights.py')}:RunningWeights",),
}


def command(folder: Path, *options: str) -> list[str]:
    return ["train", "memagent/quickstart", f"output_dir={folder}", *SMALL, *options]


@pytest.fixture(scope="module")
def server(forked: Server) -> Server:
    return forked


@pytest.fixture(scope="module")
def whole(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of the uninterrupted run of a kind, and how many seconds it took."""
    made: dict[str, tuple[Path, float]] = {}

    def of(kind: str) -> tuple[Path, float]:
        if kind not in made:
            folder, start = tmp_path_factory.mktemp(kind) / "whole", time.monotonic()
            server.run(command(folder, *KINDS[kind]))
            made[kind] = folder, time.monotonic() - start
        return made[kind]

    return of


def measured(folder: Path) -> list[Any]:
    """Metrics without times; a step that was evaluated twice is read as one, as the report does."""
    newest = {}
    for line in RunFolder(folder).read_metrics():
        values = {name: value for name, value in line["values"].items() if not name.startswith("time/")}
        newest[line["phase"], line["step"]] = values
    return sorted(newest.items())


def trained_episodes(folder: Path) -> list[Any]:
    return [
        (record["step"], record["task"]["id"], record["turns"]) for record in RunFolder(folder).read_episodes("train")
    ]


def assert_same_run(one: Path, other: Path) -> None:
    for name in ("rewards.jsonl", "ledger.jsonl"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert trained_episodes(one) == trained_episodes(other)
    assert measured(one) == measured(other)
    first, second = load_file(one / "model" / "model.safetensors"), load_file(other / "model" / "model.safetensors")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    summaries = [RunFolder(folder).read_summary() for folder in (one, other)]
    for name in ("before", "after", "steps", "stopped", "ledger", "totals"):
        assert summaries[0][name] == summaries[1][name], name


def check_ledger(folder: Path, tasks: int) -> Counter[str]:
    """Every prompt that was issued ended once, and a whole pass has every task once; what they ended as."""
    issued: dict[int, list[str]] = {}
    ended: dict[int, list[str]] = {}
    open_: set[tuple[int, str]] = set()
    outcomes: Counter[str] = Counter()
    for line in RunFolder(folder).read_ledger():
        if line["event"] == "issued":
            issued.setdefault(line["pass"], []).extend(line["prompts"])
            for prompt in line["prompts"]:
                open_.add((line["pass"], prompt))
        elif line["event"] in ("trained", "dropped"):
            outcomes[line.get("reason", "trained")] += len(line["prompts"])
            for prompt in line["prompts"]:
                open_.remove((line["pass"], prompt))
                ended.setdefault(line["pass"], []).append(prompt)
    assert not open_
    for number, prompts in issued.items():
        assert len(set(prompts)) == len(prompts), f"pass {number}: a prompt was repeated"
        assert sorted(ended[number]) == sorted(prompts)
        if number < max(issued):
            assert len(prompts) == tasks, f"pass {number}: a prompt was lost"
    totals = RunFolder(folder).read_summary()["ledger"]
    assert totals == {
        "issued": sum(map(len, issued.values())),
        "trained": outcomes["trained"],
        "dropped": {reason: outcomes[reason] for reason in REASONS if outcomes[reason]},
        "open": 0,
    }
    return outcomes


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_prompt_ends_once(whole: Any, kind: str) -> None:
    outcomes = check_ledger(whole(kind)[0], tasks=5)
    assert outcomes["trained"]
    assert outcomes["no room"]


PLACES = {
    "in the warm-up": "memfactory.runs:RunFolder.log_metrics#1",
    "before the warmed-up model is saved": "memfactory.train.start:save_whole",
    "in the evaluation before training": "memfactory.evaluate.run:_summarise#1",
    "before the first checkpoint": "memfactory.train.trainer:EpisodeGRPOTrainer._micro_batches#1",
    "between generation and update": "memfactory.train.trainer:EpisodeGRPOTrainer._micro_batches#4",
    "in the evaluation during training": "memfactory.evaluate.run:_summarise#3",
    "in the middle of a checkpoint": "transformers.trainer:Trainer._save_rng_state#2",
    "when only the seal was missing": "memfactory.train.sealed:seal#2",
    "before old checkpoints are deleted": "memfactory.train.sealed:rotate_checkpoints#3",
    "after the last update": "memfactory.train.trainer:EpisodeGRPOTrainer.save_model#4",
    "at the very end": "memfactory.train.run:write_report",
}


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_killed_and_resumed_equals_uninterrupted(server: Server, whole: Any, tmp_path: Path, place: str) -> None:
    folder = tmp_path / "run"
    run = server.start(command(folder), at=PLACES[place])
    assert run.wait() == -signal.SIGKILL, run.output
    output = server.run(command(folder))  # the same command again
    resumed = "resuming from" in output
    assert resumed or "holds a run without a checkpoint" in output or "already finished" in output
    assert_same_run(whole("plain")[0], folder)
    assert not [
        p
        for p in (folder / "checkpoints").glob("checkpoint-*")
        if not json.loads((p / "seal.json").read_text())["complete"]
    ]
    if place == "in the evaluation before training":
        assert "warm up" not in output  # it was done and saved


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "place"), [("reuse", 4), ("reuse", 6), ("stateful", 2)])
def test_state_between_updates_survives(server: Server, whole: Any, tmp_path: Path, kind: str, place: int) -> None:
    folder = tmp_path / "run"
    run = server.start(command(folder, *KINDS[kind]), at=f"memfactory.train.sealed:rotate_checkpoints#{place - 1}")
    assert run.wait() == -signal.SIGKILL, run.output
    server.run([*command(folder, *KINDS[kind]), "--resume"])
    assert_same_run(whole(kind)[0], folder)


@pytest.mark.slow
def test_killed_again_and_again_at_random_moments(server: Server, whole: Any, tmp_path: Path) -> None:
    reference, seconds = whole("plain")
    draw, folder = random.Random(time.time_ns()), tmp_path / "run"
    moments = []
    for _ in range(6):
        run = server.start(command(folder))
        moments.append(draw.uniform(0.1, 1.0) * seconds)
        time.sleep(moments[-1])
        run.send(signal.SIGKILL)
        if run.wait() == 0:
            break
    server.run(command(folder))
    try:
        assert_same_run(reference, folder)
    except AssertionError:
        print("killed after seconds", moments)
        raise


# ---- signals that can be handled ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "place", "step"),
    [
        ("SIGUSR1", "in the warm-up", 0),
        ("SIGINT", "in the evaluation before training", 0),
        ("SIGTERM", "between generation and update", 4),
        ("SIGINT", "in the evaluation during training", 3),
    ],
)
def test_a_signal_ends_a_run_resumably(
    server: Server, whole: Any, tmp_path: Path, name: str, place: str, step: int
) -> None:
    folder = tmp_path / "run"
    output = server.run(command(folder), 130 if name == "SIGINT" else 143, at=PLACES[place], do=name)
    assert f"stopped by {name}" in output
    assert "the same command" in output
    summary = RunFolder(folder).read_summary()
    assert (summary["stopped"], summary["signal"]) == ("interrupted", name)
    checkpoint = RunFolder(folder).latest_checkpoint()
    assert (checkpoint.name if checkpoint else "") == (f"checkpoint-{step}" if step else "")
    if step:
        assert summary["steps"] == step
    server.run(command(folder))
    assert_same_run(whole("plain")[0], folder)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_at_the_same_step(server: Server, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["train.per_device_train_batch_size=4", "train.eval_strategy=no", "train.max_steps=4"]
    options += ["environment.train_tasks=4", "warmup=null"]

    def ranks(at: str) -> list[Any]:
        world = {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        return [
            server.start(
                command(tmp_path / "run", *options),
                environment=world | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                at=at if rank == 1 else "",
                do="SIGTERM",
            )
            for rank in range(2)
        ]

    both = ranks("memfactory.train.trainer:EpisodeGRPOTrainer._micro_batches#2")
    assert [run.wait() for run in both] == [143, 143], both[0].output + both[1].output
    assert RunFolder(tmp_path / "run").read_summary()["steps"] == 2
    both = ranks("")
    assert [run.wait() for run in both] == [0, 0], both[0].output + both[1].output
    assert "resuming from" in both[0].output
    check_ledger(tmp_path / "run", tasks=4)


# ---- faults of the disk ---------------------------------------------------------------------------


@pytest.mark.slow
def test_a_full_disk_costs_no_checkpoint(server: Server, whole: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = server.start(command(folder), at="memfactory.train.trainer:EpisodeGRPOTrainer._micro_batches#4")
    assert run.wait() == -signal.SIGKILL
    optimizer = (folder / "checkpoints" / "checkpoint-2" / "optimizer.pt").stat().st_size
    # files of this size can be written, the optimizer's of the next checkpoint cannot
    output = server.run(command(folder), 1, largest=optimizer - 10_000)
    assert "checkpoint-4 could not be written: the disk is full" in output
    assert "goes on from the newest of them" in output.replace("\n", " ")
    assert [path.name for path in (folder / "checkpoints").glob("*checkpoint-*")] == ["checkpoint-2"]
    assert "checkpoint-2" in server.run(command(folder))
    assert_same_run(whole("plain")[0], folder)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(server: Server, whole: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = server.start(command(folder), at="memfactory.train.trainer:EpisodeGRPOTrainer._micro_batches#5")
    assert run.wait() == -signal.SIGKILL
    broken = folder / "checkpoints" / "checkpoint-4" / "optimizer.pt"
    broken.write_bytes(broken.read_bytes()[:1000])
    output = server.run(command(folder))
    assert "checkpoint-4 is damaged: optimizer.pt has 1000 bytes" in output
    assert "resuming from" in output
    assert "step    3/6" in output
    assert_same_run(whole("plain")[0], folder)


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_read_is_named(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = server.start(command(folder), at="memfactory.train.trainer:EpisodeGRPOTrainer._micro_batches#3")
    assert run.wait() == -signal.SIGKILL
    broken = folder / "checkpoints" / "checkpoint-2" / "optimizer.pt"
    broken.write_bytes(b"\0" * broken.stat().st_size)  # the right size, nothing else
    output = server.run(command(folder), 1)
    assert "checkpoint-2 cannot be read" in output
    assert "rm -r" in output

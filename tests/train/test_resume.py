"""Killed and resumed equals uninterrupted, to the bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

_SMALL = (
    "train.max_steps=6",
    "train.per_device_train_batch_size=8",
    "train.num_generations=4",
    "train.save_steps=1",
    "train.save_total_limit=20",
    "train.eval_strategy=no",
    "train.learning_rate=0.003",
    "warmup.steps=12",
    "warmup.batch_rows=16",
    "environment.train_tasks=40",
    "environment.test_tasks=4",
    "rollout.log_episodes=8",
)


def start(folder: Path, *overrides: str, resume: bool = False) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "memfactory.cli.main", "train", "memagent/quickstart", f"output_dir={folder}"]
    command += [*_SMALL, *overrides, *(["--resume"] if resume else [])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output
    return output


def trained_tasks(folder: Path) -> list[tuple[int, list[str]]]:
    """Task ids by update, in the order they were trained."""
    by_step: dict[int, list[str]] = {}
    for line in (folder / "episodes.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["split"] == "train":
            by_step.setdefault(record["step"], []).append(record["task"])
    return sorted(by_step.items())


def assert_same_run(one: Path, other: Path) -> None:
    assert trained_tasks(one) == trained_tasks(other)
    assert (one / "rewards.jsonl").read_bytes() == (other / "rewards.jsonl").read_bytes()
    first, second = load_file(one / "model" / "model.safetensors"), load_file(other / "model" / "model.safetensors")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


# (2, 1): two updates per generation batch, so a checkpoint can fall between them
@pytest.mark.slow
@pytest.mark.parametrize(("updates_per_batch", "stateful"), [(1, False), (2, False), (1, True)])
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, updates_per_batch: int, stateful: bool) -> None:
    options = [f"train.steps_per_generation={updates_per_batch}", "train.gradient_accumulation_steps=1"]
    if stateful:  # rewards depend on what earlier batches were like
        options.append(f"aggregate.name={Path(__file__).with_name('running_weights.py')}:RunningWeights")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(whole, *options))
    assert len(trained_tasks(whole)) == 6 // updates_per_batch
    for state in (whole / "checkpoints").glob("checkpoint-*/trainer_state.json"):
        # this file makes a checkpoint complete, so the rollout buffer must have been there before it
        assert (state.parent / "0_rollout_buffer.pt").stat().st_mtime_ns <= state.stat().st_mtime_ns

    process = start(killed, *options)
    deadline = time.monotonic() + 200
    while not (killed / "checkpoints" / "checkpoint-3" / "trainer_state.json").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (killed / "model").exists(), "the run ended before it could be killed"

    output = finish(start(killed, *options, resume=True))
    assert "resuming from" in output
    assert_same_run(whole, killed)
    assert json.loads((killed / "summary.json").read_text())["stopped"] == "finished"


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_that_resumes(tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    finish(start(whole, "train.save_steps=100"))
    process = start(stopped, "train.save_steps=100")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step"):
            break
    process.send_signal(signal.SIGINT)
    output = finish(process, code=130)
    assert "--resume" in output
    summary = json.loads((stopped / "summary.json").read_text())
    assert summary["stopped"] == "interrupted"
    assert 1 <= summary["steps"] < 6
    finish(start(stopped, "train.save_steps=100", resume=True))
    assert_same_run(whole, stopped)

"""`rollout.vllm.mode: colocate`: one command trains; the server beside the trainer comes and goes with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # `engines` is shared by folders of tests

from engines import engine_python

from memfactory.policy.vllm_process import MARK

pytestmark = pytest.mark.slow


def command(folder: Path, *overrides: str) -> list[str]:
    recipe = ["memagent/quickstart-vllm", f"output_dir={folder}", "rollout.vllm.mode=colocate", *overrides]
    small = ["warmup.steps=5", "environment.train_tasks=32", "environment.test_tasks=4", "train.eval_strategy=no"]
    sizes = ["train.per_device_train_batch_size=16", "train.max_steps=2", "train.save_steps=1"]
    return [sys.executable, "-m", "memfactory.cli.main", "train", *recipe, *small, *sizes]


def environ() -> dict[str, str]:
    return os.environ | {"MEMFACTORY_VLLM_PYTHON": engine_python("vllm"), "VLLM_CPU_KVCACHE_SPACE": "1"}


def left_over(folder: Path) -> list[psutil.Process]:
    """Processes of a server that was started for `folder`; its mark is in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK, "").startswith(str(folder)):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_all_weights_are_trained_with_one_command(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = subprocess.run(
        command(run, "model.lora=null"), env=environ(), capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert json.loads((run / "summary.json").read_text())["stopped"] == "finished"
    lines: list[dict[str, Any]] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["values"] for line in lines if line["phase"] == "train"]
    assert len(steps) == 2
    for step in steps:
        assert step["server/canary_difference"] < 1e-4
        assert step["sampling/sampling_logp_difference/max"] < 1e-4
        assert step["server/requests"] > 0
    assert not left_over(run)


def test_the_server_of_a_killed_trainer_ends(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with (tmp_path / "log").open("w") as log:
        trainer = subprocess.Popen(command(run), env=environ(), stdout=log, stderr=log)
        end = time.monotonic() + 300
        while not (started := left_over(run)) and time.monotonic() < end and trainer.poll() is None:
            time.sleep(0.2)
        assert trainer.poll() is None, (tmp_path / "log").read_text()[-3000:]
        assert started
        trainer.kill()
        trainer.wait()
    end = time.monotonic() + 30
    while left_over(run) and time.monotonic() < end:
        time.sleep(0.2)
    assert not left_over(run)

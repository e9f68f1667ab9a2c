"""`rollout.vllm.mode: colocate`: one command trains; the server beside the trainer comes and goes with it."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from vllm_serving import left_over

from tests.engines import engine_python
from tests.forked import Server

pytestmark = pytest.mark.slow


def command(folder: Path, *overrides: str) -> list[str]:
    recipe = ["memagent/quickstart-vllm", f"output_dir={folder}", "rollout.vllm.mode=colocate", *overrides]
    small = ["warmup.steps=5", "environment.train_tasks=32", "environment.test_tasks=4", "train.eval_strategy=no"]
    sizes = ["train.per_device_train_batch_size=16", "train.max_steps=2", "train.save_steps=1"]
    return ["train", *recipe, *small, *sizes]


def environ() -> dict[str, str]:
    return {"MEMFACTORY_VLLM_PYTHON": engine_python("vllm"), "VLLM_CPU_KVCACHE_SPACE": "1"}


def test_all_weights_are_trained_with_one_command(forked: Server, tmp_path: Path) -> None:
    run = tmp_path / "run"
    forked.run(command(run, "model.lora=null"), environment=environ())
    assert json.loads((run / "summary.json").read_text())["stopped"] == "finished"
    lines: list[dict[str, Any]] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["values"] for line in lines if line["phase"] == "train"]
    assert len(steps) == 2
    for step in steps:
        assert step["server/canary_difference"] < 1e-4
        assert step["sampling/sampling_logp_difference/max"] < 1e-4
        assert step["server/requests"] > 0
    assert not left_over(run)


def test_the_server_of_a_killed_trainer_ends(forked: Server, tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer = forked.start(command(run), environment=environ())
    end = time.monotonic() + 120
    while not (started := left_over(run)) and time.monotonic() < end:
        time.sleep(0.2)
    trainer.send(signal.SIGKILL)
    assert trainer.wait() == -signal.SIGKILL, trainer.output[-3000:]
    assert started, trainer.output[-3000:]
    end = time.monotonic() + 30
    while left_over(run) and time.monotonic() < end:
        time.sleep(0.2)
    assert not left_over(run)

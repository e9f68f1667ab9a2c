"""Starts the two processes of a test with ranks."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
LEARNING_RATE = 100.0
"""Of SGD where gradients are read from weights: large, so that the difference of weights keeps its digits."""


def free_port() -> int:
    """One outside of the range from which other programs get theirs while the ranks are still starting."""
    for _ in range(100):
        port = random.randint(20_000, 30_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise OSError("no free port")


def environment(engine: str) -> dict[str, str]:
    """Of both ranks; `RANK` and `LOCAL_RANK` come on top."""
    own = {
        "MEMFACTORY_TEST_ENGINE": engine,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
        "DS_ACCELERATOR": "cpu",
    }
    others = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))}
    return others | own


def on_two_ranks(command: list[str], engine: str, seconds: float = 480) -> list[tuple[int, str]]:
    """Exit code and output of each rank of `command`; none is left behind."""
    shared = environment(engine)
    ranks = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=seconds)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, output) for rank, output in zip(ranks, outputs, strict=True)]


def job(function: str, **arguments: Any) -> dict[str, Any]:
    return {"function": function, "arguments": arguments}


def run_jobs(jobs: dict[str, dict[str, Any]], engine: str, folder: Path, python: str) -> dict[str, Any]:
    """What each of `jobs` (functions of `two_ranks`) returns on rank 0."""
    ends = on_two_ranks([python, "-m", "tests.train.two_ranks", json.dumps(jobs), str(folder)], engine)
    assert [code for code, _ in ends] == [0, 0], "\n".join(output[-6000:] for _, output in ends)
    return torch.load(folder / "results.pt", weights_only=False)

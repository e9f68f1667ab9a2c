"""Two processes make the step that one makes: same episodes, same gradient, on every rank."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def case(name, *, budget=40, dead=0, tasks=4, seed=1, every_scope=False, **options):
    groups = {"tasks": tasks, "generations": 4, "seed": seed, "dead": dead}
    options = {"num_generations": 4} | options
    return {"name": name, "groups": groups, "budget": budget, "every_scope": every_scope, "options": options}


# batch size x 2 ranks x accumulation = all episodes; the ranks differ in tokens, rows and micro-batches
CASES = [
    *(case(loss, loss_type=loss, per_device_train_batch_size=8) for loss in ("dapo", "grpo", "dr_grpo", "luspo")),
    case("one rank has only a dead group", tasks=2, dead=1, per_device_train_batch_size=4),
    case("a group straddles the ranks", tasks=3, loss_type="grpo", per_device_train_batch_size=6),
    case("dimensions of every scope", every_scope=True, per_device_train_batch_size=8),
    case(
        "dimensions of every scope, and a group straddles the ranks",
        tasks=3,
        every_scope=True,
        per_device_train_batch_size=6,
    ),
    case(
        "fewer micro-batches than accumulation steps",
        budget=10_000,
        loss_type="grpo",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    ),
    case(
        "the last generation batch of a step is dead",
        dead=2,
        loss_type="dapo",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        steps_per_generation=1,
        shuffle_dataset=False,
    ),
    case("with a small token budget", budget=1, per_device_train_batch_size=4, gradient_accumulation_steps=2),
]


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    cases = json.dumps(CASES)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.train.two_ranks", cases, str(folder / "gradients.pt")],
            cwd=ROOT,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(outputs)[-4000:]
    return torch.load(folder / "gradients.pt")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CASES)), ids=[spec["name"] for spec in CASES])
def test_gradient_is_that_of_one_process(bench, tokenizer, tmp_path, on_two_ranks, number):
    spec = CASES[number]
    first, second = on_two_ranks[number]["gradients"]
    assert torch.equal(first, second), "the ranks hold different gradients: their weights will drift apart"
    options = dict(spec["options"])
    options["per_device_train_batch_size"] *= 2  # the same episodes on one process
    alone, _ = bench.ours(
        bench.groups(**spec["groups"]),
        bench.make_model(),
        tokenizer,
        tmp_path,
        budget=spec["budget"],
        dimensions=bench.every_scope if spec["every_scope"] else (),
        **options,
    )
    assert alone[0].norm() > 1e-4
    assert bench.relative(first, alone[0]) < 1e-5

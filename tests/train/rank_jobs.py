"""What pairs of processes are asked to do, by pair and name; the tests that read the results name what they mean.

Three pairs, because starting one takes longer than a job: DDP as it is on CPUs, FSDP2 under the shim, ZeRO under the
shim in an environment with DeepSpeed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tests.train.launching import ROOT, job

Job = dict[str, Any]
PADDING = 0
"""The id of the tests' tokenizer."""


def case(
    *,
    budget: int = 40,
    dead: int = 0,
    tasks: int = 4,
    seed: int = 1,
    begin: Sequence[int] = (),
    every_scope: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """A step on recorded episodes; batch size x 2 ranks x accumulation are all of them."""
    groups = {"tasks": tasks, "generations": 4, "seed": seed, "dead": dead, "begin": begin}
    options = {"num_generations": 4} | options
    return {"groups": groups, "budget": budget, "every_scope": every_scope, "options": options}


# the ranks differ in tokens, rows and micro-batches
CASES = {
    **{loss: case(loss_type=loss, per_device_train_batch_size=8) for loss in ("dapo", "grpo", "dr_grpo", "luspo")},
    "one rank has only a dead group": case(tasks=2, dead=1, per_device_train_batch_size=4),
    "a group straddles the ranks": case(tasks=3, loss_type="grpo", per_device_train_batch_size=6),
    "dimensions of every scope": case(every_scope=True, per_device_train_batch_size=8),
    "dimensions of every scope, and a group straddles the ranks": case(
        tasks=3, every_scope=True, per_device_train_batch_size=6
    ),
    "fewer micro-batches than accumulation steps": case(
        budget=10_000, loss_type="grpo", per_device_train_batch_size=4, gradient_accumulation_steps=2
    ),
    "the last generation batch of a step is dead": case(
        dead=2,
        loss_type="dapo",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        steps_per_generation=1,
        shuffle_dataset=False,
    ),
    # rows that fill up a pass hold padding, and nothing else
    "prompts begin with the padding's id": case(begin=[PADDING] * 5, per_device_train_batch_size=8),
    "with a small token budget": case(budget=1, per_device_train_batch_size=4, gradient_accumulation_steps=2),
}
SHARDED = {
    "a group straddles the ranks": "dimensions of every scope, and a group straddles the ranks",
    "one rank has only a dead group": "one rank has only a dead group",
    "gradients accumulate over many micro-batches": "with a small token budget",
}
"""The cases that sharding could get wrong, by what they are about there."""

FAILURES = [("generating", [1]), ("generating", [0, 1]), ("scoring", [0]), ("learning", [1]), ("logging", [0])]

_PARTS = ROOT / "tests" / "train" / "rank_parts.py"
RECIPE = [
    f"agent.name={_PARTS}:Uneven",
    f"rewards={json.dumps([{'name': f'{_PARTS}:words'}])}",
    "warmup.steps=4",
    "warmup.batch_rows=16",
    "environment.train_tasks=40",
    "environment.test_tasks=6",
    "train.max_steps=4",
    "train.per_device_train_batch_size=6",  # three groups on two ranks
    "train.num_generations=4",
    "train.save_steps=2",
    "train.eval_strategy=steps",
    "train.eval_steps=2",
    "train.learning_rate=0.01",
    "rollout.train_token_budget=400",
    "rollout.log_episodes=100",
]
CHECKPOINTING = ["train.gradient_checkpointing=true"]
LORA = ["model.lora={}", "train.beta=0.01"]


_ZERO2 = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 2}}
_CLIPS = ["train.use_cpu=false", f"train.deepspeed={json.dumps(_ZERO2)}", "train.max_grad_norm=0.5"]


def _resumed(engine: str) -> dict[str, Job]:
    arguments = {"source": engine, "folder": f"{engine}-resumed", "engine": engine, "overrides": RECIPE}
    return {f"{engine} resumed": job("resume", **arguments)}


def _sharded(engine: str, *, fails: bool = False) -> dict[str, Job]:
    jobs = {f"{engine}: {name}": job("difference", case=CASES[of], engine=engine) for name, of in SHARDED.items()}
    jobs[f"{engine} run"] = job("run", folder=f"{engine}", engine=engine, overrides=RECIPE)
    jobs |= _resumed(engine)
    if fails:
        jobs[f"{engine} failure"] = job("failure", where="generating", ranks=[1], engine=engine)
    return jobs


def _offloaded(engine: str) -> dict[str, Job]:
    return {f"{engine} run": job("run", folder=engine, engine=engine, overrides=RECIPE)} | _resumed(engine)


JOBS: dict[str, dict[str, Job]] = {
    "ddp": {name: job("gradient", case=spec) for name, spec in CASES.items()}
    | {f"{where} {ranks}": job("failure", where=where, ranks=ranks, engine="ddp") for where, ranks in FAILURES}
    | {"ddp run": job("run", folder="ddp", engine="ddp", overrides=RECIPE)}
    | _resumed("ddp")
    | {"FSDP on CPUs": job("refused", overrides=[*RECIPE, "train.fsdp=true"])},
    "fsdp2": _sharded("fsdp2", fails=True)
    | {"fsdp2 checkpointing": job("run", folder="recomputed", engine="fsdp2", overrides=[*RECIPE, *CHECKPOINTING])}
    | {"fsdp2 LoRA": job("run", folder="adapter", engine="fsdp2", overrides=[*RECIPE, *LORA])}
    | _offloaded("fsdp2_offload"),
    # a process in which ZeRO-3 has failed does not train another adapter: it waits for ever
    "zero": _sharded("zero2")
    | {"zero3 LoRA": job("run", folder="zero3-adapter", engine="zero3", overrides=[*RECIPE, *LORA, *CHECKPOINTING])}
    | _offloaded("zero3_offload")
    | _sharded("zero3", fails=True)
    | {f"zero1: {name}": job("difference", case=CASES[of], engine="zero1") for name, of in list(SHARDED.items())[:1]}
    | {"DeepSpeed that clips": job("refused", overrides=[*RECIPE, *_CLIPS])},
}

"""One of the processes that tests start in pairs: jobs, one after another, because starting up is what takes time.

Arguments: a JSON object of jobs by name, and a folder. A job is the name of a function here and its arguments; what
it returns on rank 0 is written to `FOLDER/results.pt`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model_state_dict
from rich.console import Console
from torch.distributed.tensor import DTensor

from memfactory.errors import MemFactoryError
from memfactory.policy import prefix_sharing, stem
from memfactory.reward.system import RewardSystem
from memfactory.train.prepare import prepare
from memfactory.train.run import train
from memfactory.train.sharding import whole_state_dict
from memfactory.train.trainer import EpisodeGRPOTrainer
from memfactory.train.weight_sync import AdapterSync
from tests.train import cpu_shim
from tests.train.conftest import (
    EVERY_SCOPE,
    VOCABULARY,
    ReplayAgent,
    make_model,
    recorded_groups,
    step_of_ours,
    tiny_tokenizer,
)
from tests.train.launching import LEARNING_RATE

prefix_sharing.LEAST = 1  # as in the tests of one process: rows of a group are packed, however short


def options(engine: str) -> dict[str, Any]:
    """Of `train:`, for an engine."""
    if engine == "ddp":
        return {}
    name, _, offload = engine.partition("_")
    if name == "fsdp2":
        return {"fsdp": True, "use_cpu": False} | ({"fsdp_config": {"cpu_offload": True}} if offload else {})
    automatic = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    zero: dict[str, Any] = {"stage": int(name.removeprefix("zero"))}
    own: dict[str, Any] = dict.fromkeys(automatic, "auto")
    if offload:  # pinned memory needs a GPU; DeepSpeed's own AdamW for CPUs is compiled first, a minute of work
        own["zero_force_ds_cpu_optimizer"] = False
        zero |= {f"offload_{what}": {"device": "cpu", "pin_memory": False} for what in ("optimizer", "param")}
    return {"use_cpu": False, "deepspeed": own | {"zero_optimization": zero}}


def step(case: dict[str, Any], folder: Path, engine: str) -> tuple[list[torch.Tensor], EpisodeGRPOTrainer, Any]:
    model = make_model()
    with passes_for_stems() as computed:
        steps, trainer = step_of_ours(
            recorded_groups(**case["groups"]),
            model,
            tiny_tokenizer(VOCABULARY),
            folder,
            budget=case["budget"],
            dimensions=EVERY_SCOPE if case["every_scope"] else (),
            **case["options"],
            **options(engine),
        )
    counts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(counts, len(computed))
    assert len(set(counts)) == 1, f"ranks made unequal numbers of passes: {counts}"
    # the first is the trial of the model
    assert counts[0] > 1 or case["budget"] > 1, "a budget that cuts groups is one for which passes are joined"
    return steps, trainer, model


@contextmanager
def passes_for_stems() -> Iterator[list[int]]:
    """The positions of each pass that computes a stem, and of the one with which the model is tried."""
    found: list[int] = []
    compute = stem._compute

    def noted(model: Any, packed: Any, *args: Any) -> None:
        found.append(packed.unique)
        compute(model, packed, *args)

    stem._compute = noted
    try:
        yield found
    finally:
        stem._compute = compute


def gradient(case: dict[str, Any], folder: Path) -> list[torch.Tensor]:
    """The gradient of a step under DDP, of both ranks."""
    steps, _, _ = step(case, folder, "ddp")
    both = [torch.empty_like(steps[0]) for _ in range(dist.get_world_size())]
    dist.all_gather(both, steps[0])
    return both


def difference(case: dict[str, Any], folder: Path, engine: str) -> torch.Tensor:
    """The gradient of a step, as what plain SGD took off the weights: sharded gradients are nowhere whole."""
    before = {name: value.clone() for name, value in make_model().state_dict().items()}
    case["options"] |= {"optim": "sgd", "learning_rate": LEARNING_RATE}
    _, trainer, _ = step(case, folder, engine)
    after = whole_state_dict(trainer.model_wrapped, trainer.accelerator)
    if dist.get_rank() or after is None:
        return torch.empty(0)
    return torch.cat([(before[name] - after[name]).flatten() / LEARNING_RATE for name in before])


def failure(where: str, ranks: list[int], folder: Path, engine: str) -> list[str]:
    """What each rank ends with when `ranks` raise while they do `where`."""

    def breaks(*args: Any, **kwargs: Any) -> Any:
        raise OSError(f"no {where} here")

    case = {
        "groups": {"tasks": 4, "generations": 4},
        "budget": 40,
        "every_scope": True,
        "options": {"num_generations": 4, "per_device_train_batch_size": 8},
    }
    owner, name = {
        "generating": (ReplayAgent, "run"),
        "scoring": (RewardSystem, "assess"),
        "learning": (EpisodeGRPOTrainer, "_learn"),
        "logging": (EpisodeGRPOTrainer, "_log_rollout"),
    }[where]
    with replaced(owner, name, breaks if dist.get_rank() in ranks else getattr(owner, name)):
        try:
            step(case, folder, engine)
        except MemFactoryError as error:
            ending = f"{type(error).__name__}: {error}"
        else:
            ending = "none"
    both: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(both, ending)
    return both


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def run(folder: Path, engine: str, overrides: list[str]) -> dict[str, Any]:
    """`memfactory train`; its summary."""
    asked = [f"train.{name}={json.dumps(value)}" for name, value in options(engine).items()]
    prepared = prepare(Path("recipes/memagent/quickstart.yaml"), [f"output_dir={folder}", *overrides, *asked])
    return train(prepared, console=Console(quiet=True))


def refused(folder: Path, overrides: list[str]) -> str:
    """The error that a run of `memfactory train` ends with."""
    try:
        run(folder, "ddp", overrides)
    except MemFactoryError as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def resume(source: str, folder: Path, engine: str, overrides: list[str]) -> dict[str, Any]:
    """The run at `source`, gone on with from the first of its checkpoints as if it had been killed after it."""
    if dist.get_rank() == 0:
        shutil.copytree(folder.parent / source, folder)
        shutil.rmtree(folder / "model")
        for checkpoint in sorted((folder / "checkpoints").glob("checkpoint-*"))[1:]:
            shutil.rmtree(checkpoint)
        summary = json.loads((folder / "summary.json").read_text())
        (folder / "summary.json").write_text(json.dumps(summary | {"stopped": "unfinished"}))
    dist.barrier()
    return run(folder, engine, overrides)


def served(folder: Path, engine: str, overrides: list[str], spoil: int = 0) -> list[dict[str, Any]]:
    """A run whose turns come from a vLLM server; what each rank has seen of it.

    Args:
        spoil: the adapter after that many others loses its end on the disk, before the server reads it; 0: none does.
    """
    seen: dict[str, Any] = {"steps": [], "gradients": [], "adapter": {}, "ending": "none"}
    assess, norm, save = EpisodeGRPOTrainer._assess, EpisodeGRPOTrainer._get_grad_norm, AdapterSync.write
    trainers: list[EpisodeGRPOTrainer] = []

    def noted(self: Any, episodes: Any, measuring: Any) -> Any:
        trainers.append(self)
        turns, pool = [turn for episode in episodes for turn in episode.turns], self.policy.trained.pool
        seen["steps"].append(
            {
                "step": self.state.global_step,
                "versions": sorted({turn.policy_version for turn in turns}),
                "turns": len(turns),
                "completions": [turn.completion_ids for turn in turns],
                "adapter": pool.weights.name,
                "server": pool.servers[0].url,
                "sent": self.policy.trained.push.count,
                "difference": pool.difference,
            }
        )
        return assess(self, episodes, measuring)

    def measured(self: Any, model: Any, grad_norm: Any = None) -> Any:
        grads = (p.grad for p in model.parameters() if p.grad is not None)
        whole = [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in grads]
        seen["gradients"].append(torch.cat([grad.detach().flatten().clone() for grad in whole]))
        return norm(self, model, grad_norm)

    def cut(self: Any, model: Any, state: Any, folder: Path) -> None:
        save(self, model, state, folder)
        if self.count == spoil:
            os.truncate(folder / "adapter_model.safetensors", 100)

    asked = [f"train.{name}={json.dumps(value)}" for name, value in options(engine).items()]
    recipe = Path("recipes/memagent/quickstart-vllm.yaml")
    with (
        replaced(EpisodeGRPOTrainer, "_assess", noted),
        replaced(EpisodeGRPOTrainer, "_get_grad_norm", measured),
        replaced(AdapterSync, "write", cut if spoil else save),
    ):
        try:
            train(prepare(recipe, [f"output_dir={folder}", *overrides, *asked]), console=Console(quiet=True))
        except MemFactoryError as error:
            seen["ending"] = f"{type(error).__name__}: {error}"
        else:
            state = get_peft_model_state_dict(trainers[-1].accelerator.unwrap_model(trainers[-1].model))
            seen["adapter"] = {
                name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
                for name, value in state.items()
            }
    both: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(both, seen)
    return both


def main() -> None:
    if os.environ["MEMFACTORY_TEST_ENGINE"] != "ddp":
        cpu_shim.install()
    jobs, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for number, (name, job) in enumerate(jobs.items()):
        arguments = job["arguments"]
        arguments["folder"] = folder / arguments.get("folder", f"job{number}")
        began = time.perf_counter()
        results[name] = globals()[job["function"]](**arguments)
        print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)
    if dist.get_rank() == 0:
        torch.save(results, folder / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

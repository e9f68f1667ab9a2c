"""What was asked for is what runs: processes, FSDP, ZeRO stage, gradient clipping.

accelerate falls back without a word where it cannot do what it is told: `accelerate launch --cpu --num_processes 2`
runs one process, FSDP on CPUs runs as DDP, and a DeepSpeed configuration that does not name gradient clipping clips
at 1.0 whatever the recipe says. A run that goes on like that is slower, larger or other than the one that was meant,
and nobody sees it. So what was asked is read from where people ask (recipe, environment, launcher) and compared with
what is there, three times: when the processes are known, when the accelerator is, and when the model is wrapped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from accelerate import Accelerator, DistributedType, PartialState
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from memfactory.errors import EngineError, RecipeError, boundary

_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers (torchrun, MPI) say how many processes they started."""


@dataclass(frozen=True)
class Asked:
    """How a run was meant to be spread over processes."""

    processes: int = 1
    by: str = "no launcher"
    """Who asked for that many."""
    fsdp: int = 0
    """Version of FSDP; 0 for none."""
    deepspeed: bool = False
    stage: int = 0
    """ZeRO stage."""

    @classmethod
    def of(cls, args: Any, environ: Mapping[str, str] = os.environ, launcher: Sequence[str] | None = None) -> Asked:
        """What recipe, environment and launcher ask for.

        Args:
            args: TRL's configuration.
            environ: environment variables.
            launcher: command line of the parent process; default: looked up.

        Raises:
            RecipeError: a DeepSpeed configuration cannot be read.
        """
        processes, by = _processes(environ, _parent() if launcher is None else launcher)
        fsdp = 0
        if args.fsdp:
            fsdp = int((args.fsdp_config or {}).get("version", 2))
        elif _true(environ, "ACCELERATE_USE_FSDP"):
            fsdp = int(environ.get("FSDP_VERSION", 1))
        deepspeed = bool(args.deepspeed) or _true(environ, "ACCELERATE_USE_DEEPSPEED")
        return cls(processes, by, fsdp, deepspeed, _stage(args.deepspeed, environ) if deepspeed else 0)

    @property
    def words(self) -> str:
        if self.deepspeed:
            return f"DeepSpeed with ZeRO stage {self.stage}"
        return f"FSDP {self.fsdp}" if self.fsdp else "neither FSDP nor DeepSpeed"


def _true(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "").lower() in ("true", "1", "yes")


def _processes(environ: Mapping[str, str], launcher: Sequence[str]) -> tuple[int, str]:
    for name in _SIZES:
        if environ.get(name, "").isdecimal():
            return int(environ[name]), f"{name}={environ[name]}"
    # accelerate's launcher for one process leaves no trace of how many were asked for but its own command line
    if not any(Path(part).name in ("accelerate", "accelerate-launch") for part in launcher[:3]):
        return 1, "no launcher"
    count = _option(launcher, "num_processes")
    file = _option(launcher, "config_file")
    if count is None and file is not None and Path(file).is_file():
        count = str(yaml.safe_load(Path(file).read_text(encoding="utf-8")).get("num_processes", 1))
    return (int(count), "accelerate launch") if count is not None and count.isdecimal() else (1, "no launcher")


def _option(command: Sequence[str], name: str) -> str | None:
    """Value of ``--name VALUE`` or ``--name=VALUE`` (also with dashes inside) in `command`."""
    for place, part in enumerate(command):
        key, equals, value = part.partition("=")
        if key.removeprefix("--").replace("-", "_") == name and key.startswith("--"):
            return value if equals else next(iter(command[place + 1 :]), None)
    return None


def _parent() -> list[str]:
    try:
        parent = psutil.Process().parent()
        return parent.cmdline() if parent is not None else []
    except psutil.Error:
        return []


def _stage(config: Any, environ: Mapping[str, str]) -> int:
    """ZeRO stage of a DeepSpeed configuration: mapping, file, or what accelerate was configured with."""
    file = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if not config and file == "none":
        return int(environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2))
    if not isinstance(config, Mapping):
        file = str(config or file)
        with boundary(RecipeError, f"train.deepspeed: {file} cannot be read", "name a JSON file"):
            config = json.loads(Path(file).read_text(encoding="utf-8"))
    return int(config.get("zero_optimization", {}).get("stage", 0))


def check_options(args: Any, asked: Asked) -> None:
    """Refuse combinations under which ranks would wait for each other for ever, or that are not supported.

    Raises:
        RecipeError: such an option.
    """
    if asked.fsdp == 1:
        raise RecipeError(
            "FSDP 1 was asked for",
            "transformers is about to drop it, and episodes are not sampled with its weights",
            "use version 2: train.fsdp_config.version: 2, or fsdp_version: 2 in accelerate's configuration",
        )
    if asked.stage == 3 and not args.ds3_gather_for_generation:
        raise RecipeError(
            "train.ds3_gather_for_generation: False",
            "ranks whose episodes have other numbers of turns would wait for each other's weights for ever",
            "leave it out",
        )


def check_launcher(environ: Mapping[str, str] = os.environ, launcher: Sequence[str] | None = None) -> None:
    """Refuse to go on alone where accelerate's launcher was told to start several processes and started one.

    Before anything else, because TRL would find fault with a batch size that is right for as many as were asked for.

    Raises:
        EngineError: it was.
    """
    processes, by = _processes(environ, _parent() if launcher is None else launcher)
    if processes > 1 and not any(environ.get(name) for name in _SIZES):
        raise _alone(processes, by, 1)


def _alone(asked: int, by: str, runs: int) -> EngineError:
    return EngineError(
        f"{asked} processes were asked for (by {by}), and accelerate runs {runs}",
        "it falls back to one without saying so, e.g. for `accelerate launch --cpu`, or where it finds no GPU "
        "although it was not told to use CPUs",
        "start with `torchrun --nproc_per_node N -m memfactory.cli.main train ...`, "
        "on CPUs with ACCELERATE_USE_CPU=true",
    )


def check_started(asked: Asked, state: PartialState | None = None) -> None:
    """Compare the processes with what was asked for; needs no model.

    Raises:
        EngineError: accelerate runs something else.
    """
    state = state or PartialState()
    if state.num_processes != asked.processes:
        raise _alone(asked.processes, asked.by, state.num_processes)
    plain = (DistributedType.NO, DistributedType.MULTI_CPU)
    if asked.fsdp and state.distributed_type in plain:
        raise _other(asked, state.distributed_type, state.num_processes)
    if asked.deepspeed and state.distributed_type in plain and (state.num_processes > 1 or state._cpu):
        raise _other(asked, state.distributed_type, state.num_processes)


def check_running(asked: Asked, accelerator: Accelerator) -> None:
    """Compare the accelerator with what was asked for.

    Raises:
        EngineError: it is of another kind, version or stage.
    """
    check_started(asked)
    kind = accelerator.distributed_type
    wanted = DistributedType.DEEPSPEED if asked.deepspeed else DistributedType.FSDP if asked.fsdp else None
    if (wanted or kind) != kind or (wanted is None and kind in (DistributedType.DEEPSPEED, DistributedType.FSDP)):
        raise _other(asked, kind, accelerator.num_processes)
    plugin = accelerator.state.deepspeed_plugin
    if asked.deepspeed and plugin.zero_stage != asked.stage:
        raise EngineError(f"{asked.words} was asked for", f"accelerate runs stage {plugin.zero_stage}")
    if asked.fsdp and accelerator.state.fsdp_plugin.fsdp_version != asked.fsdp:
        version = accelerator.state.fsdp_plugin.fsdp_version
        raise EngineError(f"{asked.words} was asked for", f"accelerate runs version {version}")


def _other(asked: Asked, kind: DistributedType, processes: int) -> EngineError:
    if asked.fsdp or asked.deepspeed:
        fix = "run on GPUs, started by torchrun or `accelerate launch`; on CPUs leave FSDP and DeepSpeed out"
    else:
        fix = "ask for it in the recipe (train.fsdp or train.deepspeed), or unset ACCELERATE_USE_..."
    noun = "process" if processes == 1 else "processes"
    return EngineError(
        f"{asked.words} was asked for, and accelerate runs {kind.value} on {processes} {noun}",
        "it engages FSDP and DeepSpeed only on accelerator devices, and runs something else without saying so",
        fix,
    )


def check_wrapped(asked: Asked, model: Any, processes: int, args: Any) -> None:
    """Compare the model, as it is wrapped for training, with what was asked for.

    Raises:
        EngineError: it is wrapped otherwise.
        RecipeError: DeepSpeed clips gradients at another norm than the recipe says.
    """
    if asked.deepspeed:
        stage = model.zero_optimization_stage() if hasattr(model, "zero_optimization_stage") else None
        right, found = stage == asked.stage, f"ZeRO stage {stage}"
    elif asked.fsdp:
        right, found = isinstance(model, FSDPModule), type(model).__name__
    else:
        right, found = processes == 1 or isinstance(model, DistributedDataParallel), type(model).__name__
    if not right:
        raise EngineError(f"{asked.words} was asked for on {processes} processes", f"the model is wrapped as {found}")
    if asked.deepspeed and model.gradient_clipping() != args.max_grad_norm:
        raise RecipeError(
            f"train.max_grad_norm: {args.max_grad_norm}, and DeepSpeed clips at {model.gradient_clipping()}",
            "accelerate clips at 1.0 where the DeepSpeed configuration does not say, or at what it says",
            "put `gradient_clipping: auto` into the DeepSpeed configuration",
        )


class CheckWrapped(TrainerCallback):
    """Compares the model of `trainer`, as it is wrapped, with what was asked for, before the first step."""

    def __init__(self, trainer: Any, asked: Asked) -> None:
        self.trainer, self.asked = trainer, asked

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        check_wrapped(self.asked, self.trainer.model_wrapped, self.trainer.ranks.count, self.trainer.args)

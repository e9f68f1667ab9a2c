"""Accelerate's configuration files: found by name, checked, and filled in from the recipe and the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memfactory.errors import MemFactoryError, RecipeError, RecipeErrors
from memfactory.launch.memory import Sharding
from memfactory.named_files import named
from memfactory.recipe import nearest, read_yaml

_TYPES = {"NO": Sharding.NONE, "MULTI_GPU": Sharding.DDP, "FSDP": Sharding.FSDP}
_STAGES = {0: Sharding.DDP, 1: Sharding.ZERO1, 2: Sharding.ZERO2, 3: Sharding.ZERO3}
# accelerate raises on these beside a deepspeed_config_file, after the processes have started
_IN_DEEPSPEED_FILE = (
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_stage",
    "offload_optimizer_device",
    "offload_param_device",
    "zero3_save_16bit_model",
)


@dataclass(frozen=True)
class Settings:
    """A configuration as it was read; nothing filled in yet."""

    name: str
    path: Path
    values: dict[str, Any]
    """The YAML file, as accelerate reads it."""
    deepspeed: dict[str, Any] | None = None
    """DeepSpeed's own file, where the configuration names one."""

    @property
    def cpu(self) -> bool:
        return bool(self.values.get("use_cpu"))

    @property
    def sharding(self) -> Sharding:
        """What is divided over the processes."""
        kind = str(self.values["distributed_type"])
        return _TYPES[kind] if kind in _TYPES else _STAGES[self.zero("stage", 0)]

    @property
    def deepspeed_engine(self) -> bool:
        return self.values["distributed_type"] == "DEEPSPEED"

    @property
    def single(self) -> bool:
        """Whether it can only be one process."""
        return self.values["distributed_type"] == "NO"

    def zero(self, key: str, default: Any) -> Any:
        """An entry of DeepSpeed's `zero_optimization`; `default` where it is left out or "auto"."""
        if self.deepspeed is not None:
            value = self.deepspeed.get("zero_optimization", {}).get(key, default)
        else:  # accelerate's own names, which differ for a few
            plugin = self.values.get("deepspeed_config") or {}
            value = plugin.get({"stage": "zero_stage"}.get(key, key), default)
        return default if value == "auto" else value

    def offloads(self, what: str) -> bool:
        """Whether `optimizer` or `param` is kept in the memory of the machine."""
        if self.values["distributed_type"] == "FSDP":
            section = self.values.get("fsdp_config") or {}
            return bool(section.get("fsdp_offload_params", section.get("offload_params", False)))
        plugin = self.values.get("deepspeed_config") or {}
        device = (self.zero(f"offload_{what}", None) or {}).get("device") if self.deepspeed is not None else None
        return (device or plugin.get(f"offload_{what}_device") or "none") != "none"


# --- finding ----------------------------------------------------------------------------------------------


def names() -> list[str]:
    """What `--config` can be called by."""
    return [file.name for file in named("launch", "*.yaml")]


def find_config(name_or_path: str) -> Path:
    """The file behind a path, or behind a name such as ``zero3``.

    A path that exists comes first, then ``./launch/NAME.yaml``, then the shipped ones.

    Raises:
        RecipeError: there is none; the message names the nearest.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    asked = path.name.removesuffix(".yaml")
    if path.parent in (Path(), Path("launch")):  # a wheel has no ./launch, and the same command works there
        for file in named("launch", "*.yaml"):
            if file.name == asked:
                return file.path
    why = "neither a file nor a name below launch/"
    raise RecipeError(f"--config {name_or_path}: no such configuration", why, nearest(asked, names()))


# --- reading ----------------------------------------------------------------------------------------------


def read_config(name_or_path: str) -> Settings:
    """Read a configuration and DeepSpeed's file that it points to.

    Raises:
        RecipeError: there is no such file, or it is not YAML.
        RecipeErrors: keys that accelerate does not know or would silently ignore, or values that contradict each
            other; all together.
    """
    path = find_config(name_or_path)
    values = read_yaml(path)
    errors = _unknown(values)
    kind = values.get("distributed_type")
    if kind == "MULTI_CPU":
        why = "accelerate launches a single process for it, without a word"
        errors.append(RecipeError("distributed_type: MULTI_CPU", why, "write MULTI_GPU, and use_cpu: true"))
    elif kind not in (*_TYPES, "DEEPSPEED"):
        fix = f"use one of {', '.join([*_TYPES, 'DEEPSPEED'])}"
        errors.append(RecipeError(f"distributed_type: {kind!r} is not supported", "", fix))
    if values.get("compute_environment", "LOCAL_MACHINE") != "LOCAL_MACHINE":
        errors.append(RecipeError("compute_environment: only LOCAL_MACHINE is supported"))
    deepspeed = None
    plugin = values.get("deepspeed_config") or {}
    if not errors and kind == "DEEPSPEED":
        try:
            deepspeed = _deepspeed_file(path, plugin)
        except RecipeError as error:
            errors.append(error)
    if deepspeed is not None:
        errors += [
            RecipeError(f"deepspeed_config.{key}: not beside a deepspeed_config_file", "", f"set it in {where}")
            for key in _IN_DEEPSPEED_FILE
            if key in plugin and (where := plugin["deepspeed_config_file"])
        ]
    stage = (deepspeed or {}).get("zero_optimization", {}).get("stage", plugin.get("zero_stage", 0))
    if kind == "DEEPSPEED" and stage not in _STAGES:
        errors.append(RecipeError(f"zero_optimization.stage: {stage!r}", "", "use 0, 1, 2 or 3"))
    if errors:
        raise RecipeErrors(str(path), errors)
    return Settings(path.stem, path, values, deepspeed)


def _unknown(values: Mapping[str, Any]) -> list[MemFactoryError]:
    """Keys that accelerate refuses (at the top) or ignores without a word (inside its sections)."""
    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.commands.launch import launch_command_parser

    errors: list[MemFactoryError] = []
    known = [*ClusterConfig.__dataclass_fields__, "dynamo_backend"]
    options = [action.dest for action in launch_command_parser()._actions]
    for key, value in values.items():
        if key not in known:
            errors.append(RecipeError(f"{key}: unknown key", "", nearest(key, known)))
        elif key in ("fsdp_config", "deepspeed_config") and isinstance(value, dict):
            prefix = "fsdp_" if key == "fsdp_config" else ""
            for inner in value:
                if inner not in options and f"{prefix}{inner}" not in options:
                    near = nearest(inner, [option for option in options if option.startswith(prefix or "")])
                    errors.append(RecipeError(f"{key}.{inner}: unknown key, accelerate would ignore it", "", near))
    return errors


def _deepspeed_file(config: Path, plugin: Mapping[str, Any]) -> dict[str, Any] | None:
    named = plugin.get("deepspeed_config_file")
    if named is None:
        return None
    # beside the configuration first: accelerate itself would look in the working folder
    path = next((p for p in (config.parent / named, Path(named)) if p.is_file()), None)
    if path is None:
        why = f"neither in {config.parent} nor in the working folder"
        raise RecipeError(f"deepspeed_config.deepspeed_config_file: no file {named}", why)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(f"{path}: not valid JSON", str(error)) from error
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: not a mapping")
    return data


# --- against the recipe -----------------------------------------------------------------------------------


def precision(train: Mapping[str, Any]) -> str:
    """Accelerate's word for the recipe's `train.bf16` and `train.fp16`."""
    return "bf16" if train.get("bf16") else "fp16" if train.get("fp16") else "no"


def precision_errors(settings: Settings, train: Mapping[str, Any]) -> list[MemFactoryError]:
    """Where configuration and recipe say different things about 16-bit computation. A configuration that says
    nothing follows the recipe."""
    wanted = precision(train)
    said: list[tuple[str, str]] = []
    if (mixed := settings.values.get("mixed_precision")) is not None:
        mixed = "no" if mixed is False else str(mixed)  # YAML reads a bare `no` as false
        said.append(("mixed_precision", mixed))
    for kind in ("bf16", "fp16"):
        enabled = ((settings.deepspeed or {}).get(kind) or {}).get("enabled", "auto")
        if enabled is True:
            said.append((f"DeepSpeed's {kind}.enabled", kind))
        elif enabled is False and wanted == kind:
            said.append((f"DeepSpeed's {kind}.enabled", "no"))
    errors: list[MemFactoryError] = []
    for where, value in said:
        if value == wanted:
            continue
        if value in ("bf16", "fp16"):
            other = " train.bf16=false" if value == "fp16" and wanted == "bf16" else ""
            fix = f"train.{value}=true{other}, or leave {where} out of {settings.path}: the recipe decides"
        elif value == "no":
            fix = f"train.{wanted}=false, or leave {where} out of {settings.path}: the recipe decides"
        else:
            fix = f"a recipe knows bf16 and fp16 only: leave {where} out of {settings.path}"
        stated = f"train.{wanted}=true" if wanted != "no" else "32-bit (train.bf16 is not set)"
        errors.append(RecipeError(f"{where}: {value}", f"the recipe computes in {stated}", fix))
    if settings.deepspeed_engine and settings.deepspeed is not None and "mixed_precision" in settings.values:
        why = "accelerate refuses it beside a deepspeed_config_file"
        errors.append(RecipeError(f"mixed_precision in {settings.path}", why, "leave it out: train.bf16 decides"))
    return errors


def merged(
    settings: Settings, *, processes: int, nodes: int, port: int, train: Mapping[str, Any], deepspeed: Path
) -> dict[str, Any]:
    """What `accelerate launch --config_file` gets: the configuration with everything filled in.

    Args:
        processes: over all nodes.
        port: of the first process, where the others meet; 0 lets accelerate find a free one (one node only).
        deepspeed: where DeepSpeed's own file will lie.
    """
    values = {"machine_rank": 0, "debug": False} | settings.values
    values |= {"num_processes": processes, "num_machines": nodes, "main_process_port": port}
    if processes == 1 and settings.sharding is Sharding.DDP and not settings.deepspeed_engine:
        values["distributed_type"] = "NO"  # accelerate insists on two for MULTI_GPU
    if settings.deepspeed is not None:
        values["deepspeed_config"] = values["deepspeed_config"] | {"deepspeed_config_file": str(deepspeed)}
    else:
        values["mixed_precision"] = precision(train)
    return values

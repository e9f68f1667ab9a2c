"""Where a run writes: the run folder, room for its checkpoints, the folder of adapters."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from memfactory.doctor.check import Check, Level, of_error
from memfactory.launch.plan import Plan, folder_errors, size_text
from memfactory.recipe import Recipe

_KEPT = 2
"""Our default of `train.save_total_limit`."""


def nearest_folder(path: Path) -> Path:
    """`path`, or the folder above it that there is."""
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return place


def _written(folder: Path) -> str:
    """Why nothing can be written into `folder`; empty where it can."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        return error.strerror or str(error)
    return ""


def folder_checks(recipe: Recipe, plan: Plan | None) -> Iterable[Check]:
    """The run folder, the room it needs, and the folder of adapters where the recipe names one.

    Args:
        plan: for the size of a checkpoint; None where it is not known.
    """
    path = recipe.run_dir
    place = nearest_folder(path)
    why = _written(place)
    if why:
        yield Check("run folder", f"{path}: {why}", "writable", Level.WRONG, "output_dir=... on a disk of yours")
        return
    others = folder_errors(recipe)
    if others:
        yield of_error("run folder", others[0])
    else:
        holds = "goes on" if (path / "recipe.yaml").is_file() else "new"
        yield Check("run folder", f"{path} ({holds})", "writable")
    if plan is not None:
        yield check_room(plan, shutil.disk_usage(place).free)
    named = recipe.rollout.vllm.adapters if recipe.rollout.served else None
    if named is not None:
        wrong = _written(nearest_folder(Path(named)))
        fix = "rollout.vllm.adapters=... a folder that trainer and servers share, and the trainer may write"
        yield (
            Check("adapters", f"{named}: {wrong}", "writable", Level.WRONG, fix)
            if wrong
            else Check("adapters", named, "writable")
        )


def checkpoint_bytes(plan: Plan) -> float | None:
    """Size of one checkpoint: what is trained, and its optimizer states; None where the model's size is not known.

    AdamW keeps two numbers for each weight, in the type of the weights. DeepSpeed: float32 masters and moments (12
    bytes) beside the weights.
    """
    if plan.shape is None:
        return None
    lora, bf16 = plan.recipe.model.lora, bool(plan.recipe.train.get("bf16"))
    trained = plan.shape.parameters if lora is None else plan.shape.adapters(lora)
    stored = 4 if lora is not None or plan.recipe.model.dtype == "float32" else 2
    if plan.settings.deepspeed_engine:
        return trained * (12.0 + (2 if bf16 else 4) * 2)  # the weights once more as safetensors
    return trained * 3.0 * stored


def check_room(plan: Plan, free: int) -> Check:
    """Whether the checkpoints of a run fit on its disk.

    Args:
        free: bytes on it.
    """
    name, one = "disk, run folder", checkpoint_bytes(plan)
    shown = f"{size_text(free)} free"
    if one is None:
        return Check(name, shown)
    kept = int(plan.recipe.train.get("save_total_limit") or _KEPT)
    # the next one is written before the oldest is deleted; weights alone are saved at the end
    need = one * (kept + 1) + one / 3
    wanted = f"{size_text(need)}: {kept + 1} checkpoints of {size_text(one)} and the model"
    if free >= need:
        return Check(name, shown, wanted)
    if free < one:
        return Check(name, shown, wanted, Level.WRONG, "free some, or output_dir=... on another disk")
    fix = "free some, output_dir=... on another disk, or fewer: train.save_total_limit=2"
    return Check(name, shown, wanted, Level.NOTE, fix)

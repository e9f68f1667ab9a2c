"""What a launch leaves behind: the resolved recipe, the configurations, the script. The run is started from them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import yaml

from memfactory.errors import RecipeError, boundary
from memfactory.launch.plan import Plan
from memfactory.launch.slurm import render


@dataclass(frozen=True)
class Files:
    """Paths of what was written."""

    recipe: Path
    accelerate: Path
    deepspeed: Path | None = None
    script: Path | None = None

    @property
    def all(self) -> list[Path]:
        return [path for path in (self.recipe, self.accelerate, self.deepspeed, self.script) if path is not None]


def write(plan: Plan, folder: Path, *, sbatch: dict[str, str | None] | None = None) -> Files:
    """Write the files of a plan.

    The run starts from them, so a job that waits in a queue is not changed by what is edited meanwhile. Several nodes
    may write the same folder at once: each file is whole at every moment, and the same from all of them.

    Args:
        plan: the plan.
        folder: where they go.
        sbatch: further options of a SLURM job; None writes no script.

    Raises:
        RecipeError: the folder cannot be written.
    """
    with boundary(RecipeError, f"{folder} cannot be written", "choose another folder with --output"):
        folder.mkdir(parents=True, exist_ok=True)
        recipe, accelerate = folder / "recipe.yaml", folder / "accelerate.yaml"
        deepspeed = folder / "deepspeed.json" if plan.settings.deepspeed is not None else None
        _write(recipe, yaml.safe_dump(plan.recipe.dump(), sort_keys=False, allow_unicode=True))
        values = plan.accelerate(folder / "deepspeed.json")
        _write(accelerate, yaml.safe_dump(values, sort_keys=False))
        if deepspeed is not None:
            _write(deepspeed, json.dumps(plan.settings.deepspeed, indent=2) + "\n")
        script = None
        if sbatch is not None:
            script = folder / "job.sh"
            text = render(
                name=plan.recipe.name,
                recipe=recipe,
                config=accelerate,
                output=folder,
                trainer_nodes=plan.nodes,
                rollout_nodes=plan.rollout_nodes,
                gpus=0 if plan.settings.cpu else plan.per_node,
                outage=plan.recipe.rollout.vllm.outage,
                options=sbatch,
            )
            _write(script, text)
    return Files(recipe, accelerate, deepspeed, script)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)

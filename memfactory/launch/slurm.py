"""The SLURM script of a plan: trainer nodes and rollout nodes in one job that can be stopped and goes on by itself."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

import jinja2

from memfactory.errors import EngineError, MemFactoryError, RecipeError, RecipeErrors
from memfactory.plugins import shipped
from memfactory.recipe import nearest

TEMPLATE = Path("cluster") / "slurm.sh.j2"
WARNING = 120
"""Seconds before the end of a job's time at which it is told to save."""
ROLLOUT_PORT = 8000
"""Where `memfactory serve-rollouts` listens."""
PATIENCE = 1800
"""Seconds that trainers wait for rollout servers, at least: these may download and compile first."""

# Long options of sbatch that may be set; the others belong to the script itself.
OPTIONS = """account array begin chdir comment cluster-constraint clusters constraint container cores-per-socket
cpus-per-gpu cpus-per-task deadline dependency exclude exclusive export gpu-bind gpu-freq gpus-per-node gres hold
job-name licenses mail-type mail-user mem mem-per-cpu mem-per-gpu network nice nodelist open-mode output error
partition power prefer priority qos reservation switches time time-min tmp""".split()
_OURS = {"nodes": "--nodes and --rollout-nodes", "ntasks": "--nodes", "ntasks-per-node": "--gpus", "signal": "nothing"}


def sbatch_options(given: Sequence[str]) -> dict[str, str | None]:
    """``partition=gpu`` and ``exclusive`` as options of sbatch.

    Raises:
        RecipeErrors: options that sbatch does not know, or that the script sets itself; all together.
    """
    found: dict[str, str | None] = {}
    errors: list[MemFactoryError] = []
    for text in given:
        name, separator, value = text.removeprefix("--").partition("=")
        if name in _OURS:
            errors.append(RecipeError(f"--sbatch {text}", "the script sets it", f"use {_OURS[name]}"))
        elif name not in OPTIONS:
            errors.append(RecipeError(f"--sbatch {text}: unknown option of sbatch", "", nearest(name, OPTIONS)))
        elif re.search(r"[\s#]", value):
            errors.append(RecipeError(f"--sbatch {text}", "an #SBATCH line ends at a space", "leave out the space"))
        else:
            found[name] = value if separator else None
    if errors:
        raise RecipeErrors("command line", errors)
    return found


def template_file() -> Path:
    """The template: yours in ./launch/cluster first, then the shipped one."""
    own = Path.cwd() / "launch" / TEMPLATE
    return own if own.is_file() else shipped("launch") / TEMPLATE


def render(
    *,
    name: str,
    recipe: Path,
    config: Path,
    output: Path,
    trainer_nodes: int,
    rollout_nodes: int = 0,
    gpus: int = 0,
    outage: float = 0,
    options: dict[str, str | None] | None = None,
) -> str:
    """The script.

    Args:
        name: of the job.
        recipe: the resolved recipe, as a path that every node can read from the folder of `sbatch`.
        config: the same of accelerate's configuration.
        output: folder for what the job prints.
        gpus: of each node; 0 asks for none.
        outage: the recipe's `rollout.vllm.outage`, where it is longer than ours.
        options: further options of sbatch, without their dashes; they win over ours.
    """
    ours: dict[str, str | None] = {
        "job-name": name,
        "nodes": str(trainer_nodes + rollout_nodes),
        "ntasks-per-node": "1",
        **({"gpus-per-node": str(gpus)} if gpus else {}),
        "output": str(output / "slurm-%j.out"),
        "open-mode": "append",  # a requeued job goes on in the same file
        "requeue": None,
        "signal": f"B:USR1@{WARNING}",
    }
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    text = template_file().read_text(encoding="utf-8")
    return environment.from_string(text).render(
        title=f"{name}: {trainer_nodes * max(gpus, 1)} training processes",
        trainer_nodes=trainer_nodes,
        rollout_nodes=rollout_nodes,
        options=ours | (options or {}),
        recipe=shlex.quote(str(recipe)),
        config=shlex.quote(str(config)),
        rollout_port=ROLLOUT_PORT,
        patience=f"{max(outage, PATIENCE):g}",
        gpus=gpus,
        warning=WARNING,
    )


def submit(script: Path) -> str:
    """Hand the script to SLURM.

    Returns:
        what sbatch says, with the number of the job.

    Raises:
        EngineError: there is no sbatch here, or it refused.
    """
    try:
        done = subprocess.run(["sbatch", str(script)], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise EngineError(
            "sbatch: no such command", "this machine is no login node of a SLURM cluster", f"there: sbatch {script}"
        ) from error
    if done.returncode:
        raise EngineError(f"sbatch {script}", done.stderr.strip(), "see --sbatch for options such as partition=NAME")
    return done.stdout.strip()

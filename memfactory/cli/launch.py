"""``memfactory launch RECIPE``: the same recipe on several processes, GPUs, nodes. Prints the plan, then starts it."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from memfactory.cli.options import Overrides, RecipeName, Resume, StartOver, check_resume
from memfactory.cli.recipes import find_recipe
from memfactory.cli.versions import check_versions
from memfactory.errors import DataError, MemFactoryError, RecipeErrors, attempt

if TYPE_CHECKING:
    from memfactory.launch.files import Files
    from memfactory.launch.plan import Plan, Request
    from memfactory.train.prepare import Prepared


def launch(
    recipe: RecipeName,
    overrides: Overrides = None,
    config: Annotated[
        str | None,
        typer.Option(
            "--config",
            help="cpu, single_gpu, ddp, fsdp2, fsdp2_offload, zero1, zero2, zero3, zero3_offload, or a file of yours.",
        ),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option("--gpus", min=1, help="GPUs of each node. Absent: all there are.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option("--processes", min=1, help="Processes on this machine; without GPUs on its CPU.")
    ] = None,
    nodes: Annotated[int | None, typer.Option("--nodes", min=1, help="Machines that train.")] = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="Hand the run to SLURM instead of starting it here.")] = False,
    rollout_nodes: Annotated[
        int | None, typer.Option("--rollout-nodes", min=0, help="Further machines that serve rollouts (vLLM, SLURM).")
    ] = None,
    sbatch: Annotated[
        list[str] | None, typer.Option("--sbatch", metavar="OPTION=VALUE", help="For sbatch, e.g. partition=gpu.")
    ] = None,
    node_rank: Annotated[
        int | None, typer.Option("--node-rank", help="Which of the nodes this is, from 0 (without SLURM).")
    ] = None,
    address: Annotated[str | None, typer.Option("--address", help="Host name of node 0 (without SLURM).")] = None,
    port: Annotated[
        int | None, typer.Option("--port", min=0, max=65535, help="Where processes meet; 0 takes a free one.")
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option("--batch", min=1, help="Episodes per optimizer step in all, divided over the processes."),
    ] = None,
    resume: Resume = False,
    start_over: StartOver = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and write its files; start nothing.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder for the files. Absent: launch/ in the run folder.")
    ] = None,
) -> None:
    """Train on several processes: print the plan, write its files, start it with accelerate or SLURM."""
    path = find_recipe(recipe)
    if not dry_run:  # which may plan for an environment that is elsewhere
        check_versions()
    from memfactory.launch.files import write
    from memfactory.launch.plan import Request, folder_errors, show, start_errors
    from memfactory.launch.slurm import sbatch_options, submit
    from memfactory.runs import RunFolder

    console = Console()
    check_resume(resume, start_over)
    request = Request(config, gpus, processes, nodes, rollout_nodes, slurm, port, node_rank, address)
    options = sbatch_options(sbatch or [])
    plan = checked(path, overrides or [], request, batch, console)
    show(plan, console)
    if plan.settings.deepspeed_engine and not dry_run:
        check_versions("deepspeed")
    problems: list[MemFactoryError] = []
    if slurm:
        problems = [] if start_over or dry_run else folder_errors(plan.recipe)
    elif not dry_run:
        problems = start_errors(plan, request, start_over=start_over)
    if problems:
        raise RecipeErrors(f"{recipe} cannot start", problems)
    if start_over and not dry_run and not node_rank:
        # here and not by `train`: the run begins from files in that folder, and a queued job begins many times
        RunFolder(plan.recipe.run_dir).set_aside()

    files = write(plan, output or plan.recipe.run_dir / "launch", sbatch=options if slurm else None)
    console.rule("files")
    for file in files.all:
        console.print(str(file), highlight=False, soft_wrap=True)
    command = ["sbatch", str(files.script)] if files.script else accelerate_command(plan, request, files, resume)
    console.print(f"\n{'would run' if dry_run else 'running'}: {shlex.join(command)}", highlight=False, soft_wrap=True)
    if dry_run:
        console.print("[green]dry run passed[/green]: nothing was started")
    elif files.script:
        console.print(submit(files.script), highlight=False)
    else:
        sys.stdout.flush()
        start(command)


def checked(
    path: Path, overrides: list[str], request: Request, batch: int | None = None, console: Console | None = None
) -> Plan:
    """The plan for a recipe file.

    Args:
        batch: episodes per optimizer step to be kept, or None.
        console: where to say that the data could not be read; the plan is then made without.

    Raises:
        RecipeErrors: recipe, configuration and machine do not go together; no model was loaded.
    """
    # heavy imports wait until a command that needs them is run
    from memfactory.launch.plan import lay_out, make_plan

    errors: list[MemFactoryError] = []
    prepared = attempt(lambda: _prepared(path, overrides, console), errors)
    layout = attempt(lambda: lay_out(request), errors)
    if prepared is None or layout is None:
        raise RecipeErrors(str(path), errors)
    return make_plan(prepared, request, layout, batch)


def _prepared(path: Path, overrides: list[str], console: Console | None) -> Prepared:
    from memfactory.train.prepare import prepare

    if console is None:
        return prepare(path, overrides, splits=())
    try:
        return prepare(path, overrides)
    except DataError as problem:  # another machine may have it
        console.print(f"data not checked: {problem}", style="yellow", markup=False, highlight=False, soft_wrap=True)
        return prepare(path, overrides, splits=())


def accelerate_command(plan: Plan, request: Request, files: Files, resume: bool) -> list[str]:
    """What starts the processes of this machine: accelerate, and nothing between its processes and signals."""
    command = [sys.executable, "-m", "memfactory.launch.start", "--config_file", str(files.accelerate)]
    if plan.nodes > 1:
        command += ["--machine_rank", str(request.node_rank or 0), "--main_process_port", str(plan.port)]
        command += ["--main_process_ip", request.address or "ADDRESS"]
    command += ["--module", "memfactory.cli.main", "train", str(files.recipe)]
    return [*command, "--resume"] if resume else command


def start(command: list[str]) -> None:
    """Become `command`: signals go to it, and its exit code is ours."""
    from memfactory.launch.start import become

    become(command, dict(os.environ))

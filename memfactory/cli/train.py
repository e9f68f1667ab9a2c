"""``memfactory train RECIPE [key=value ...]``: run a recipe, or check it with ``--dry-run``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from memfactory.cli.options import Overrides, RecipeName, Resume, StartOver, check_resume
from memfactory.cli.recipes import find_recipe
from memfactory.cli.versions import check_versions
from memfactory.errors import DataError


def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    resume: Resume = False,
    start_over: StartOver = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check everything and run one step on a tiny stand-in model; trains nothing."),
    ] = False,
) -> None:
    """Train an agent: warm-up if the recipe has one, evaluation, GRPO, evaluation, report."""
    console = Console()
    path = find_recipe(recipe)
    check_versions()
    # heavy imports wait until a command that needs them is run
    from memfactory.train.prepare import prepare

    if dry_run:
        from memfactory.train.dry_run import dry_run as try_out

        problem: DataError | None = None
        try:
            prepared = prepare(path, overrides or [])
        except DataError as error:
            problem = error
            prepared = prepare(path, overrides or [], splits=())
        try_out(prepared, console, problem)
        return
    check_resume(resume, start_over)
    from memfactory.train.run import train as run
    from memfactory.train.signals import exit_code

    summary = run(prepare(path, overrides or []), start_over=start_over, console=console)
    if summary["stopped"] == "interrupted":
        raise typer.Exit(exit_code(summary["signal"]))

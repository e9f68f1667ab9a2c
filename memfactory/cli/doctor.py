"""`memfactory doctor [RECIPE]`: does this machine have what memfactory, or a recipe, needs; and what is to be done."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from memfactory.doctor import run
from memfactory.doctor.check import Check, Level

_STYLES = {Level.OK: "green", Level.NOTE: "yellow", Level.WRONG: "bold red"}


def doctor(
    recipe: Annotated[
        str | None,
        typer.Argument(help="Recipe file or name: its needs are looked at, too. Absent: the machine alone."),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="Entries to change, as in train.")
    ] = None,
    config: Annotated[str | None, typer.Option("--config", help="As in launch: ddp, zero3, ...")] = None,
    gpus: Annotated[int | None, typer.Option("--gpus", min=1, help="As in launch.")] = None,
    processes: Annotated[int | None, typer.Option("--processes", min=1, help="As in launch.")] = None,
) -> None:
    """Check packages and machine, and with a recipe what it needs: found, supported, what to do.

    With a recipe: its packages, its memory by the estimate of `memfactory launch`, folders, ports; and of vLLM servers
    that answer whether they fit, whether an adapter reaches them and whether their log-probs are the trainer's.

    Exit code 0: nothing is wrong. 1: something that training needs is missing or outside its range. 2: the recipe is
    wrong.
    """
    checks = run.machine()
    show(checks)
    if recipe is not None:
        from memfactory.cli.recipes import find_recipe

        path, changes = find_recipe(recipe), overrides or []
        typed = shlex.join([recipe, *changes])
        typer.echo(f"\n{typed}")
        own = list(run.recipe(run.Asked(path, typed, changes, config, gpus, processes)))
        show(own)
        checks = [*checks, *own]
    wrong = [check.name.strip() for check in checks if check.level is Level.WRONG]
    if wrong:
        typer.echo(f"\nTo mend: {', '.join(wrong)}.", err=True)
        raise typer.Exit(1)


def show(checks: list[Check]) -> None:
    """Print a table."""
    table = Table("", "", "found", "supported", "fix", box=None, header_style="bold", pad_edge=False)
    for column in (2, 4):  # paths, and commands to copy: never cut short
        table.columns[column].overflow = "fold"
    for check in checks:
        level = Text(check.level.value, style=_STYLES[check.level])
        table.add_row(level, check.name, check.found, check.supported, check.fix)
    Console().print(table, markup=False)  # 'memfactory[train]' is no markup

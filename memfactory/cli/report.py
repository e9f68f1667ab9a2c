"""``memfactory report RUN ...``: write the HTML report of a run or an evaluation, or of several beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memfactory.evaluate.report import write_report


def report(
    run: Annotated[list[Path], typer.Argument(help="Run or evaluation folders, e.g. runs/quickstart-seed0.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write; one folder: report.html in it, several: here."),
    ] = None,
) -> None:
    """Write one HTML file to open in a browser: numbers, curves and episodes of a run, or of several compared."""
    typer.echo(write_report(run, output))

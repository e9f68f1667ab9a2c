"""``memfactory report RUN``: write the HTML report of a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memfactory.evaluate.report import write_report


def report(run: Annotated[Path, typer.Argument(help="Run folder, e.g. runs/quickstart-seed0.")]) -> None:
    """Write report.html into a run folder: numbers, curves and episodes in one file to open in a browser."""
    typer.echo(write_report(run))

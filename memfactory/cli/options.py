"""Arguments and options that several commands share, so that they read and mean the same everywhere."""

from __future__ import annotations

from typing import Annotated

import typer

from memfactory.errors import RecipeError

RecipeName = Annotated[str, typer.Argument(help="Recipe file, or a name such as memagent/quickstart.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value ...]", help="Entries to change, e.g. train.max_steps=10.")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the newest checkpoint. The same command without it does so too.")
]
StartOver = Annotated[
    bool, typer.Option("--start-over", help="Begin anew; a run that lies in the folder is set aside as NAME.1.")
]


def check_resume(resume: bool, start_over: bool) -> None:
    """Refuse the two together.

    Raises:
        RecipeError: both are given.
    """
    if resume and start_over:
        raise RecipeError("--resume and --start-over", "one goes on with a run, the other begins anew", "give one")

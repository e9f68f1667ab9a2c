"""The `memfactory` command.

A command's module is imported when the command is run, not before: `memfactory --help` answers at once and works
without torch, and a broken optional package breaks only the command that needs it.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from memfactory import __version__
from memfactory.errors import DataError, MemFactoryError, RecipeError

COMMANDS = {
    "train": ("memfactory.cli.train:train", "Train an agent with a recipe."),
    "launch": ("memfactory.cli.launch:launch", "Train on several processes, GPUs or nodes."),
    "eval": ("memfactory.cli.eval:evaluate", "Measure a checkpoint with the agent of its recipe."),
    "chat": ("memfactory.cli.chat:chat", "Talk to a trained agent in the terminal."),
    "serve": ("memfactory.cli.serve:serve", "Offer a trained agent as an OpenAI-compatible server."),
    "serve-rollouts": (
        "memfactory.cli.serve_rollouts:serve_rollouts",
        "Start the vLLM server a run samples from.",
    ),
    "recipes": ("memfactory.cli.recipes:app", "List, show and copy recipes."),
    "rewards": ("memfactory.cli.rewards:app", "Find, write, test and compare reward functions."),
    "doctor": ("memfactory.cli.doctor:doctor", "Check this machine, or a recipe on it: found, supported, what to do."),
    "report": ("memfactory.cli.report:report", "Write the HTML report of runs and evaluations, compared."),
    "push": ("memfactory.cli.push:push", "Make a folder for the Hugging Face Hub of a trained model, with its card."),
}
"""Name -> (``module:object``, one line for the list). The object is a function or a Typer app."""


def load(name: str) -> Any:
    """The command `name`, built from its module."""
    module, _, attribute = COMMANDS[name][0].partition(":")
    target = getattr(importlib.import_module(module), attribute)
    if not isinstance(target, typer.Typer):
        function, target = target, typer.Typer(add_completion=False)
        target.command(name)(function)
    command = typer.main.get_command(target)
    command.name = name
    return command


class LazyGroup(TyperGroup):
    """Lists commands by the table above and imports the one that is run."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return TyperCommand(cmd_name, help=COMMANDS[cmd_name][1]) if cmd_name in COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return name, load(name) if name in COMMANDS else command, rest


app = typer.Typer(
    name="memfactory",
    cls=LazyGroup,
    help="Train language models to manage memory.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="MEMFACTORY_DEBUG", help="Show the traceback of every error.")
    ] = False,
) -> None:
    if debug:
        os.environ["MEMFACTORY_DEBUG"] = "1"  # main() looks there, and so do processes started from here


def exit_code(error: MemFactoryError) -> int:
    """2 for what the user can mend in the recipe or the data, 1 for everything else."""
    return 2 if isinstance(error, RecipeError | DataError) else 1


# Waiting OpenMP threads that spin take the cores from the threads that work: on a busy two-core machine a
# training step was measured more than ten times slower. Read once, when torch is imported.
_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "KMP_BLOCKTIME": "0",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}


def main() -> None:
    """Entry point: an error raised on purpose ends the process with its message and exit code, no traceback."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        app()
    except MemFactoryError as error:
        if os.environ.get("MEMFACTORY_DEBUG", "0") not in ("", "0"):
            traceback.print_exception(error)
        from rich.console import Console

        # no wrapping and no markup: paths and keys must survive being copied
        Console(stderr=True).print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(exit_code(error))
    except KeyboardInterrupt:  # outside of a command: Typer turns those inside into the same exit code
        sys.exit(130)


if __name__ == "__main__":
    main()

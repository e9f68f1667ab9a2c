"""`memfactory rewards`: find, write, test and compare reward functions. None of it loads a model."""

from __future__ import annotations

import typer

from memfactory.cli.rewards.catalogue import list_rewards, new, show
from memfactory.cli.rewards.judging import calibrate
from memfactory.cli.rewards.offline import lint, rescore
from memfactory.cli.rewards.trial import try_reward

app = typer.Typer(
    help="Find, write, test and compare reward functions. None of it loads a model.",
    add_completion=False,
    no_args_is_help=True,
)
app.command("list")(list_rewards)
app.command()(show)
app.command()(new)
app.command("test")(try_reward)
app.command()(lint)
app.command()(rescore)
app.command()(calibrate)

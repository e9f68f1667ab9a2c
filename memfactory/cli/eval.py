"""``memfactory eval RECIPE``: measure a base model and checkpoints on suites, with the agent of the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from memfactory.cli.options import Overrides, RecipeName
from memfactory.cli.recipes import find_recipe
from memfactory.cli.versions import check_versions


def _list_suites(wanted: bool) -> None:
    if not wanted:
        return
    from memfactory.evaluate.suites import suites

    table = Table("suite", "what", "metrics", "size or file")
    for name, suite in suites().items():
        size = f"@{suite.size.default} {suite.size.unit}" if suite.size else ""
        table.add_row(name, suite.summary, ", ".join(suite.metrics), " ".join([size, "=FILE" if suite.file else ""]))
    Console().print(table)
    raise typer.Exit


def evaluate(
    recipe: RecipeName,
    overrides: Overrides = None,
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option(
            "--checkpoint", help="A run folder, its model/ or a checkpoint-N; several may be given. Absent: the base."
        ),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            "--suite", help="NAME, NAME@SIZE or NAME=FILE; several may be given. Absent: the recipe's tasks."
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option("--samples", min=1, help="Sampled episodes for each task.")] = None,
    tasks: Annotated[int | None, typer.Option("--tasks", min=1, help="At most so many tasks of each suite.")] = None,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Also full context, no memory, BM25 and the evidence itself.")
    ] = False,
    baseline: Annotated[
        list[str] | None,
        typer.Option("--baseline", help="One of them: full_context, no_memory, bm25, oracle; several may be given."),
    ] = None,
    judge: Annotated[
        bool, typer.Option("--judge", help="Also ask the recipe's judge, and show where it disagrees.")
    ] = False,
    base: Annotated[
        bool, typer.Option("--base/--no-base", help="Also evaluate what the checkpoints began as.")
    ] = True,
    endpoint: Annotated[
        str | None, typer.Option("--endpoint", help="Evaluate an OpenAI-compatible API instead, e.g. http://host/v1.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="The model to ask of --endpoint.")] = None,
    context: Annotated[
        int | None, typer.Option("--context", min=1, help="Tokens that --endpoint takes, for --baselines.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Run every episode again, and take none from the evaluation folder.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", help="Evaluation folder. Absent: evals/NAME of the recipe.")
    ] = None,
    list_suites: Annotated[
        bool, typer.Option("--list-suites", callback=_list_suites, is_eager=True, help="What --suite may name.")
    ] = False,
) -> None:
    """Measure checkpoints on held-out tasks and suites, sampled and greedy, with the same agent as in training.

    What was run before with the same weights and settings is taken from the evaluation folder: the same command again
    goes on after a stop, and another checkpoint or suite runs only what is new.
    """
    path = find_recipe(recipe)
    if endpoint is None:  # an endpoint has a model of its own
        check_versions()
    from memfactory.agents.baselines import chosen
    from memfactory.evaluate.folder import EvalFolder
    from memfactory.evaluate.job import Asked, run_evaluation
    from memfactory.evaluate.table import terminal_table
    from memfactory.train.callbacks import progress_bar

    console = Console()
    asked = Asked(
        recipe=path,
        overrides=overrides or [],
        checkpoints=checkpoint or [],
        suites=suite or [],
        samples=samples,
        tasks=tasks,
        baselines=chosen(baseline or [], every=baselines),
        judge=judge,
        base=base,
        endpoint=endpoint,
        model=model,
        context=context,
        fresh=fresh,
    )
    with progress_bar(console) as progress:
        done = run_evaluation(asked, output, progress)
    console.print(terminal_table(done.rows, done.title))
    for note in [*done.notes, *(f"could not be measured: {example}" for example in done.examples)]:
        console.print(note, style="yellow", markup=False, highlight=False)
    folder = EvalFolder(done.folder)
    console.print(f"{done.ran} episodes run, {done.cached} taken from {folder.episodes_file}", highlight=False)
    console.print(f"written: {folder.path}/table.md, table.csv, evaluation.json, episodes.jsonl", highlight=False)
    if done.failure is not None:
        raise done.failure

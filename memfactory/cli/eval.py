"""``memfactory eval RECIPE --checkpoint PATH``: measure a checkpoint with the agent of its recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from memfactory.cli.options import Overrides, RecipeName
from memfactory.cli.recipes import find_recipe


def evaluate(
    recipe: RecipeName,
    overrides: Overrides = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", help="A run's model/ or checkpoints/checkpoint-N; absent: the untrained model."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", help="Also write the numbers to this JSON file.")] = None,
) -> None:
    """Evaluate on the recipe's held-out tasks, sampled and greedy, with the same agent as in training."""
    from memfactory.environments.base import Split
    from memfactory.evaluate.run import evaluate_agent
    from memfactory.train.callbacks import progress_bar
    from memfactory.train.prepare import check_documents, prepare
    from memfactory.train.start import load_policy

    console = Console()
    prepared = prepare(find_recipe(recipe), overrides or [], splits=(Split.TEST,))
    policy = load_policy(prepared, checkpoint)
    check_documents(prepared.agent, prepared.eval_tasks, policy)
    with progress_bar(console) as progress:
        result = evaluate_agent(prepared.agent, prepared.eval_tasks, policy, prepared.eval_options, progress)
    table = Table("measure", "value", title=f"{prepared.recipe.name}: {checkpoint or 'untrained model'}")
    for name, value in result.metrics.items():
        table.add_row(name, f"{value:.4g}")
    console.print(table)
    for example in result.faults.examples:
        console.print(f"could not be measured: {example}", style="yellow", markup=False, highlight=False)
    prepared.rewards.close()
    policy.close()
    if output is not None:
        record = {"recipe": prepared.recipe.name, "checkpoint": str(checkpoint) if checkpoint else None}
        output.write_text(json.dumps(record | {"metrics": result.metrics}, indent=2) + "\n", encoding="utf-8")
        console.print(f"written: {output}")

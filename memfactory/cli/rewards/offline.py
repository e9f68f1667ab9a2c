"""`rewards lint` and `rewards rescore`: what a recipe's rewards would do, on episodes that are there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from memfactory.cli.options import Overrides, RecipeName
from memfactory.cli.recipes import find_recipe
from memfactory.cli.rewards.samples import load_samples

if TYPE_CHECKING:
    from memfactory.recipe import Recipe
    from memfactory.reward.rescore import Change, Rescored


def lint(
    recipe: RecipeName,
    overrides: Overrides = None,
    episode: Annotated[
        Path | None,
        typer.Option("--episode", help="File of episodes, or a run folder. Absent: the shipped sample."),
    ] = None,
) -> None:
    """Say what each reward of a recipe is, and what of it may be farmed, traded or silent."""
    from memfactory.recipe import load_recipe
    from memfactory.reward.lint import print_findings
    from memfactory.reward.system import RewardSystem

    checked = load_recipe(find_recipe(recipe), overrides or [])
    system = RewardSystem.from_recipe(checked)
    samples = load_samples(episode)
    console = Console()
    console.print(f"on {len(samples.episodes)} episodes: {samples.source}\n", markup=False, highlight=False)
    print_findings(console, system, samples.episodes, scale_rewards=scale_rewards(checked))


def scale_rewards(recipe: Recipe) -> str:
    """TRL's option of the recipe; `true` and `false` are its older spellings."""
    value = recipe.train.get("scale_rewards", "group")
    return ("group" if value else "none") if isinstance(value, bool) else str(value)


def rescore(
    run: Annotated[Path, typer.Argument(help="Run folder, e.g. runs/quickstart-seed0.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="Entries to change in the recipe.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", help="Recipe, or a file with `rewards:` alone. Absent: the run's own."),
    ] = None,
    split: Annotated[str, typer.Option("--split", help="Which episodes: train, eval, eval_greedy.")] = "train",
    name: Annotated[
        str | None, typer.Option("--name", help="Folder below RUN/rescored. Absent: name of the recipe file.")
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option("--statistics", help="Also write each reward's range as `aggregate: min_max_mean` to this file."),
    ] = None,
) -> None:
    """Score the stored episodes of a run with other rewards or weights, and compare. No model is loaded.

    Exit code 1 when a reward failed on an episode.
    """
    from memfactory.reward import rescore as offline
    from memfactory.reward.system import RewardSystem
    from memfactory.runs import RunFolder

    folder = RunFolder(run)
    path = find_recipe(recipe) if recipe is not None else None
    checked = offline.recipe_for(folder, path, overrides or [])
    result = offline.rescore(folder, RewardSystem.from_recipe(checked), split, scale_rewards(checked))
    label = name or (path.stem if path is not None else "changed" if overrides else "own")
    written = offline.write(folder, label, checked, result)
    console = Console()
    _print(console, result, split)
    if statistics is not None:
        offline.write_statistics(statistics, result.bounds)
        console.print(f"written: {statistics}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"written: {written}", markup=False, highlight=False, soft_wrap=True)
    if result.faults.count:
        raise typer.Exit(1)


def _print(console: Console, result: Rescored, split: str) -> None:
    def say(text: str, style: str = "") -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    say(f"{len(result.episodes)} episodes of split {split}\n")
    if not any(turn.completion_ids for episode in result.episodes for turn in episode.turns):
        say("note: they were stored without tokens, so rewards that count tokens count words or nothing\n")
    table = Table("mean of", "stored", "rescored", box=None, pad_edge=False, header_style="bold")
    for name, change in [*result.dimensions.items(), ("reward", result.reward)]:
        table.add_row(name, *_cells(change), style="bold" if name == "reward" else "")
    console.print(table)
    say("")
    if result.rank_correlation is not None:
        say(f"rank correlation of the rewards (Spearman): {result.rank_correlation:.3f}")
    if result.pairs_turned is not None:
        say(f"pairs inside a group whose order turned round: {result.pairs_turned:.1%}")
    if result.groups:
        say(f"groups whose best episode is another: {result.best_changed} of {result.groups}")
        say(f"episodes whose advantage changed its sign: {result.sign_flips} of {result.compared}")
        before, after = _cells(result.dead, ".1%")
        say(f"groups that teach nothing: {before} stored, {after} rescored")
    if result.incomplete:
        shown = "; ".join(result.incomplete[:3]) + ("; ..." if len(result.incomplete) > 3 else "")
        say(f"\n{len(result.incomplete)} incomplete groups left out of what compares groups: {shown}", "yellow")
        say("  fix: rollout.log_episodes in the run's recipe says how many episodes a step stores", "yellow")
    for fault, count in result.faults.count.items():
        say(f"\nfaults/{fault}: {count}", "red")
    for example in result.faults.examples:
        say(example, "red")


def _cells(change: Change, form: str = ".4f") -> tuple[str, str]:
    return tuple("-" if value is None else format(value, form) for value in (change.before, change.after))  # type: ignore[return-value]

"""`rewards list`, `show` and `new`: what there is, what one does, and a file to start from."""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from memfactory.cli.rewards.describe import in_recipe, short_path, spoken_range, spoken_scope
from memfactory.errors import RecipeError
from memfactory.plugins import load_file, shipped
from memfactory.reward.catalogue import folders, load_dimension
from memfactory.reward.dimension import RewardDimension, Scope
from memfactory.reward.trl import from_trl, is_trl_function


@dataclass
class RewardFile:
    """One file of a `rewards/` folder."""

    name: str
    """As recipes write it, e.g. ``answer`` or ``team.answer``."""
    path: Path
    owner: str
    """`yours` or `shipped`."""
    dimensions: dict[str, RewardDimension] = field(default_factory=dict)
    error: str = ""
    """Why it cannot be imported."""


def reward_files() -> Iterator[RewardFile]:
    """Every file that may hold rewards, yours first; a shipped one of the same name follows."""
    for root in dict.fromkeys(folders()):
        owner = "shipped" if root.resolve() == shipped("rewards").resolve() else "yours"
        for path in sorted(root.rglob("*.py")) if root.is_dir() else []:
            if path.name.startswith("_"):
                continue
            own = RewardFile(".".join(path.relative_to(root).with_suffix("").parts), path, owner)
            try:
                own.dimensions = dict(_rewards_of(path))
            except RecipeError as error:
                own.error = error.why or error.what
            yield own


def _rewards_of(path: Path) -> Iterator[tuple[str, RewardDimension]]:
    """Decorated functions, and TRL's, which need no decorator."""
    module = load_file(path)
    for key, value in vars(module).items():
        if key.startswith("_"):
            continue
        if isinstance(value, RewardDimension):
            yield key, value
        elif inspect.isfunction(value) and value.__module__ == module.__name__ and is_trl_function(value):
            yield key, from_trl(value, key)


def list_rewards() -> None:
    """List the rewards there are: yours in ./rewards and the shipped ones."""
    console = Console()

    def say(text: str, style: str = "") -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    files = list(reward_files())
    mine = {file.name: file for file in files if file.owner == "yours"}
    shown = [file for file in files if file.owner == "yours" or file.name not in mine]
    hidden = {file.name: file for file in files if file not in shown}
    rows = [(f"{file.name}.{key}", own) for file in shown for key, own in file.dimensions.items()]
    width = max((len(name) for name, _ in rows), default=0)
    for file in shown:
        # where the package lies says nothing here; `show` gives the place
        say(f"{file.owner}: {short_path(file.path) if file.owner == 'yours' else file.path.name}", "bold")
        if file.error:
            say(f"  cannot be imported: {file.error}", "red")
        elif not file.dimensions:
            say("  no rewards in it (decorate a function with @reward)", "dim")
        if file.name in hidden:
            lost = sorted(set(hidden[file.name].dimensions) - set(file.dimensions))
            note = f"  hides the shipped file '{file.name}'" + (f", so there is no {', '.join(lost)}" if lost else "")
            say(note, "yellow")
        for key, own in file.dimensions.items():
            facts = f"{spoken_scope(own)}, {own.role}, {spoken_range(own)}"
            say(f"  {file.name + '.' + key:<{width}}  {facts}")
            if first := _first_sentence(own):
                console.print(Padding(Text(first, style="dim"), (0, 0, 0, 6)))
    if not mine:
        say("\nnone of your own in ./rewards yet: `memfactory rewards new my.polite` writes one")
    if rows:
        say("\nmore about one: memfactory rewards show NAME; try it: memfactory rewards test NAME")


def _first_sentence(dimension: RewardDimension) -> str:
    """The first sentence of its docstring, which may go over several lines."""
    paragraph = " ".join(dimension.doc.partition("\n\n")[0].split())
    sentence, stop, _ = paragraph.partition(". ")
    return sentence + stop.strip()


def show(name: Annotated[str, typer.Argument(help="Name as in a recipe, e.g. answer.token_f1.")]) -> None:
    """Print what a reward measures, its options and its line in a recipe."""
    dimension = load_dimension(name)
    console = Console()
    console.print(name, style="bold", markup=False, highlight=False)
    facts = {
        "place": short_path(dimension.place),
        "scope": spoken_scope(dimension),
        "role": str(dimension.role),
        "range": spoken_range(dimension),
        "missing": str(dimension.missing) if str(dimension.role) != "gate" else "a gate without a value fails",
        "deadline": "none" if dimension.deadline is None else f"{dimension.deadline:g} s per call",
    }
    if dimension.noise:
        facts["noise"] = f"differences below {dimension.noise:g} mean nothing"
    if dimension.batched or dimension.scope is Scope.GROUP:
        facts["called"] = "with a list of episodes" + (" of one task" if dimension.scope is Scope.GROUP else "")
    if dimension.wants:
        facts["asks for"] = ", ".join(dimension.wants)
    width = max(len(key) for key in facts)
    for key, value in facts.items():
        console.print(f"  {key:<{width}}  {value}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"\n{dimension.doc or '(it has no docstring)'}", markup=False, highlight=False)
    if dimension.options:
        console.print("\noptions", style="bold")
        for key, parameter in dimension.options.items():
            console.print(f"  {_option(key, parameter)}", markup=False, highlight=False)
    console.print("\nin a recipe", style="bold")
    console.print(in_recipe(name, dimension, options=True), markup=False, highlight=False, soft_wrap=True)


def _option(key: str, parameter: inspect.Parameter) -> str:
    text = key
    if parameter.annotation is not parameter.empty:
        text += f": {inspect.formatannotation(parameter.annotation)}".replace("'", "")
    return f"{text} = {parameter.default!r}" if parameter.default is not parameter.empty else f"{text} (must be given)"


_TEMPLATES = {
    "episode": '''from memfactory import Episode, reward


@reward
def {name}(episode: Episode, *, at_least: int = 1) -> float:
    """Share of the answer's words that stand in the final memory; 0 where there is no answer."""
    answer = episode.answer
    words = answer.text.split() if answer and answer.text else []
    known = [word for word in words if word in episode.memory.split()]
    return len(known) / max(len(words), at_least)
''',
    "turn": '''from memfactory import Episode, Turn, reward


@reward(scope="turn")
def {name}(episode: Episode, turn: Turn, *, words: int = 4) -> float:
    """1 for a turn of at most `words` words, less for a longer one: words / its length."""
    return min(1.0, words / max(len(turn.text.split()), 1))
''',
    "module": '''from memfactory import Episode, Turn, reward


@reward(module="write")
def {name}(episode: Episode, turn: Turn) -> float:
    """Share of the words of the old memory that the turn kept; 1 where there was none."""
    before = set(turn.memory_before.split())
    return len(before & set(turn.memory_after.split())) / len(before) if before else 1.0
''',
    "group": '''from memfactory import Episode, reward


@reward(scope="group")
def {name}(episodes: list[Episode]) -> list[float]:
    """Share of the other episodes of the task that gave another answer: 1 for a unique one."""
    answers = [episode.answer.text if episode.answer else None for episode in episodes]
    others = max(len(answers) - 1, 1)
    return [sum(other != answer for other in answers) / others for answer in answers]
''',
}


def new(
    name: Annotated[str, typer.Argument(help="file.function, e.g. my.polite for rewards/my.py.")],
    scope: Annotated[
        Scope, typer.Option("--scope", help="What one score speaks about, and so what the function gets.")
    ] = Scope.EPISODE,
) -> None:
    """Write a reward that works into ./rewards, to change it there."""
    parts = name.split(".")
    if len(parts) == 1:
        parts = [name, name]
    for part in parts:
        if not part.isidentifier() or keyword.iskeyword(part) or part.startswith("_"):
            raise RecipeError(f"'{name}'", f"'{part}' is no Python name", "letters, digits and _, e.g. my.polite")
    *file, function = parts
    path = Path("rewards", *file).with_suffix(".py")
    full = ".".join(parts)
    if path.exists():
        there = "add the function to it, or give another file name"
        raise RecipeError(f"{path}: not written", "there is such a file already", there)
    ours = shipped("rewards").joinpath(*file).with_suffix(".py")
    if ours.exists():
        why = f"it would hide the shipped rewards of '{'.'.join(file)}'"
        raise RecipeError(f"{path}: not written", why, f"give another file name, e.g. my_{file[-1]}.{function}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_TEMPLATES[scope].format(name=function), encoding="utf-8")
    print(f"written: {path}\n")
    print(f"try it:   memfactory rewards test {full}")
    print("use it, in a recipe:\n")
    print(in_recipe(full, load_dimension(full)))

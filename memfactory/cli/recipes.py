"""`memfactory recipes`: list, show and copy recipes; and the search for a recipe by name."""

from __future__ import annotations

import difflib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from memfactory.errors import RecipeError
from memfactory.named_files import named, roots

app = typer.Typer(help="List, show and copy recipes.", add_completion=False, invoke_without_command=True)


@dataclass(frozen=True, slots=True)
class Listed:
    """One line of the list."""

    name: str
    """Path below `recipes/` without its ending, e.g. ``memagent/quickstart``."""
    path: Path
    owner: str
    """`yours` (the working folder's ``recipes/``) or `shipped`."""
    description: str
    model: str
    environment: str


def find_recipe(name_or_path: str | Path) -> Path:
    """The file behind a path, or behind a name such as ``memagent/quickstart``.

    A path that exists comes first, then ``./recipes/NAME.yaml``, then the shipped recipes.

    Raises:
        RecipeError: there is none; the message names the nearest.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    for root in roots("recipes").values():
        for candidate in (root / path, root / f"{path}.yaml"):
            if candidate.is_file():
                return candidate
    names = [file.name for file in named("recipes", "**/*.yaml")]
    asked = path.as_posix().removeprefix("recipes/").removesuffix(".yaml")
    near = difflib.get_close_matches(asked, names, n=3, cutoff=0.4)
    # `quickstart` alone is far from `memagent/quickstart` by letters, near by meaning
    near += [name for name in names if Path(asked).name in name.split("/") and name not in near]
    fix = f"did you mean {' or '.join(near)}?" if near else f"recipes: {', '.join(names) or 'none found'}"
    raise RecipeError(f"{name_or_path}: no such recipe", "neither a file nor a name below recipes/", fix)


def describe(path: Path) -> tuple[str, str, str]:
    """Description (the first comment line), model and environment of a recipe.

    A file that is no recipe is described as such: one broken file must not hide the others.
    """
    from memfactory.recipe import read_yaml

    try:
        data = read_yaml(path)
    except RecipeError as error:
        return f"not readable: {error.why or error.what}", "", ""
    first = next((line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()), "")
    model, environment = data.get("model"), data.get("environment")
    name = ""
    if isinstance(model, dict):
        name = "tiny" if "tiny" in model else str(model.get("name", ""))
    return (
        first.lstrip("# ").strip() if first.startswith("#") else "",
        name,
        str(environment.get("name", "")) if isinstance(environment, dict) else "",
    )


def listed() -> list[Listed]:
    """Every recipe that a name can mean."""
    return [Listed(file.name, file.path, file.owner, *describe(file.path)) for file in named("recipes", "**/*.yaml")]


@app.callback()
def recipes(context: typer.Context) -> None:
    """List the recipes: yours in ./recipes and the shipped ones."""
    if context.invoked_subcommand is not None:
        return
    table = Table("recipe", "description", "model", "environment", "", box=None, header_style="bold", pad_edge=False)
    for column in (0, 3, 4):  # what is typed next must not be cut
        table.columns[column].no_wrap = True
    rows = listed()
    for row in rows:
        table.add_row(row.name, row.description, row.model, row.environment, row.owner)
    console = Console()
    console.print(table if rows else "No recipes found.", markup=False)
    if rows:
        console.print(f"\nRun one: memfactory train {rows[0].name}", highlight=False)


@app.command()
def show(name: Annotated[str, typer.Argument(help="Name or path of a recipe.")]) -> None:
    """Print a recipe as it is written."""
    print(find_recipe(name).read_text(encoding="utf-8"), end="")


@app.command()
def copy(
    name: Annotated[str, typer.Argument(help="Name or path of a recipe.")],
    dest: Annotated[
        Path | None, typer.Argument(help="File (*.yaml) or folder. Absent: the same name below ./recipes.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")] = False,
) -> None:
    """Copy a recipe into the working folder, to change it there."""
    source = find_recipe(name)
    root = next((root for root in roots("recipes").values() if source.is_relative_to(root)), source.parent)
    if dest is None:
        target = Path("recipes") / source.relative_to(root)
    else:
        target = dest if dest.suffix in (".yaml", ".yml") else dest / source.name
    if target.exists() and target.samefile(source):
        raise RecipeError(f"{target}: not copied", "it is that recipe itself", "give a DEST")
    if target.exists() and not force:
        raise RecipeError(f"{target}: not written", "there is such a file already", "give another DEST, or --force")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    print(target)

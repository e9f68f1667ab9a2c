"""`memfactory recipes`, finding a recipe by name, and how the command line ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from memfactory import __version__
from memfactory.cli import main, recipes
from memfactory.cli.main import app
from memfactory.errors import DataError, EngineError, RecipeError, RecipeErrors
from memfactory.plugins import shipped
from memfactory.recipe import load_recipe

RECIPE = """# Learns to keep notes on [the] laptop.
# Second line.
name: NAME
model: {tiny: {}}
environment: {name: fact_words}
rewards: [{name: answer.exact_match}]
"""


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A working folder (the current one) and a folder of shipped recipes with two in it."""
    work, ours = tmp_path / "work", tmp_path / "package" / "recipes"
    work.mkdir()
    for name in ("memagent/quickstart", "memory_r1/base"):
        (ours / name).parent.mkdir(parents=True)
        (ours / f"{name}.yaml").write_text(RECIPE.replace("NAME", name))
    monkeypatch.chdir(work)
    monkeypatch.setattr("memfactory.plugins.shipped", lambda folder: tmp_path / "package" / folder)
    return work, ours


def run(*arguments: str) -> str:
    """Output of the command; an error raised on purpose comes through as itself."""
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "160"}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def add_own(work: Path, name: str, text: str = RECIPE) -> Path:
    path = work / "recipes" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_every_shipped_recipe_can_be_listed_and_read() -> None:
    files = list(shipped("recipes").rglob("*.yaml"))
    assert files
    for path in files:
        description, model, environment = recipes.describe(path)
        assert description, f"{path}: the first line says in a comment what the recipe is"
        assert model, path
        assert environment, path
        assert load_recipe(path).name


def test_list_names_description_model_environment_and_owner(folders: tuple[Path, Path]) -> None:
    add_own(folders[0], "mine")
    lines = {line.split()[0]: line.split("  ") for line in run("recipes").splitlines() if line.strip()}
    for name, owner in {"mine": "yours", "memagent/quickstart": "shipped", "memory_r1/base": "shipped"}.items():
        cells = [cell.strip() for cell in lines[name] if cell.strip()]
        assert cells == [name, "Learns to keep notes on [the] laptop.", "tiny", "fact_words", owner]


def test_own_recipe_hides_the_shipped_one_of_its_name(folders: tuple[Path, Path]) -> None:
    own = add_own(folders[0], "memagent/quickstart")
    assert [(row.name, row.owner) for row in recipes.listed()] == [
        ("memagent/quickstart", "yours"),
        ("memory_r1/base", "shipped"),
    ]
    assert recipes.find_recipe("memagent/quickstart") == own


def test_a_broken_recipe_does_not_hide_the_others(folders: tuple[Path, Path]) -> None:
    add_own(folders[0], "broken", "a: [1,\nb: 2\n")
    add_own(folders[0], "odd", "model: 3\nenvironment: 4\n")
    rows = {row.name: row for row in recipes.listed()}
    assert rows["broken"].description.startswith("not readable")
    assert (rows["odd"].description, rows["odd"].model, rows["odd"].environment) == ("", "", "")
    assert "memory_r1/base" in run("recipes")


def test_a_file_comes_first_then_yours_then_shipped(folders: tuple[Path, Path]) -> None:
    work, ours = folders
    for spelling in ("memagent/quickstart", "memagent/quickstart.yaml"):
        assert recipes.find_recipe(spelling) == ours / "memagent/quickstart.yaml"
    own = add_own(work, "memagent/quickstart")
    assert recipes.find_recipe("memagent/quickstart") == own
    (work / "memagent").mkdir()
    (work / "memagent/quickstart").write_text(RECIPE)
    assert recipes.find_recipe("memagent/quickstart") == Path("memagent/quickstart")
    assert recipes.find_recipe("recipes/memagent/quickstart.yaml") == Path("recipes/memagent/quickstart.yaml")


@pytest.mark.parametrize("asked", ["memagent/quikstart", "quickstart", "recipes/memagent/quickstrt.yaml"])
def test_an_unknown_name_gets_the_nearest(folders: tuple[Path, Path], asked: str) -> None:
    with pytest.raises(RecipeError, match="did you mean memagent/quickstart"):
        recipes.find_recipe(asked)


def test_an_unknown_name_without_a_neighbour_gets_all(folders: tuple[Path, Path]) -> None:
    with pytest.raises(RecipeError, match="memagent/quickstart, memory_r1/base"):
        recipes.find_recipe("zzz")


def test_show_prints_the_file_as_it_is(folders: tuple[Path, Path]) -> None:
    assert run("recipes", "show", "memory_r1/base") == (folders[1] / "memory_r1/base.yaml").read_text()


def test_copy_goes_below_recipes_and_overwrites_only_by_force(folders: tuple[Path, Path]) -> None:
    work, ours = folders
    assert run("recipes", "copy", "memagent/quickstart") == "recipes/memagent/quickstart.yaml\n"
    copied = work / "recipes/memagent/quickstart.yaml"
    assert copied.read_text() == (ours / "memagent/quickstart.yaml").read_text()
    copied.write_text("mine")
    source = str(ours / "memagent/quickstart.yaml")
    with pytest.raises(RecipeError, match="--force"):
        run("recipes", "copy", source)
    assert copied.read_text() == "mine"
    run("recipes", "copy", source, "--force")
    assert copied.read_text() != "mine"
    with pytest.raises(RecipeError, match="itself"):
        run("recipes", "copy", "memagent/quickstart", "--force")


def test_copy_takes_a_file_or_a_folder(folders: tuple[Path, Path]) -> None:
    run("recipes", "copy", "memory_r1/base", "new/mine.yaml")
    run("recipes", "copy", "memory_r1/base", "folder")
    assert (folders[0] / "new/mine.yaml").is_file()
    assert (folders[0] / "folder/base.yaml").is_file()


# --- the command line as a whole ---


def command(*arguments: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "memfactory.cli.main", *arguments]
    paths = os.pathsep.join([str(Path(main.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    env = {key: value for key, value in os.environ.items() if key != "MEMFACTORY_DEBUG"}
    return subprocess.run(
        line, cwd=cwd, env={**env, "PYTHONPATH": paths, **environ}, capture_output=True, text=True, check=False
    )


def test_errors_are_told_without_a_traceback_unless_asked_for(tmp_path: Path) -> None:
    plain = command("recipes", "show", "nothing-like-it", cwd=tmp_path)
    assert (plain.returncode, plain.stdout) == (2, "")
    assert plain.stderr.startswith("nothing-like-it: no such recipe")
    assert "Traceback" not in plain.stderr
    for asked in (
        command("--debug", "recipes", "show", "nothing", cwd=tmp_path),
        command("recipes", "show", "nothing", cwd=tmp_path, MEMFACTORY_DEBUG="1"),
    ):
        assert asked.returncode == 2
        assert "Traceback" in asked.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [(DataError("d"), 2), (RecipeErrors("r", []), 2), (EngineError("e"), 1), (KeyboardInterrupt(), 130)],
)
def test_exit_codes(error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(recipes, "listed", fail)
    monkeypatch.setattr(sys, "argv", ["memfactory", "recipes"])
    with pytest.raises(SystemExit) as exit_:
        main.main()
    assert exit_.value.code == code


def test_a_mistyped_command_and_the_version(tmp_path: Path) -> None:
    assert command("doctr", cwd=tmp_path).returncode == 2
    assert command("--version", cwd=tmp_path).stdout.strip() == __version__


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "trl", "pydantic", "yaml", "jinja2"]
    script = f"""
import sys
from memfactory.cli.main import app
try:
    app(["--help"])
except SystemExit:
    pass
print("heavy:", [name for name in {heavy} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy: []"
    for name in main.COMMANDS:
        assert f" {name} " in done.stdout


@pytest.mark.parametrize("name", list(main.COMMANDS))
def test_every_command_loads_and_explains_itself(name: str) -> None:
    assert "Usage: " in run(name, "--help")

"""The wheel: what a user gets who has no checkout."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import memfactory

ROOT = Path(memfactory.__file__).parents[1]
SHIPPED = ("recipes", "rewards", "data", "launch")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built with the hatchling of this environment: no network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("memfactory-*.whl"))


def files_below(folder: Path) -> set[str]:
    # .py[co] and the like are git-ignored, and so left out
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name for name in found if "__pycache__" not in name}


def test_wheel_holds_the_package_and_the_folders_beside_it(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"memfactory/{name}" for name in files_below(ROOT / "memfactory")}
    for folder in SHIPPED:
        below = files_below(ROOT / folder)
        assert below, folder
        expected |= {f"memfactory/_shipped/{folder}/{name}" for name in below}
    assert expected <= names, sorted(expected - names)
    extra = {name for name in names - expected if ".dist-info/" not in name}
    assert not extra, "tests, runs and caches stay out"
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_shipped_files_are_found_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    script = f"""
import sys
sys.path.insert(0, {str(site)!r})
import memfactory
from memfactory.cli.recipes import find_recipe, listed
from memfactory.plugins import shipped
from memfactory.reward.catalogue import find
assert memfactory.__file__.startswith({str(site)!r}), memfactory.__file__
assert listed() and all(row.owner == "shipped" for row in listed())
assert find_recipe("memagent/quickstart").is_relative_to({str(site)!r})
assert callable(find("answer.exact_match"))
assert (shipped("launch") / "local.py").is_file() and (shipped("data") / "registry.yaml").is_file()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_metadata_keeps_torch_out_of_the_base_install(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    lines = archive.read(name).decode().splitlines()
    required = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    base = [line for line in required if "extra ==" not in line]
    assert base
    assert not any(line.startswith(("torch", "transformers", "trl")) for line in base)
    assert "Requires-Python: >=3.11" in lines
    entry_points = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert "memfactory = memfactory.cli.main:main" in entry_points


# --- rewards with the base install: the page of the documentation, from the wheel alone ---


def base_requirements(wheel: Path) -> list[str]:
    """Distributions that the wheel needs without extras, and what those need, by name."""
    archive = zipfile.ZipFile(wheel)
    name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    lines = archive.read(name).decode().splitlines()
    waiting = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    found: dict[str, None] = {}
    while waiting:
        requirement = Requirement(waiting.pop())
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if requirement.name not in found:
            found[requirement.name] = None
            waiting += metadata.distribution(requirement.name).requires or []
    return list(found)


@pytest.fixture(scope="module")
def base_install(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel and its base requirements alone; those are linked: no network."""
    folder = tmp_path_factory.mktemp("base") / "venv"
    venv.create(folder, symlinks=True, with_pip=False)
    python = folder / "bin/python"
    script = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", script], capture_output=True, text=True, check=True).stdout.strip())
    for name in base_requirements(wheel):
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))))
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index", "--no-deps", str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "bin"


@pytest.mark.slow
def test_a_reward_is_added_from_the_docs_alone_outside_the_checkout(base_install: Path, tmp_path: Path) -> None:
    environ = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "MEMFACTORY_DEBUG")}
    page = (ROOT / "docs/adding-a-reward.md").read_text(encoding="utf-8")
    commands = 0
    for language, text in re.findall(r"^```(python|bash)\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        if language == "bash":
            for line in text.splitlines():
                program, *arguments = shlex.split(line)
                done = subprocess.run(
                    [base_install / program, *arguments],
                    cwd=tmp_path,
                    env=environ,
                    capture_output=True,
                    text=True,
                    check=False,
                )
                assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
                assert str(ROOT) not in done.stdout  # nothing comes from the checkout
                commands += 1
        elif named := re.match(r"# (\S+\.py)\n", text):
            assert len(text.splitlines()) <= 12
            (tmp_path / named[1]).parent.mkdir(exist_ok=True)
            (tmp_path / named[1]).write_text(text, encoding="utf-8")
    assert commands >= 12
    for heavy in ("torch", "transformers", "trl", "sklearn"):
        done = subprocess.run([base_install / "python", "-c", f"import {heavy}"], capture_output=True, check=False)
        assert done.returncode == 1, f"{heavy} is there, so this proves nothing"

"""The wheel: what a user gets who has no checkout."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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
from memfactory.plugins import find_in_folder, shipped
assert memfactory.__file__.startswith({str(site)!r}), memfactory.__file__
assert listed() and all(row.owner == "shipped" for row in listed())
assert find_recipe("memagent/quickstart").is_relative_to({str(site)!r})
assert callable(find_in_folder("answer.exact_match", "rewards"))
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

"""Versions outside the supported range end a command before it begins, with the line to type."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from typer.testing import CliRunner

from memfactory.cli.main import app
from memfactory.cli.versions import check_versions
from memfactory.doctor.packages import stated_ranges
from memfactory.errors import EngineError
from memfactory.untested import UNTESTED

COMMANDS = {
    "train": ["train", "memagent/quickstart"],
    "train --dry-run": ["train", "memagent/quickstart", "--dry-run"],
    "launch": ["launch", "memagent/quickstart", "--processes", "2"],
    "launch --slurm": ["launch", "memagent/quickstart", "--gpus", "8", "--slurm"],
    "eval": ["eval", "memagent/quickstart"],
}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts the metadata of another version before that of the installed one, as pip would have written it."""
    packages = tmp_path / "packages"
    packages.mkdir()
    monkeypatch.syspath_prepend(packages)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(UNTESTED, raising=False)

    def put(name: str, version: str) -> None:
        info = packages / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    return put


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("version", ["1.15.3", "1.17.0"])
def test_a_trl_outside_its_range_is_refused_before_anything_is_done(
    installed, tmp_path: Path, command: str, version: str
) -> None:
    installed("trl", version)
    ended = CliRunner().invoke(app, COMMANDS[command]).exception
    assert isinstance(ended, EngineError)
    text = str(ended)
    assert f"trl {version}" in text
    [line] = [part for part in text.split("fix: ")[1].split("; ") if part.startswith("pip install ")]
    asked = Requirement(line.removeprefix("pip install ").strip("'"))
    assert asked.name == "trl"
    assert asked.specifier == stated_ranges("memfactory")["trl"][0]
    assert version not in asked.specifier
    assert f"{UNTESTED}=1" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["packages"], "something was written"


def test_all_of_them_are_named_with_one_line_that_mends_them(installed) -> None:
    installed("transformers", "4.57.1")
    installed("peft", "0.10.0")
    with pytest.raises(EngineError) as caught:
        check_versions()
    text = str(caught.value)
    assert "peft 0.10.0" in text
    assert "transformers 4.57.1" in text
    assert "pip install 'peft>=0.21' 'transformers>=5.10.4,<5.18'" in text


def test_it_goes_on_at_ones_own_risk(installed, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    installed("trl", "1.17.0")
    monkeypatch.setenv(UNTESTED, "1")
    check_versions()
    assert "trl 1.17.0: supported is trl >=1.16,<1.17; going on" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    check_versions()
    assert capsys.readouterr().err == "", "every process says it"


def test_deepspeed_is_held_against_what_trl_takes(installed) -> None:
    installed("deepspeed", "0.1.0")
    check_versions()
    with pytest.raises(EngineError, match=r"deepspeed 0\.1\.0.*\n.*pip install 'deepspeed"):
        check_versions("deepspeed")


def test_the_installed_ones_are_in_their_ranges_and_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(UNTESTED, raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)  # an import of it would fail
    check_versions()
    assert Version("1.17.0") not in stated_ranges("memfactory")["trl"][0]

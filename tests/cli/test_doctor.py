"""`memfactory doctor`: what it finds, and when it says that something is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from typer.testing import CliRunner

from memfactory.cli import doctor
from memfactory.cli.doctor import Check, Level, TorchBuild
from memfactory.cli.main import app


@pytest.mark.parametrize(
    ("version", "supported", "optional", "level"),
    [
        ("2.13.0+cpu", ">=2.13,<2.14", False, Level.OK),
        ("2.13.0", "<=2.13.0", False, Level.OK),
        ("2.13.0+cu130", "<=2.13.0", False, Level.OK),
        ("2.13.1rc1", ">=2.13", False, Level.OK),
        ("2.14.0", ">=2.13,<2.14", False, Level.WRONG),
        ("2.14.0", ">=2.13,<2.14", True, Level.NOTE),
        (None, ">=2.13,<2.14", False, Level.WRONG),
        (None, ">=2.13,<2.14", True, Level.OK),
    ],
)
def test_versions_are_held_against_the_range(
    version: str | None, supported: str, optional: bool, level: Level
) -> None:
    check = doctor.check_package("torch", version, SpecifierSet(supported), "train", optional)
    assert check.level is level
    assert bool(check.fix) == (level is not Level.OK)


def test_the_fix_can_be_pasted() -> None:
    supported = SpecifierSet("<1.17,>=1.16")
    assert doctor.check_package("trl", "1.0", supported).fix == "pip install 'trl>=1.16,<1.17'"
    assert doctor.check_package("trl", None, supported, "train").fix == "pip install 'memfactory[train]'"


def test_ranges_come_from_the_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    stated = ["pyyaml>=6", "torch<2.14,>=2.13; extra == 'train'", 'trl[vllm]>=1; extra == "dev"']
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "1")
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: stated)
    ranges = doctor.stated_ranges("memfactory")
    assert {name: (str(specifiers), extra) for name, (specifiers, extra) in ranges.items()} == {
        "pyyaml": (">=6", ""),
        "torch": ("<2.14,>=2.13", "train"),
        "trl": (">=1", "dev"),
    }


def test_trl_states_the_ranges_of_the_engines() -> None:
    """The doctor relies on these extras being in TRL's metadata."""
    assert {"vllm", "deepspeed"} <= set(doctor.stated_ranges("trl"))


@pytest.mark.parametrize(
    ("accelerator", "gpu", "level", "word"),
    [
        ("", False, Level.OK, ""),
        ("cuda 13.0", True, Level.OK, ""),
        ("", True, Level.NOTE, "idle"),
        ("cuda 13.0", False, Level.NOTE, "gigabytes"),
    ],
)
def test_the_build_of_torch_is_held_against_the_machine(accelerator: str, gpu: bool, level: Level, word: str) -> None:
    check = doctor.check_torch_build(TorchBuild("2.13.0", accelerator), gpu)
    assert check.level is level
    assert word in check.fix


def test_the_build_is_read_without_importing_torch() -> None:
    script = """
import sys
from memfactory.cli.doctor import torch_build
build = torch_build()
assert "torch" not in sys.modules
import torch
assert build.version == torch.__version__, build
assert bool(build.accelerator) == bool(torch.version.cuda or torch.version.hip), build
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_torchvision_that_cannot_be_loaded_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_torchvision(None) is None
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check = doctor.check_torchvision("0.20")
    assert check is not None
    assert check.level is Level.WRONG
    assert "nms does not exist" in check.fix
    (tmp_path / "torchvision.py").write_text("")
    check = doctor.check_torchvision("0.20.0")
    assert check is not None
    assert check.level is Level.OK


def test_gpus_are_what_nvidia_smi_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.gpus() == []
    tool = tmp_path / "nvidia-smi"
    for body, found in [("echo 'H100, 81559 MiB'", ["H100, 81559 MiB"]), ("echo no driver; exit 9", [])]:
        tool.write_text(f"#!/bin/sh\n{body}\n")
        tool.chmod(0o755)
        assert doctor.gpus() == found


def test_openmp_is_told_about_spinning_and_too_many_threads() -> None:
    assert "PASSIVE" in doctor.check_openmp({}, 2).fix
    assert doctor.check_openmp({"OMP_WAIT_POLICY": "passive"}, 2).level is Level.OK
    assert "OMP_NUM_THREADS=2" in doctor.check_openmp({"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "8"}, 2).fix


def test_the_machine_has_cores_and_memory() -> None:
    assert doctor.cores() > 0
    memory = doctor.memory_bytes()
    assert memory is None or memory > doctor.GIB / 2


@pytest.mark.parametrize(("level", "code"), [(Level.OK, 0), (Level.NOTE, 0), (Level.WRONG, 1)])
def test_only_what_is_wrong_fails(level: Level, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [Check("trl", "9.9", ">=1.16", level, "pip install 'memfactory[train]'"), Check("cores", "2")]
    monkeypatch.setattr(doctor, "run_checks", lambda: checks)
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "160"})
    assert result.exit_code == code
    # square brackets are markup for rich, and would vanish
    assert "pip install 'memfactory[train]'" in result.output
    assert ("To mend: trl." in result.output) == (level is Level.WRONG)


def test_this_environment_is_looked_at_as_a_whole() -> None:
    names = {check.name for check in doctor.run_checks()}
    assert {"python", "tokenizers", "vllm", "deepspeed", "GPU", "chromium", "OpenMP", "disk, here"} <= names

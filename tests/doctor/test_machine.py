"""`memfactory doctor` without a recipe: what it finds, and when it says that something is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from typer.testing import CliRunner

from memfactory.cli.main import app
from memfactory.doctor import machine, packages, run
from memfactory.doctor.check import GIB, Check, Level
from memfactory.doctor.machine import GpuMemory
from memfactory.doctor.packages import TorchBuild


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
    check = packages.check_package("torch", version, SpecifierSet(supported), "train", optional)
    assert check.level is level
    assert bool(check.fix) == (level is not Level.OK)


def test_the_fix_can_be_pasted() -> None:
    supported = SpecifierSet("<1.17,>=1.16")
    assert packages.check_package("trl", "1.0", supported).fix == "pip install 'trl>=1.16,<1.17'"
    assert packages.check_package("trl", None, supported, "train").fix == "pip install 'memfactory[train]'"


def test_ranges_come_from_the_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    stated = ["pyyaml>=6", "torch<2.14,>=2.13; extra == 'train'", 'trl[vllm]>=1; extra == "dev"']
    monkeypatch.setattr(packages.metadata, "version", lambda name: "1")
    monkeypatch.setattr(packages.metadata, "requires", lambda name: stated)
    ranges = packages.stated_ranges("memfactory")
    assert {name: (str(specifiers), extra) for name, (specifiers, extra) in ranges.items()} == {
        "pyyaml": (">=6", ""),
        "torch": ("<2.14,>=2.13", "train"),
        "trl": (">=1", "dev"),
    }


def test_what_training_needs_is_looked_at() -> None:
    """`dev` comes before `train` in the metadata and states the same packages."""
    seen = {check.name for check in packages.package_checks(gpu=False)}
    assert {"torch", "transformers", "trl", "peft", "accelerate", "datasets"} <= seen


def test_trl_states_the_ranges_of_the_engines() -> None:
    """The doctor relies on these extras being in TRL's metadata."""
    assert {"vllm", "deepspeed"} <= set(packages.stated_ranges("trl"))


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
    check = packages.check_torch_build(TorchBuild("2.13.0", accelerator), gpu)
    assert check.level is level
    assert word in check.fix


def test_the_build_is_read_without_importing_torch() -> None:
    script = """
import sys
import memfactory.cli.doctor
from memfactory.doctor.packages import torch_build
from memfactory.doctor.run import machine
build = torch_build()
assert machine()
assert "torch" not in sys.modules
import torch
assert build.version == torch.__version__, build
assert bool(build.accelerator) == bool(torch.version.cuda or torch.version.hip), build
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_torchvision_that_cannot_be_loaded_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert packages.check_torchvision(None) is None
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check = packages.check_torchvision("0.20")
    assert check is not None
    assert check.level is Level.WRONG
    assert "nms does not exist" in check.fix
    (tmp_path / "torchvision.py").write_text("")
    check = packages.check_torchvision("0.20.0")
    assert check is not None
    assert check.level is Level.OK


def test_gpus_are_what_nvidia_smi_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.gpus() == []
    tool = tmp_path / "nvidia-smi"
    for body, found in [("echo 'H100, 81559 MiB'", ["H100, 81559 MiB"]), ("echo no driver; exit 9", [])]:
        tool.write_text(f"#!/bin/sh\n{body}\n")
        tool.chmod(0o755)
        assert machine.gpus() == found


def test_memory_of_gpus_is_that_of_the_visible_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '24564, 24000'; echo '81559, 100'\n")
    tool.chmod(0o755)
    both = [GpuMemory(24564 * 2**20, 24000 * 2**20), GpuMemory(81559 * 2**20, 100 * 2**20)]
    assert machine.gpu_memory({}) == both
    assert machine.gpu_memory({"CUDA_VISIBLE_DEVICES": "1"}) == both[1:]
    assert machine.gpu_memory({"CUDA_VISIBLE_DEVICES": ""}) == []
    assert machine.gpu_memory({"CUDA_VISIBLE_DEVICES": "GPU-6a2"}) == both


def test_openmp_is_told_about_spinning_and_too_many_threads() -> None:
    assert "PASSIVE" in machine.check_openmp({}, 2).fix
    assert machine.check_openmp({"OMP_WAIT_POLICY": "passive"}, 2).level is Level.OK
    assert "OMP_NUM_THREADS=2" in machine.check_openmp({"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "8"}, 2).fix


def test_the_machine_has_cores_and_memory() -> None:
    assert machine.cores() > 0
    memory = machine.memory_bytes()
    assert memory is None or memory > GIB / 2


@pytest.mark.parametrize(("level", "code"), [(Level.OK, 0), (Level.NOTE, 0), (Level.WRONG, 1)])
def test_only_what_is_wrong_fails(level: Level, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [Check("trl", "9.9", ">=1.16", level, "pip install 'memfactory[train]'"), Check("cores", "2")]
    monkeypatch.setattr(run, "machine", lambda: checks)
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "160"})
    assert result.exit_code == code
    # square brackets are markup for rich, and would vanish
    assert "pip install 'memfactory[train]'" in result.output
    assert ("To mend: trl." in result.output) == (level is Level.WRONG)


def test_this_environment_is_looked_at_as_a_whole() -> None:
    names = {check.name for check in run.machine()}
    assert {"python", "tokenizers", "vllm", "deepspeed", "GPU", "chromium", "OpenMP", "disk, here"} <= names

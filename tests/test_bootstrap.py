"""launch/local.py: what it decides, without installing anything."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from memfactory.plugins import load_file, shipped

local = load_file(shipped("launch") / "local.py")

# what `uv pip compile` gave for torch 2.13.0: from the default index, and with a CPU wheel in the find-links
CUDA_RESOLUTION = "cuda-bindings==13.5.0\nfilelock==4.2.11\nnvidia-cublas==13.1.1.3\ntorch==2.13.0\ntriton==3.7.1\n"
CPU_RESOLUTION = "filelock==4.2.11\nfsspec==2026.9.0\nnetworkx==3.6.1\ntorch==2.13.0+cpu\n"
PLAIN_RESOLUTION = "filelock==4.2.11\ntorch==2.13.0\n"


@pytest.mark.parametrize(
    ("gpu", "resolution", "source"),
    [
        (False, CUDA_RESOLUTION, "CPU_INDEX"),
        (False, "torch==2.13.0+cu130\n", "CPU_INDEX"),
        (False, CPU_RESOLUTION, "RESOLVED"),
        (False, PLAIN_RESOLUTION, "RESOLVED"),
        (True, CUDA_RESOLUTION, "RESOLVED"),
        (True, CPU_RESOLUTION, "NO_FIND_LINKS"),
    ],
)
def test_torch_fits_the_machine(gpu: bool, resolution: str, source: str) -> None:
    assert local.choose_torch(gpu, resolution) is local.TorchSource[source]


def options_on(monkeypatch: pytest.MonkeyPatch, answers: list[tuple[bool, str]], gpu: bool = False) -> list[str]:
    """Options chosen on Linux when resolving torch gives `answers`, one after the other."""
    monkeypatch.setattr(local.platform, "system", lambda: "Linux")
    monkeypatch.setattr(local, "has_nvidia_gpu", lambda: gpu)
    monkeypatch.setattr(local, "_resolve_torch", lambda *args: answers.pop(0))
    return local.torch_options(Path("uv"), "torch==2.13.0", {})


def test_a_cuda_build_is_never_taken_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(local.SetupError, match=r"no CPU build[\s\S]*no route[\s\S]*PIP_FIND_LINKS="):
        options_on(monkeypatch, [(True, CUDA_RESOLUTION), (False, "no route to index")])
    options = options_on(monkeypatch, [(True, CUDA_RESOLUTION), (True, CPU_RESOLUTION)])
    assert options == ["--torch-backend", "cpu"]


def test_the_index_is_taken_as_it_is_when_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert options_on(monkeypatch, [(True, CPU_RESOLUTION)]) == []
    assert options_on(monkeypatch, [(True, CUDA_RESOLUTION)], gpu=True) == []


def test_the_override_decides_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_resolve_torch", lambda *args: pytest.fail("nothing is to be resolved"))
    options = local.torch_options(Path("uv"), "torch==2.13.0", {"MEMFACTORY_TORCH_BACKEND": "cu130"})
    assert options[:2] == ["--torch-backend", "cu130"]


def test_gpu_is_the_driver_or_an_answering_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent, driver, tool = tmp_path / "absent", tmp_path / "version", tmp_path / "bin" / "nvidia-smi"
    driver.touch()
    tool.parent.mkdir()
    monkeypatch.setenv("PATH", str(tool.parent))
    assert local.has_nvidia_gpu(driver)
    assert not local.has_nvidia_gpu(absent)
    for body, found in [("echo 'GPU 0: H100'", True), ("echo GPU is lost; exit 9", False), ("exit 0", False)]:
        tool.write_text(f"#!/bin/sh\n{body}\n")
        tool.chmod(0o755)
        assert local.has_nvidia_gpu(absent) is found, body


def test_settings_of_pip_reach_uv() -> None:
    listed = """:env:.find-links='/wheels /more'
global.find-links='/wheels'
global.index-url='https://mirror.example/simple'
global.extra-index-url='https://other.example/simple'
download.no-index='true'
"""
    environ = local.uv_environment({"HOME": "/h", "UV_FIND_LINKS": "/mine"}, listed)
    assert environ == {
        "HOME": "/h",
        "UV_FIND_LINKS": "/mine,/wheels,/more",
        "UV_DEFAULT_INDEX": "https://mirror.example/simple",
    }
    assert local.uv_environment({"UV_DEFAULT_INDEX": "mine"}, listed)["UV_DEFAULT_INDEX"] == "mine"
    assert local.uv_environment({"A": "b"}, "") == {"A": "b"}


def test_command_runs_inside_with_quiet_openmp_unless_told_otherwise(tmp_path: Path) -> None:
    given = {"PATH": "/usr/bin", "PYTHONHOME": "/x", "OMP_WAIT_POLICY": "ACTIVE"}
    environ = local.command_environment(given, tmp_path)
    assert environ["PATH"].split(os.pathsep) == [str(local.scripts_folder(tmp_path)), "/usr/bin"]
    assert environ["VIRTUAL_ENV"] == str(tmp_path)
    assert "PYTHONHOME" not in environ
    assert (environ["OMP_WAIT_POLICY"], environ["GOMP_SPINCOUNT"]) == ("ACTIVE", "0")


def test_compiled_modules_are_kept_without_touching_the_checkout(tmp_path: Path) -> None:
    environ = local.command_environment({"PYTHONDONTWRITEBYTECODE": "1"}, tmp_path)
    assert "PYTHONDONTWRITEBYTECODE" not in environ
    assert environ["PYTHONPYCACHEPREFIX"].startswith(str(tmp_path))
    assert "PYTHONPYCACHEPREFIX" not in local.command_environment({}, tmp_path)


def test_layout_of_windows(tmp_path: Path) -> None:
    assert local.venv_python(tmp_path, "nt") == tmp_path / "Scripts" / "python.exe"
    assert local.venv_python(tmp_path, "posix") == tmp_path / "bin" / "python"


def fake_venv(folder: Path, version: str = ".".join(map(str, sys.version_info[:3]))) -> Path:
    local.venv_python(folder).parent.mkdir(parents=True)
    local.venv_python(folder).touch()
    (folder / "pyvenv.cfg").write_text(f"home = /usr/bin\nversion = {version}\n")
    return folder


def test_stamp_counts_only_for_the_same_inputs_at_the_same_place(tmp_path: Path) -> None:
    inputs = ([b"a", b"b"], (3, 11), tmp_path, "")
    wanted = local.fingerprint(*inputs)
    others = [([b"ab", b""], *inputs[1:]), (inputs[0], (3, 12), *inputs[2:]), (*inputs[:3], "cpu")]
    assert len({wanted, *(local.fingerprint(*other) for other in others)}) == 4
    venv = fake_venv(tmp_path / "venv")
    assert not local.is_prepared(venv, wanted)
    (venv / local.STAMP).write_text(f"{wanted}\n{venv}\n")
    assert local.is_prepared(venv, wanted)
    assert not local.is_prepared(venv, "another")
    moved = venv.rename(tmp_path / "moved")
    assert not local.is_prepared(moved, wanted)
    with pytest.raises(local.SetupError, match="was moved"):
        local.check_venv(moved, sys.version_info[:2])


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    python = sys.version_info[:2]
    assert not local.check_venv(tmp_path / "new", python)
    assert local.check_venv(fake_venv(tmp_path / "good"), python)
    with pytest.raises(local.SetupError, match=r"holds Python 3\.9"):
        local.check_venv(fake_venv(tmp_path / "old", "3.9.1"), python)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    with pytest.raises(local.SetupError, match=r"thesis\.tex"):
        local.check_venv(tmp_path / "home", python)


def test_an_interrupted_installation_leaves_no_stamp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv, calls = fake_venv(tmp_path / "venv"), []

    def install(folder: Path) -> None:
        calls.append(folder)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(local, "install", install)
    local.prepare(venv)
    local.prepare(venv)
    assert len(calls) == 1, "the second time nothing is installed"
    monkeypatch.setenv("MEMFACTORY_TORCH_BACKEND", "cpu")
    with pytest.raises(KeyboardInterrupt):
        local.prepare(venv)
    assert not (venv / local.STAMP).exists()
    local.prepare(venv)
    assert len(calls) == 3
    assert (venv / local.STAMP).exists()


def test_the_lock_lets_one_in_at_a_time(tmp_path: Path) -> None:
    script = f"""
import sys, time
sys.path.insert(0, {str(shipped("launch"))!r})
import local, pathlib
with local.locked(pathlib.Path({str(tmp_path / "lock")!r})):
    print(time.time(), flush=True); time.sleep(.3); print(time.time(), flush=True)
"""
    both = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    spans = sorted([float(line) for line in process.communicate(timeout=30)[0].split()] for process in both)
    assert spans[0][1] <= spans[1][0]


def test_an_old_python_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(local, "OLDEST_PYTHON", (99, 0))
    assert local.main(["pytest"]) == 1
    assert "Python 99.0 or newer is needed" in capsys.readouterr().err


def test_exit_code_is_passed_on_and_the_second_start_is_fast(tmp_path: Path) -> None:
    """The whole script in a process of its own, on an environment whose stamp says it is ready."""
    venv = fake_venv(tmp_path / "venv")
    inputs = [path.read_bytes() for path in (local.PYPROJECT, local.CONSTRAINTS, Path(local.__file__))]
    wanted = local.fingerprint(inputs, sys.version_info[:2], local.ROOT, "")
    (venv / local.STAMP).write_text(f"{wanted}\n{venv}\n")
    environ = {key: value for key, value in os.environ.items() if key != "MEMFACTORY_TORCH_BACKEND"}
    environ["MEMFACTORY_VENV"] = str(venv)
    started = time.monotonic()
    command = [sys.executable, local.__file__, "sh", "-c", "echo $OMP_WAIT_POLICY; exit 7"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (7, "PASSIVE\n", "")
    assert time.monotonic() - started < 5


def test_constraints_pin_what_the_script_needs_and_name_no_machine() -> None:
    text = local.CONSTRAINTS.read_text()
    for package in ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "uv", "hatchling", "pytest"):
        assert local.pinned(package, text)
    pins = [line for line in text.splitlines() if not line.startswith("#")]
    assert all("==" in pin and "+" not in pin and not pin.startswith(("nvidia-", "cuda-")) for pin in pins)
    with pytest.raises(local.SetupError, match="torch is not pinned"):
        local.pinned("torch", "torchvision==1\n")

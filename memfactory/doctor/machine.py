"""Cores, memory, GPUs, disk: what this machine has."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from memfactory.doctor.check import GIB, Check, Level

MIB = 1024**2
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
Run = Callable[..., subprocess.CompletedProcess[str]]


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """Of one GPU, in bytes."""

    total: int
    free: int


def _ask_smi(fields: str, form: str, run: Run) -> list[str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, f"--query-gpu={fields}", f"--format={form}"]
    try:
        done = run(query, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def gpus(run: Run = subprocess.run) -> list[str]:
    """Name and memory of each NVIDIA GPU."""
    return _ask_smi("name,memory.total", "csv,noheader", run)


def gpu_memory(environ: Mapping[str, str] = os.environ, run: Run = subprocess.run) -> list[GpuMemory]:
    """Memory of each GPU that CUDA_VISIBLE_DEVICES leaves; without importing torch."""
    found: list[GpuMemory] = []
    for line in _ask_smi("memory.total,memory.free", "csv,noheader,nounits", run):
        total, _, free = line.partition(",")
        if total.strip().isdecimal() and free.strip().isdecimal():
            found.append(GpuMemory(int(total) * MIB, int(free) * MIB))
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not all(part.strip().isdecimal() for part in visible.split(",") if part):
        return found  # names of devices (UUIDs) are not resolved
    return [found[int(part)] for part in visible.split(",") if part and int(part) < len(found)]


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

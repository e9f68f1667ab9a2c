"""Whether a checkpoint can be gone on from: a seal that is written last, and what to say where a disk is full.

The first thing written into a checkpoint is a seal that says `complete: false`, the last one lists every file with its
size. A process can be killed at any moment in between, and a file can lose its end later; both are seen here, without
torch and before a model is loaded.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memfactory.errors import EngineError, MemFactoryError

SEAL = "seal.json"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FAILED = ("iostream error", "write failed", "inline_container", "No space left", "File too large", "quota")
"""How libraries that write files on their own say that a write failed."""
_LITTLE = 2**26
"""Free space below which a failed write is put down to it. Unit: bytes."""


def begin(checkpoint: Path) -> None:
    """Mark `checkpoint` as being written, and make its folder."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    _write(checkpoint, {"complete": False})


def seal(checkpoint: Path) -> None:
    """Mark `checkpoint` as written to its end: every process has written its files."""
    files = {
        str(file.relative_to(checkpoint)): file.stat().st_size
        for file in sorted(checkpoint.rglob("*"))
        if file.is_file() and file.name not in (SEAL, SEAL + ".tmp")
    }
    _write(checkpoint, {"complete": True, "files": files})


def _write(checkpoint: Path, data: dict[str, Any]) -> None:
    temporary = checkpoint / (SEAL + ".tmp")
    temporary.write_text(json.dumps(data, indent=1), encoding="utf-8")
    os.replace(temporary, checkpoint / SEAL)


def is_written(checkpoint: Path) -> bool:
    """Whether `checkpoint` was written to its end. Versions without a seal wrote ``trainer_state.json`` last."""
    if not (checkpoint / SEAL).exists():
        return _read(checkpoint / "trainer_state.json") is not None
    sealed = _read(checkpoint / SEAL)
    return sealed is None or bool(sealed.get("complete"))  # it is replaced in one go, so one not readable is damaged


def damage(checkpoint: Path) -> str:
    """What is wrong with a `checkpoint` that was once written to its end, naming the file; empty if nothing is."""
    if (checkpoint / SEAL).exists() and _read(checkpoint / SEAL) is None:
        return f"{SEAL} is not readable"
    for name, size in ((_read(checkpoint / SEAL) or {}).get("files") or {}).items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, and {size} were written"
    if _read(checkpoint / "trainer_state.json") is None:
        return "trainer_state.json is not readable"
    return ""


def _read(file: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


@contextmanager
def saving(target: Path, *, remove: bool = False, setting: str = "") -> Iterator[None]:
    """Say what is to be done where `target` cannot be written.

    Args:
        remove: a `target` that is a folder is taken away again when that happens, because a part of it is of no use.
        setting: of the recipe, by which another disk is chosen for it; empty where that is the run folder's.

    Raises:
        EngineError: anything but one of our own errors was raised inside.
    """
    try:
        yield
    except MemFactoryError:
        raise
    except Exception as error:
        free = _free(target)
        if remove:
            shutil.rmtree(target, ignore_errors=True)
        why = f"{type(error).__name__}: {error}"
        full = (isinstance(error, OSError) and error.errno in _FULL) or any(words in why for words in _FAILED)
        if full or free < _LITTLE:
            why = f"the disk is full, or a limit on its use is reached ({free / 2**20:.0f} MiB are free); {why}"
        raise EngineError(
            f"{target} could not be written",
            why,
            f"make room or choose another disk{setting and f' ({setting})'}; earlier checkpoints are whole, and the "
            "same command goes on from the newest of them",
        ) from error


def _free(target: Path) -> int:
    """Bytes free where `target` lies or would lie."""
    place = target.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return 0

"""A folder that one process works in at a time."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memfactory.errors import RecipeError, boundary

try:
    import fcntl
except ImportError:  # not on Windows: two processes in one folder are then nobody's to notice
    fcntl = None  # type: ignore[assignment]


@contextmanager
def held(folder: Path, what: str, doing: str, option: str) -> Iterator[None]:
    """Keep `folder` from a second process; the system lets go of it however the first one ends. It is made if needed.

    Args:
        what: the folder, for messages, e.g. ``run folder runs/a``.
        doing: what a process does in it, e.g. ``training``.
        option: how to name another one, e.g. ``output_dir=...``.

    Raises:
        RecipeError: another process works in it, or it cannot be made.
    """
    if fcntl is None:
        yield
        return
    with boundary(RecipeError, f"{what} cannot be made", f"choose another with {option}"):
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / ".lock").open("a+", encoding="utf-8")
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            stream.seek(0)
            raise RecipeError(
                what,
                f"another process is {doing} in it ({stream.read().strip() or 'it does not say which'})",
                f"wait until it ends or stop it, or give another folder with {option}",
            ) from error
        except OSError:  # a file system without locks
            yield
            return
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        stream.flush()
        try:
            yield
        finally:
            stream.truncate(0)

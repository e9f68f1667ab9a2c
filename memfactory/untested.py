"""Versions that nobody tried: they end what needs them, or are used at one's own risk."""

from __future__ import annotations

import os

from rich.console import Console

from memfactory.errors import EngineError

UNTESTED = "MEMFACTORY_UNTESTED"
"""Environment variable: 1 goes on with versions outside the supported ranges, at one's own risk."""


def refuse(what: str, why: str, fix: str) -> None:
    """End here because of a version outside its range.

    Args:
        what: the package and its version.
        why: the range.
        fix: what brings a version inside it.

    Raises:
        EngineError: always, but where `MEMFACTORY_UNTESTED` is 1: then it is a line on standard error.
    """
    if os.environ.get(UNTESTED, "0") in ("", "0"):
        raise EngineError(what, why, f"{fix}; or {UNTESTED}=1 in the environment, to go on at your own risk")
    if os.environ.get("RANK", "0") == "0":  # one of the processes says it
        text = f"{what}: {why}; going on, because {UNTESTED} is set"
        Console(stderr=True).print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)

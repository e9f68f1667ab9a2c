"""Installed versions are looked at before a command that needs them begins: metadata alone, nothing is imported."""

from __future__ import annotations

import os
from collections.abc import Sequence

from packaging.specifiers import SpecifierSet
from rich.console import Console

from memfactory.doctor.check import Check, Level
from memfactory.doctor.packages import check_package, installed, stated_ranges
from memfactory.errors import EngineError

UNTESTED = "MEMFACTORY_UNTESTED"
"""Environment variable: 1 goes on with versions outside the supported ranges, at one's own risk."""
_NEEDED = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
"""Without these nothing trains; others that are absent are missed by what needs them."""


def check_versions(*more: str) -> None:
    """Compare what is installed with the ranges that `memfactory[train]` states.

    Args:
        more: packages that this run needs beyond it, in the ranges that TRL states, e.g. ``deepspeed``.

    Raises:
        EngineError: one is outside its range or not there, all of them in one message; only a line on standard error
            where `MEMFACTORY_UNTESTED` is 1.
    """
    wrong = [check for check in _checks(more) if check.level is Level.WRONG]
    wrong = [check for check in wrong if check.found != "absent" or check.name in _NEEDED]
    if not wrong:
        return
    what = ", ".join(
        f"{check.name} {'is not installed' if check.found == 'absent' else check.found}" for check in wrong
    )
    ranges = ", ".join(f"{check.name} {check.supported}" for check in wrong)
    if os.environ.get(UNTESTED, "0") not in ("", "0"):
        if os.environ.get("RANK", "0") == "0":  # one of the processes says it
            text = f"{what}: supported is {ranges}; going on, because {UNTESTED} is set"
            Console(stderr=True).print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)
        return
    absent = any(check.found == "absent" for check in wrong)
    risk = "" if absent else f"; or {UNTESTED}=1 in the environment, to go on at your own risk"
    raise EngineError(what, f"supported is {ranges}", f"{_pip(wrong)}{risk}")


def _checks(more: Sequence[str]) -> list[Check]:
    ours, trls = stated_ranges("memfactory"), stated_ranges("trl")
    checks = [
        check_package(name, installed(name), supported, extra)
        for name, (supported, extra) in ours.items()
        if extra in ("", "train")
    ]
    return checks + [
        check_package(name, version, trls.get(name, (SpecifierSet(), ""))[0])
        for name in more
        if (version := installed(name)) is not None
    ]


def _pip(wrong: Sequence[Check]) -> str:
    """One line that mends all of them."""
    asked = {check.fix.removeprefix("pip install ") for check in wrong}
    return f"pip install {' '.join(sorted(asked))}"

"""Installed versions are looked at before a command that needs them begins: metadata alone, nothing is imported."""

from __future__ import annotations

from collections.abc import Sequence

from packaging.specifiers import SpecifierSet

from memfactory.doctor.check import Check, Level
from memfactory.doctor.packages import check_package, installed, stated_ranges
from memfactory.errors import EngineError
from memfactory.untested import refuse

_NEEDED = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
"""Without these nothing trains; others that are absent are missed by what needs them."""


def check_versions(*more: str) -> None:
    """Compare what is installed with the ranges that `memfactory[train]` states.

    Args:
        more: packages that this run needs beyond it, in the ranges that TRL states, e.g. ``deepspeed``.

    Raises:
        EngineError: one is outside its range or not there, all of them in one message. See
            :func:`memfactory.untested.refuse` for the former.
    """
    wrong = [check for check in _checks(more) if check.level is Level.WRONG]
    wrong = [check for check in wrong if check.found != "absent" or check.name in _NEEDED]
    if not wrong:
        return
    what = ", ".join(
        f"{check.name} {'is not installed' if check.found == 'absent' else check.found}" for check in wrong
    )
    ranges = ", ".join(f"{check.name} {check.supported}" for check in wrong)
    if any(check.found == "absent" for check in wrong):
        raise EngineError(what, f"supported is {ranges}", _pip(wrong))
    refuse(what, f"supported is {ranges}", _pip(wrong))


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

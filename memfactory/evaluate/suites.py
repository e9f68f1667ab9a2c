"""Suites: what a checkpoint is measured on, by name, with the metric that is used for it elsewhere."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from memfactory.environments.base import Split
from memfactory.environments.registry import build_environment
from memfactory.episode import Task
from memfactory.errors import DataError, MemFactoryError, RecipeError, RecipeErrors
from memfactory.plugins import reason, shipped
from memfactory.recipe import nearest, read_yaml

OWN = "recipe"
"""Name of the suite that is the recipe's own held-out tasks."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)


class Size(_Entry):
    """The option that says how large a suite's tasks are."""

    option: str
    """Of the environment."""
    default: int | str
    unit: str
    """What a size counts, for people."""
    each: float = 1.0
    """Value of the option for a size of 1: the environment may count in other units."""

    def value(self, size: int | str) -> int:
        """The value of the option for `size`, e.g. 8192 or ``8k``.

        Raises:
            RecipeError: it is no size.
        """
        found = re.fullmatch(r"(\d+)(k?)", str(size).strip().lower())
        if found is None or not int(found[1]):
            raise RecipeError(f"size '{size}'", f"it counts {self.unit}", "e.g. 128 or 32k")
        return max(1, round(int(found[1]) * (1024 if found[2] else 1) * self.each))


class Suite(_Entry):
    """An entry of ``data/suites.yaml``."""

    summary: str
    """One line: what the tasks are."""
    environment: str
    """As `environment.name` of a recipe."""
    options: dict[str, Any] = {}
    """Of the environment."""
    file: str = ""
    """The option that names a file the user has; empty where the suite reads none."""
    size: Size | None = None
    tasks: int | None = Field(default=None, ge=1)
    """How many; absent: all there are."""
    metrics: list[str] = Field(min_length=1)
    """Reward functions; the first is the one that checkpoints are compared by."""
    differs: str = ""
    """How this differs from what is published under the name."""


@dataclass(frozen=True)
class Loaded:
    """A suite as it was asked for, with its tasks."""

    name: str
    """As asked for, with its size: ``ruler-niah-single@32k``."""
    suite: Suite
    tasks: Sequence[Task]
    file: str = ""
    """As it was given, where one was."""

    @property
    def metric(self) -> str:
        return self.suite.metrics[0]


def suites() -> dict[str, Suite]:
    """All suites by name: those of ``./data/suites.yaml`` first, then the shipped ones.

    Raises:
        RecipeErrors: entries are wrong; all of them are listed.
    """
    found: dict[str, Suite] = {}
    for folder in (Path.cwd() / "data", shipped("data")):
        path = folder / "suites.yaml"
        if path.is_file():
            found = _read(path) | found
    return found


def _read(path: Path) -> dict[str, Suite]:
    entries: dict[str, Suite] = {}
    errors: list[MemFactoryError] = []
    for name, entry in read_yaml(path).items():
        try:
            entries[str(name)] = Suite.model_validate(entry)
        except ValidationError as error:
            errors += [
                RecipeError(f"{name}.{'.'.join(map(str, item['loc']))}: {reason(item)}") for item in error.errors()
            ]
    if errors:
        raise RecipeErrors(str(path), errors)
    return entries


def load_suite(asked: str, count: int | None = None) -> Loaded:
    """The suite that was asked for as ``NAME``, ``NAME@SIZE``, ``NAME=FILE`` or ``NAME@SIZE=FILE``.

    Args:
        count: of its tasks, where not all of them are wanted.

    Raises:
        RecipeError: there is no such suite, or it has no size or no file to give.
        DataError: its file is missing (the message says where it is to be had and under which licence) or wrong.
    """
    label, _, file = asked.partition("=")
    name, _, size = label.partition("@")
    known = suites()
    if name not in known:
        raise RecipeError(f"--suite {asked}: there is no '{name}'", "", nearest(name, [OWN, *known]))
    suite = known[name]
    options = dict(suite.options)
    if suite.size is not None:
        options[suite.size.option] = suite.size.value(size or suite.size.default)
    elif size:
        raise RecipeError(f"--suite {asked}", f"{name} has no size", f"leave out @{size}")
    if file and not suite.file:
        raise RecipeError(f"--suite {asked}", f"{name} reads no file", f"leave out ={file}")
    if file:
        options[suite.file] = file
    environment = build_environment(suite.environment, options)
    wanted = min(count or suite.tasks or 0, suite.tasks or count or 0) or None
    try:
        tasks = environment.tasks(Split.TEST, wanted)
    except DataError as error:
        # the environment says where its file is to be had, in the words of a recipe
        fix = error.fix.replace(f"set environment.{suite.file} to it", f"give it: --suite {name}=PATH")
        raise DataError(f"suite {name}: {error.what}", error.why, fix) from error
    if not tasks:
        raise DataError(f"suite {name}", "it has no tasks", "check its file")
    return Loaded(label, suite, tasks, file)


def labels(loaded: Sequence[Loaded]) -> list[str]:
    """Names that tell suites apart: as asked for, and with their files where one suite is asked for with several."""
    alike = Counter(one.name for one in loaded)
    files = Counter((one.name, Path(one.file).name) for one in loaded)

    def label(one: Loaded) -> str:
        if alike[one.name] == 1 or not one.file:
            return one.name
        file = Path(one.file).name
        return f"{one.name} ({one.file if files[one.name, file] > 1 else file})"

    return [label(one) for one in loaded]

"""From `environment:` of a recipe to an environment: shipped ones, datasets of the registry, your own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from memfactory.environments.base import Environment
from memfactory.errors import MemFactoryError, RecipeError, RecipeErrors
from memfactory.plugins import construct, reason, resolve, shipped
from memfactory.recipe import nearest, read_yaml

ENVIRONMENTS = {
    "fact_words": "memfactory.environments.fact_words:FactWords",
    "people_codes": "memfactory.environments.people_codes:PeopleCodes",
    "files": "memfactory.environments.files:LongContextFiles",
    "hub": "memfactory.environments.hub:HubDataset",
    "ruler": "memfactory.environments.ruler:RulerTasks",
    "hotpotqa": "memfactory.environments.hotpotqa:HotpotQADocuments",
    "dialogues": "memfactory.environments.dialogues:Dialogues",
    "locomo": "memfactory.environments.locomo:LoCoMo",
    "longmemeval": "memfactory.environments.longmemeval:LongMemEval",
    "msc": "memfactory.environments.msc:MultiSessionChat",
    "bank_files": "memfactory.environments.bank_files:BankFiles",
}
"""Shipped environments. Each is imported when it is asked for."""


class Dataset(BaseModel):
    """An entry of ``data/registry.yaml``: a name for an environment with its options."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)

    environment: str
    """A shipped environment, ``pkg.module:Class`` or ``path/file.py:Class``."""
    options: dict[str, Any] = {}
    """Its options. ``{data}`` in a text stands for the folder of the registry file."""
    card: str
    """The dataset's card, a path inside the folder of the registry file."""
    summary: str
    """One line: what the tasks are."""


def datasets() -> dict[str, Dataset]:
    """All datasets by name: those of ``./data/registry.yaml`` first, then the shipped ones.

    Raises:
        RecipeErrors: entries of a registry file are wrong; all of them are listed.
    """
    found: dict[str, Dataset] = {}
    for folder in (Path.cwd() / "data", shipped("data")):
        path = folder / "registry.yaml"
        if path.is_file():
            found = read_registry(path) | found
    return found


def read_registry(path: Path) -> dict[str, Dataset]:
    """The datasets of one registry file.

    Raises:
        RecipeError: the file cannot be read.
        RecipeErrors: entries are wrong; all of them are listed.
    """
    entries: dict[str, Dataset] = {}
    errors: list[MemFactoryError] = []
    for name, entry in read_yaml(path).items():
        try:
            dataset = Dataset.model_validate(entry)
        except ValidationError as error:
            for item in error.errors():
                key = ".".join(map(str, item["loc"]))
                unknown = item["type"] == "extra_forbidden"
                fix = nearest(key, list(Dataset.model_fields)) if unknown else ""
                errors.append(RecipeError(f"{name}{f'.{key}' if key else ''}: {reason(item)}", "", fix))
        else:
            entries[str(name)] = dataset.model_copy(update={"options": _in_folder(dataset.options, path.parent)})
    if errors:
        raise RecipeErrors(str(path), errors)
    return entries


def build_environment(name: str, options: dict[str, Any]) -> Environment:
    """The environment called `name`, made with `options`.

    `name` is looked up among the shipped environments, then in ``./data/registry.yaml``, then in the
    shipped registry; ``pkg.module:Class`` and ``path/file.py:Class`` name a class of your own. Options
    of a recipe go over those of the registry.

    Raises:
        RecipeError: there is no such environment, or it refuses its options.
        RecipeErrors: options are unknown, missing or of the wrong type; all of them are listed.
    """
    target, options = _target(name, options)
    build = resolve(target)
    where = f"environment {name}"
    if not callable(build):
        raise RecipeError(where, f"{target} is a {type(build).__name__}, not a class", "name the environment's class")
    environment = construct(build, options, "environment")
    if not callable(getattr(environment, "tasks", None)):
        raise RecipeError(
            where, f"{target} has no method `tasks`", "give it `def tasks(self, split, count=None)` returning tasks"
        )
    return environment


def _target(name: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """What `name` stands for, as ``module:Class``, with the registry's options under `options`."""
    if name in ENVIRONMENTS:
        return ENVIRONMENTS[name], options
    if ":" in name:
        return name, options
    known = datasets()
    if name not in known:
        raise RecipeError(
            f"environment.name: there is no '{name}'",
            "it is neither an environment nor a dataset of data/registry.yaml",
            nearest(name, [*ENVIRONMENTS, *known]),
        )
    dataset = known[name]
    return ENVIRONMENTS.get(dataset.environment, dataset.environment), {**dataset.options, **options}


def _in_folder(value: Any, folder: Path) -> Any:
    """`value` with ``{data}`` replaced by `folder` in every text inside."""
    if isinstance(value, str):
        return value.replace("{data}", str(folder))
    if isinstance(value, list):
        return [_in_folder(item, folder) for item in value]
    if isinstance(value, dict):
        return {key: _in_folder(item, folder) for key, item in value.items()}
    return value

"""From a name in a recipe to an object: the user's folders first, then the shipped ones."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import sys
import typing
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import TypeAdapter, ValidationError

from memfactory.errors import MemFactoryError, RecipeError, RecipeErrors
from memfactory.recipe import nearest


def shipped(folder: str) -> Path:
    """A folder that ships with memfactory: `recipes`, `rewards`, `data` or `launch`.

    In a wheel it lies inside the package, in a checkout beside it.
    """
    package = Path(__file__).parent
    inside = package / "_shipped" / folder
    return inside if inside.is_dir() else package.parent / folder


@cache
def load_file(path: Path) -> ModuleType:
    """Import a Python file by path, once per process.

    Raises:
        RecipeError: the file does not exist or fails while it is imported (file and cause named).
    """
    if not path.is_file():
        raise RecipeError(f"{path}: no such file")
    name = f"memfactory_user_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise RecipeError(f"{path}: failed while it was imported", f"{type(error).__name__}: {error}") from error
    return module


def _attribute(module: ModuleType, name: str, where: str) -> Any:
    if not hasattr(module, name):
        public = [key for key in vars(module) if not key.startswith("_")]
        raise RecipeError(f"{where}: '{name}' is not in it", "", nearest(name, public))
    return getattr(module, name)


def resolve(name: str) -> Any:
    """The object behind ``pkg.module:name`` or ``path/file.py:name``.

    Raises:
        RecipeError: the module, file or name does not exist.
    """
    source, _, attribute = name.rpartition(":")
    if source.endswith(".py"):
        return _attribute(load_file(Path(source)), attribute, source)
    try:
        module = importlib.import_module(source)
    except ImportError as error:
        raise RecipeError(f"'{name}'", f"module {source} cannot be imported ({error})") from error
    return _attribute(module, attribute, source)


def find_in_folder(name: str, folder: str) -> Any:
    """The object called ``file.function`` in the user's ``./folder`` or, failing that, the shipped one.

    Raises:
        RecipeError: it is in neither; the message names what is.
    """
    file, _, attribute = name.rpartition(".")
    roots = [Path.cwd() / folder, shipped(folder)]
    for root in roots:
        path = root / f"{file.replace('.', '/')}.py"
        if file and path.is_file():
            return _attribute(load_file(path), attribute, str(path))
    stems = sorted({path.stem for root in roots if root.is_dir() for path in root.glob("*.py")})
    raise RecipeError(f"'{name}' is in no file of {folder}/", f"looked for {file or name}.py", nearest(file, stems))


def construct(cls: type, options: dict[str, Any], where: str) -> Any:
    """An instance of the dataclass `cls` from a recipe section, its options checked like the recipe itself.

    Args:
        cls: a dataclass, e.g. an agent or an environment.
        options: field values as YAML gives them.
        where: the section, for messages, e.g. ``agent``.

    Raises:
        RecipeErrors: unknown options (with the nearest one), wrong types, missing values; all together.
    """
    if not dataclasses.is_dataclass(cls):
        return cls(**options)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    hints = typing.get_type_hints(cls)
    errors: list[MemFactoryError] = []
    values: dict[str, Any] = {}
    for key, value in options.items():
        if key not in fields:
            errors.append(RecipeError(f"{where}.{key}: unknown option of {cls.__name__}", "", nearest(key, [*fields])))
            continue
        try:
            values[key] = TypeAdapter(hints[key]).validate_python(value)
        except ValidationError as error:
            errors.append(RecipeError(f"{where}.{key}: {error.errors()[0]['msg']} (got {value!r})"))
    for key, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and key not in options:
            errors.append(RecipeError(f"{where}.{key}: missing", "", f"add `{key}:`"))
    if errors:
        raise RecipeErrors(where, errors)
    return cls(**values)

"""From a name in a recipe to an object: the user's folders first, then the shipped ones."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import typing
from collections.abc import Callable, Collection
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import TypeAdapter, ValidationError

from memfactory.errors import MemFactoryError, RecipeError, RecipeErrors
from memfactory.recipe import nearest

USER_MODULE = "memfactory_user_"
"""Modules loaded by path get names that begin so."""


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
    name = f"{USER_MODULE}{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}_{path.stem}"
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


def construct(build: Callable[..., Any], options: dict[str, Any], where: str) -> Any:
    """`build` called with a recipe section as keyword arguments, checked like the recipe itself.

    Args:
        build: a class or a function, e.g. an agent or an environment.
        options: values as YAML gives them; they are converted to the types `build` declares.
        where: the section, for messages, e.g. ``agent``.

    Raises:
        RecipeErrors: options are unknown (with the nearest one), missing or of the wrong type; all together.
    """
    checked = check_options(build, options, where)
    return build(**checked)


def check_options(
    build: Callable[..., Any],
    options: dict[str, Any],
    where: str,
    *,
    keyword_only: bool = False,
    supplied: Collection[str] = (),
) -> dict[str, Any]:
    """`options` as keyword arguments of `build`, converted to the types it declares.

    Args:
        build: what will be called with them.
        options: values as YAML gives them.
        where: the section, for messages.
        keyword_only: take only parameters behind a `*` as options; the others are not the recipe's.
        supplied: parameters that the framework fills in.

    Raises:
        RecipeErrors: options are unknown (with the nearest one), missing or of the wrong type; all together.
    """
    parameters = {key: p for key, p in inspect.signature(build).parameters.items() if key not in supplied}
    kinds = [inspect.Parameter.KEYWORD_ONLY] + [inspect.Parameter.POSITIONAL_OR_KEYWORD] * (not keyword_only)
    named = [key for key, p in parameters.items() if p.kind in kinds]
    open_ended = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    try:
        types = typing.get_type_hints(build.__init__ if isinstance(build, type) else build)  # type: ignore[misc]
    except (NameError, TypeError):  # annotations for type checkers alone, or an object: leave the values as they are
        types = {}
    errors: list[MemFactoryError] = []
    checked: dict[str, Any] = {}
    for key, value in options.items():
        if key not in named and not open_ended:
            errors.append(RecipeError(f"{where}.{key}: unknown option", "", nearest(key, named)))
            continue
        try:
            checked[key] = TypeAdapter(types[key]).validate_python(value) if key in types else value
        except ValidationError as error:
            errors.append(RecipeError(f"{where}.{key}: {reasons(error)}", f"got {value!r}"))
    for key in named:
        if parameters[key].default is inspect.Parameter.empty and key not in options:
            errors.append(RecipeError(f"{where}.{key}: missing", "", f"add `{key}:`"))
    if errors:
        raise RecipeErrors(where, errors)
    return checked


def reasons(error: ValidationError) -> str:
    """Why pydantic refused a value. A union reports one problem per member; each says what was expected."""
    return " or ".join(dict.fromkeys(reason(item) for item in error.errors()))


def reason(item: Any) -> str:
    """Why pydantic refused one item, as the continuation of a sentence."""
    text = str(item["msg"])
    return text[:1].lower() + text[1:]

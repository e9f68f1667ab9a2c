"""Reading the files of dialogue datasets, which the user supplies: JSON or JSON Lines under any name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from memfactory.environments.base import Split
from memfactory.environments.rows import Row, collect
from memfactory.episode import Task
from memfactory.errors import DataError, RecipeError, boundary


def read_records(path: str, option: str, source: str) -> Iterator[tuple[str, Row | DataError]]:
    """The mappings of a JSON list (or a single mapping), or of a file with one on each line.

    Args:
        path: the file, from the folder where the command runs.
        option: the option of the environment that names it, e.g. ``path``.
        source: where the file is to be had, and under which licence; it ends the message when there is none.

    Yields:
        Where the record stands (``FILE row N`` or ``FILE line N``, from 1), and the record or what is wrong there.

    Raises:
        DataError: there is no such file, or it is not JSON at all.
    """
    if not path:
        raise DataError(f"environment.{option}: missing", "the file does not come with MemFactory", source)
    file = Path(path).expanduser()
    if not file.is_file():
        why = "it is a folder" if file.is_dir() else "no such file, looked for from the folder where the command runs"
        raise DataError(path, why, source)
    with boundary(DataError, path, "save it as UTF-8"):
        text = file.read_text(encoding="utf-8-sig")
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        if text.lstrip().startswith("[") or len(lines) < 2:
            where = f"{path} line {error.lineno} column {error.colno}"
            raise DataError(where, f"not valid JSON, {error.msg}", "is the download whole?") from error
        yield from (_line(f"{path} line {number}", line) for number, line in lines)
        return
    for number, record in enumerate(whole if isinstance(whole, list) else [whole], 1):
        yield _record(f"{path} row {number}", record)


def tasks_of(
    split: Split, train: str, test: str, count: int | None, source: str, make: Callable[[str, Row], Task]
) -> Sequence[Task]:
    """Tasks of the first `count` records of the file of `split`, for data with a file for each.

    Raises:
        RecipeError: the recipe names no file for `split`.
        DataError: the file is missing, or records are wrong (all of them are named).
    """
    path = train if split == Split.TRAIN else test
    if not path:
        raise RecipeError(f"environment.{split}: missing", f"no file for the {split} split", source)
    return collect(list(read_records(path, str(split), source))[:count], make, path)


def _line(where: str, line: str) -> tuple[str, Row | DataError]:
    try:
        return _record(where, json.loads(line))
    except json.JSONDecodeError as error:
        return where, DataError(where, f"not valid JSON, {error.msg}", "each line must be one record: {...}")


def _record(where: str, value: Any) -> tuple[str, Row | DataError]:
    if isinstance(value, dict):
        return where, value
    return where, DataError(where, f"a {type(value).__name__}, not a record", "each record must be a mapping: {...}")


def need(where: str, record: Row, key: str, kind: type, fix: str = "") -> Any:
    """``record[key]``, which must be a `kind` and not empty.

    Raises:
        DataError: it is missing, empty or of another kind.
    """
    value = record.get(key)
    if not isinstance(value, kind) or not value or (isinstance(value, str) and not value.strip()):
        got = "is missing" if key not in record else f"is {_shown(value)}"
        raise DataError(where, f"`{key}` {got}", fix or f"it must be a {_KINDS.get(kind, kind.__name__)}, not empty")
    return value


def gold_text(where: str, value: Any) -> str:
    """A gold answer as text without white space around it; datasets write some as numbers.

    Raises:
        DataError: it is neither, or empty.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value.strip():
        return value.strip()
    raise DataError(where, f"no answer (got {_shown(value)})", "the answer must be a text or a number")


_KINDS: dict[type, str] = {str: "text", list: "list", dict: "mapping"}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

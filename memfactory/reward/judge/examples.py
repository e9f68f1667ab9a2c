"""Labelled examples to calibrate a judge with, from a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from memfactory.errors import DataError
from memfactory.reward.judge.base import PREFERENCES


@dataclass(frozen=True, slots=True)
class Example:
    """Fields to grade and the label a person gave them."""

    fields: Mapping[str, str]
    label: str
    where: str = ""
    """File and line, for messages."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two texts and which of them a person found better: ``first``, ``second`` or ``tie``."""

    first: str
    second: str
    label: str
    fields: Mapping[str, str] = field(default_factory=dict)
    where: str = ""


def load_examples(path: str | Path) -> list[Example | Pair]:
    """Labelled examples from JSON Lines: ``{"fields": {...}, "label": "yes"}``, and for comparisons
    ``{"first": "...", "second": "...", "label": "first", "fields": {...}}`` (fields may be left out).

    Raises:
        DataError: the file cannot be read or is empty, or a line is wrong (file and line named).
    """
    try:
        # not splitlines(): texts may hold other line separators
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read", str(error), "give a JSON Lines file in UTF-8") from error
    examples = [_example(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not examples:
        raise DataError(f"{path}: no examples", "", 'one a line: {"fields": {"answer": "..."}, "label": "yes"}')
    return examples


def _example(line: str, where: str) -> Example | Pair:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(where, f"not JSON: {error}", "one JSON object a line") from error
    if not isinstance(row, dict):
        raise DataError(where, f"a {type(row).__name__}, not an object", "one JSON object a line")
    pair = "first" in row or "second" in row
    keys = {"first", "second", "label", "fields"} if pair else {"fields", "label"}
    if unknown := sorted(row.keys() - keys):
        raise DataError(where, f"unknown key '{unknown[0]}'", f"allowed: {', '.join(sorted(keys))}")
    fields = row.get("fields", {} if pair else None)
    if not isinstance(fields, dict) or not all(isinstance(value, str) for value in fields.values()):
        raise DataError(where, "`fields` must be an object of texts", '{"fields": {"answer": "..."}, "label": "yes"}')
    if not all(isinstance(row.get(key), str) for key in keys - {"fields"}):
        names = "`first`, `second` and `label`" if pair else "`label`"
        raise DataError(where, f"{names} must be text", "put it in quotes")
    if pair and row["label"] not in PREFERENCES:
        raise DataError(where, f"label {row['label']!r}", f"label a pair with one of {', '.join(PREFERENCES)}")
    if pair:
        return Pair(row["first"], row["second"], row["label"], fields, where)
    return Example(fields, row["label"], where)

"""Episodes to try rewards on: the shipped ones, a file, or what a run has left."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from memfactory.episode import Episode
from memfactory.errors import DataError, MemFactoryError, RecipeError
from memfactory.plugins import shipped
from memfactory.runs import SCHEMA_VERSION, episode_from_record

SHIPPED = Path("samples/episodes.jsonl")
"""Below `data/`: two groups of eight episodes that a model wrote."""
_FIX = "give the episodes.jsonl of a run folder, or leave --episode out for the shipped sample"


@dataclass(frozen=True)
class Samples:
    """Episodes and where they came from."""

    episodes: list[Episode]
    source: str


def load_samples(path: Path | None) -> Samples:
    """The episodes in `path`: a file with one episode record a line, or a run folder. None: the shipped ones.

    Where there is no file ``data/...`` in the working folder, the shipped one is meant.

    Raises:
        RecipeError: there is no such file.
        DataError: a line is no episode (file and line named), or there is none at all.
    """
    file, source = _locate(path)
    episodes = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{source}: cannot be read", str(error), _FIX) from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            episodes.append(_episode(line, f"{source} line {number}"))
    if not episodes:
        raise DataError(f"{source}: no episodes in it", "", _FIX)
    return Samples(episodes, source)


def _locate(path: Path | None) -> tuple[Path, str]:
    if path is None:
        return shipped("data") / SHIPPED, f"data/{SHIPPED.as_posix()} (shipped)"
    if path.is_dir():
        path = path / "episodes.jsonl"
    if path.is_file():
        return path, str(path)
    ours = shipped("data").parent / path
    if path.parts[:1] == ("data",) and ours.is_file():
        return ours, f"{path} (shipped)"
    raise RecipeError(f"{path}: no such file", "", _FIX)


def _episode(line: str, where: str) -> Episode:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON", str(error), _FIX) from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: not an episode", f"a {type(record).__name__}", _FIX)
    if record.get("schema", 0) > SCHEMA_VERSION:
        raise DataError(f"{where}: schema {record['schema']}", f"this version reads {SCHEMA_VERSION}", "upgrade")
    try:
        return episode_from_record(record)
    except MemFactoryError as error:
        missing = error.__cause__
        why = f"it has no '{missing.args[0]}'" if isinstance(missing, KeyError) else error.why
        raise DataError(f"{where}: not an episode", why, _FIX) from error

"""Any dataset that the `datasets` library can load, with a map from its columns to ours."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from memfactory.environments.base import Split
from memfactory.environments.rows import Match, Row, collect, row_task
from memfactory.episode import Task
from memfactory.errors import DataError, EngineError, RecipeError, boundary
from memfactory.recipe import nearest

_COLUMNS = {"context": "context", "question": "input", "answers": "answers"}
_BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".arrow": "arrow"}


@dataclass(frozen=True)
class HubDataset:
    """Tasks from a dataset of the Hugging Face Hub, a local folder or a local file.

    Columns are named by dotted paths: ``reward_model.ground_truth`` goes into a struct,
    ``prompt.0.content`` into the first item of a list. A context that is a list of texts (sessions)
    becomes the stream's pieces, a text becomes a stream of one piece.
    """

    path: str
    """``OWNER/NAME`` on the Hub, a folder (data files, or one written by ``save_to_disk``), or one file
    (.parquet, .json, .jsonl, .csv, .arrow)."""
    name: str | None = None
    """Configuration of the dataset. Absent: its only one."""
    revision: str | None = None
    """Branch, tag or commit on the Hub. Absent: the newest, which may change under you."""
    train_split: str | None = "train"
    """Name of the training split, or a slice of one such as ``train[:90%]``."""
    test_split: str | None = "test"
    """Name of the held-out split. ``train[90%:]`` where a dataset has only one. A dataset of one file has
    one split, called ``train``."""
    train_files: str | list[str] | None = None
    """Only these files of the dataset are the training split (globs allowed). Absent: `train_split` decides."""
    test_files: str | list[str] | None = None
    """Only these files of the dataset are the held-out split."""
    columns: dict[str, str] = field(default_factory=dict)
    """Where `context`, `question` and `answers` stand. Absent keys: context, input, answers."""
    match: Match = Match.ANY
    """Several answers are aliases (``any``), or parts that are all required (``all``)."""

    def __post_init__(self) -> None:
        for key in self.columns:
            if key not in _COLUMNS:
                raise RecipeError(f"environment.columns.{key}: unknown key", "", nearest(key, list(_COLUMNS)))

    def tasks(self, split: Split, count: int | None = None) -> Sequence[Task]:
        """The first `count` rows (None: all, and all there are when they are fewer).

        Raises:
            RecipeError: the recipe names no such split.
            DataError: the dataset cannot be loaded, lacks a column, or some of its rows are bad.
        """
        data = self._load(split)
        source = f"{self.path} ({split})"
        if len(data) == 0:
            raise DataError(f"{source}: no tasks", "the dataset is empty", "choose another split")
        paths = {**_COLUMNS, **self.columns}
        for key, path in paths.items():
            if not _has(data.features, path):
                known = _names(data.features)
                close = difflib.get_close_matches(path, known, n=3, cutoff=0.5)
                raise DataError(
                    f"{source}: no column '{path}'",
                    f"its columns are {', '.join(known)}",
                    f"set environment.columns.{key}" + (f", e.g. to {' or '.join(close)}" if close else ""),
                )
        size = len(data) if count is None else min(count, len(data))
        rows = ((f"{source} row {number + 1}", data[number]) for number in range(size))
        return collect(rows, partial(self._task, paths=paths), source)

    def _task(self, where: str, row: Row, paths: dict[str, str]) -> Task:
        used = {path.split(".")[0] for path in paths.values()} | set(paths.values())
        return row_task(
            where,
            context=_dig(row, paths["context"]),
            question=_dig(row, paths["question"]),
            answers=_dig(row, paths["answers"]),
            match=self.match,
            columns={key: value for key, value in row.items() if key not in used},
        )

    def _load(self, split: Split) -> Any:
        chosen = self.train_split if split == Split.TRAIN else self.test_split
        files: Any = self.train_files if split == Split.TRAIN else self.test_files
        source = f"{self.path} ({split})"
        if chosen is None and files is None:
            raise RecipeError(f"environment.{split}_split: missing", "", f"name the split to use for {split}")
        try:
            import datasets
        except ImportError as error:
            raise EngineError(self.path, "reading it needs `datasets`", "pip install 'memfactory[train]'") from error
        local = Path(self.path).expanduser()
        with boundary(DataError, f"{source} cannot be loaded", "check path, configuration, split and network"):
            if local.is_dir() and any((local / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
                saved = datasets.load_from_disk(str(local))
                # a dataset saved without splits is `train`, so it cannot silently be the test set as well
                splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
                if chosen not in splits:
                    raise DataError(source, f"no split '{chosen}'", f"its splits are {', '.join(splits)}")
                return splits[chosen]
            if local.is_file() and local.suffix.lower() in _BUILDERS:
                return datasets.load_dataset(_BUILDERS[local.suffix.lower()], data_files=str(local), split=chosen)
            path = str(local) if local.is_dir() else self.path
            if files is not None:
                chosen, files = str(split), {str(split): files}
            return datasets.load_dataset(path, self.name, data_files=files, split=chosen, revision=self.revision)


def _dig(row: Any, path: str) -> Any:
    """The value at the dotted `path`, None where it leads nowhere."""
    if isinstance(row, dict) and path in row:
        return row[path]
    value = row
    for part in path.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def _has(features: Any, path: str) -> bool:
    """Whether a column stands at the dotted `path` of a dataset's `features`."""
    if path in features:
        return True
    node = features
    for part in path.split("."):
        if isinstance(node, dict):
            if part not in node:
                return False
            node = node[part]
        elif isinstance(node, list) or hasattr(node, "feature"):
            if not part.isdigit():
                return False
            node = node[0] if isinstance(node, list) else node.feature
        else:
            # `datasets` gives columns of free JSON no inner types; the rows will tell
            return type(node).__name__ == "Json"
    return True


def _names(features: Any, prefix: str = "") -> list[str]:
    """Dotted names of all columns, those inside structs included."""
    names = []
    for key, node in features.items():
        names += _names(node, f"{prefix}{key}.") if isinstance(node, dict) and node else [f"{prefix}{key}"]
    return names

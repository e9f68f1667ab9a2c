"""Data files of MemFactory and MemAgent: a long document, a question and its answers in each row."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from memfactory.environments.base import Split
from memfactory.environments.rows import Match, Row, collect, row_task
from memfactory.episode import Task
from memfactory.errors import DataError, EngineError, RecipeError, boundary

Paths = str | list[str] | None
Rows = Iterator[tuple[str, Row | DataError]]

_HUB = "hf://datasets/"


@dataclass(frozen=True)
class LongContextFiles:
    """Tasks from JSON, JSON Lines and Parquet files. Each document becomes a stream of one piece,
    which the agent cuts by tokens (``agent.chunk_tokens``).

    The form of a row is seen from its columns:

    - ``context``, ``input``, ``answers``: MemFactory's. `answers` is a text or a list of aliases; all
      aliases are kept in ``Probe.answers``.
    - ``context``, ``input``, ``outputs``: RULER's, as in MemAgent's ``eval_fwe_16384.json``. `outputs`
      lists the parts of one answer (the three most frequent words), not aliases. ``Probe.answers``
      then holds one canonical answer, the parts joined by ", ", ``metadata["match"]`` is ``all`` and
      ``metadata["required"]`` lists the parts, for rewards that look for each of them.
    - ``context``, ``prompt``, ``reward_model.ground_truth``, ``extra_info.question``: MemAgent's. The
      question is ``extra_info.question``, or else the last user message of `prompt`.

    A task's id is a hash of its document and question, so rows that stand in both splits are found by
    :func:`memfactory.environments.overlap.check_disjoint`. ``metadata["source"]`` names file and row;
    lines and rows are counted from 1.
    """

    train: Paths = None
    """File or files of the training split, read in this order: a path from where the command runs, or
    ``hf://datasets/OWNER/NAME/FILE`` (``OWNER/NAME@REVISION`` pins a version). Absent: no such split."""
    test: Paths = None
    """File or files of the held-out split."""
    outputs_match: Match = Match.ALL
    """What several `outputs` mean. ``any`` for RULER's question answering files, where they are aliases."""

    def __post_init__(self) -> None:
        if not self.train and not self.test:
            raise RecipeError(
                "environment files",
                "neither `train` nor `test` names a file",
                "e.g. train: data/samples/memfactory.json",
            )

    def tasks(self, split: Split, count: int | None = None) -> Sequence[Task]:
        """The first `count` rows (None: all, and all there are when they are fewer).

        Rows after the `count`-th are not looked at, so a few tasks of a large Parquet or JSON Lines
        file come quickly. A JSON list is always read whole.

        Raises:
            RecipeError: the recipe names no file for `split`.
            DataError: a file is missing or unreadable, holds no rows, or some rows are bad; all bad
                rows are reported together, with file and line or row.
        """
        paths = self.train if split == Split.TRAIN else self.test
        if not paths:
            raise RecipeError(
                f"environment.{split}: missing", f"no file for the {split} split", f"add `{split}: PATH`"
            )
        names = [paths] if isinstance(paths, str) else list(paths)
        files = [read_rows(name) for name in names]  # all must exist, also those that `count` leaves unread
        return collect(islice(chain.from_iterable(files), count), self._task, ", ".join(names))

    def _task(self, where: str, row: Row) -> Task:
        chat = "reward_model" in row
        gold = "outputs" if "outputs" in row and "answers" not in row else "answers"
        missing = [name for name in (["context"] if chat else ["context", "input", gold]) if name not in row]
        if missing:
            raise DataError(
                where,
                f"it has no {', no '.join(missing)}; its columns are {', '.join(map(str, row)) or '(none)'}",
                "rename the columns to context, input and answers, or use `environment.name: hub` with `columns`",
            )
        if chat:
            question = _dig(row, "extra_info", "question") or _question_in(row.get("prompt"))
            answers, match = _dig(row, "reward_model", "ground_truth"), Match.ANY
        else:
            question, answers = row["input"], row[gold]
            match = self.outputs_match if gold == "outputs" else Match.ANY
        used = {"context", "input", "answers", "outputs", "prompt", "reward_model", "extra_info"}
        others = {key: value for key, value in row.items() if key not in used}
        extra = row.get("extra_info")
        others |= extra if isinstance(extra, dict) else {}
        others.pop("question", None)
        return row_task(where, context=row["context"], question=question, answers=answers, match=match, columns=others)


def read_rows(name: str) -> Rows:
    """Rows of one file with their place in it, or the error met in their stead.

    Raises:
        DataError: there is no such file, it is of an unknown kind, or it cannot be read at all.
    """
    path = _local(name)
    if not path.is_file():
        why = "it is a folder" if path.is_dir() else f"no such file (looked in {path.absolute().parent})"
        raise DataError(name, why, "check the path; it is taken from the folder where the command runs")
    match path.suffix.lower():
        case ".parquet":
            return _parquet_rows(path)
        case ".jsonl" | ".ndjson":
            return _json_lines(path)
        case ".json":
            return _json_rows(path)
        case suffix:
            raise DataError(name, f"files of kind '{suffix}' are not known", "use .json, .jsonl or .parquet")


def _local(name: str) -> Path:
    """The path behind `name`, downloaded from the Hub (once, into its cache) when it starts with ``hf://``."""
    if not name.startswith(_HUB):
        return Path(name).expanduser()
    owner, _, rest = name.removeprefix(_HUB).partition("/")
    dataset, _, file = rest.partition("/")
    if not owner or not dataset or not file:
        raise DataError(name, "not of the form hf://datasets/OWNER/NAME/FILE", "name one file of the dataset")
    dataset, _, revision = dataset.partition("@")
    with boundary(DataError, name, "download the file by hand and give its local path, or check name and network"):
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(f"{owner}/{dataset}", file, repo_type="dataset", revision=revision or None))


def _json_rows(path: Path) -> Rows:
    with boundary(DataError, str(path), "save it as UTF-8"):
        text = path.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        # one row per line under the name .json, as the Hub has many
        yield from _json_lines(path)
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path} line {error.lineno} column {error.colno}", f"not valid JSON, {error.msg}") from error
    for number, row in enumerate(rows, 1):
        where = f"{path} row {number}"
        yield where, row if isinstance(row, dict) else _not_a_row(where, row)


def _json_lines(path: Path) -> Rows:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                why = getattr(error, "msg", None) or str(error)
                yield where, DataError(where, f"not valid JSON, {why}", "each line must be one row: {...}")
            else:
                yield where, row if isinstance(row, dict) else _not_a_row(where, row)


def _parquet_rows(path: Path) -> Rows:
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise EngineError(str(path), "reading Parquet needs pyarrow", "pip install 'memfactory[train]'") from error
    number = 0
    with boundary(DataError, str(path), "is it a Parquet file, and whole?"), pq.ParquetFile(path) as file:
        # documents are long: a few rows at a time keep memory small when only some are wanted
        for batch in file.iter_batches(batch_size=16):
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", row


def _not_a_row(where: str, value: Any) -> DataError:
    return DataError(where, f"a {type(value).__name__}, not a row", "each row must be a mapping of columns: {...}")


def _dig(row: Row, *keys: str) -> Any:
    value: Any = row
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _question_in(prompt: Any) -> Any:
    """The question in a chat prompt: its last user message. A prompt that is text is the question."""
    if isinstance(prompt, list):
        said = [m.get("content") for m in prompt if isinstance(m, dict) and m.get("role", "user") == "user"]
        return said[-1] if said else None
    return prompt

"""From rows of a dataset to tasks: shared by every environment that reads rows."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from enum import StrEnum
from typing import Any

from memfactory.episode import Probe, Task
from memfactory.errors import DataError

Row = dict[str, Any]
Convert = Callable[[str, Row], Task]

_MOST_SHOWN = 20
"""Bad rows listed in one error; the others are counted."""


class Match(StrEnum):
    """What several gold answers of one question mean."""

    ANY = "any"
    """They are aliases: one of them suffices."""
    ALL = "all"
    """They are parts: an answer needs every one of them, in any order."""


def content_id(stream: Iterable[str], question: str) -> str:
    """16 hex digits that depend on question and document alone, so the same row has the same id in
    every file and split, and an overlap of train and test shows."""
    digest = hashlib.sha256(question.encode())
    for piece in stream:
        # a length in front of every piece keeps ("ab", "c") and ("a", "bc") apart
        digest.update(f"\0{len(piece)}\0".encode())
        digest.update(piece.encode())
    return digest.hexdigest()[:16]


def row_task(
    where: str, *, context: Any, question: Any, answers: Any, match: Match, columns: dict[str, Any] | None = None
) -> Task:
    """One question about one document.

    Args:
        where: names the row in errors and in ``metadata["source"]``, e.g. ``eval_50.json row 3``.
        context: the document as text, or a list of texts (sessions), which become the stream's pieces.
        answers: a text, a number, or a list of them.
        match: under ``any`` the answers are aliases and all of them stand in ``Probe.answers``. Under
            ``all`` they are parts of one answer: ``Probe.answers`` holds one canonical answer, the parts
            joined by ", ", and ``metadata["required"]`` lists them for rewards that look for each part
            on its own.
        columns: further columns; plain values (text, numbers, booleans) go to ``metadata["columns"]``.

    Raises:
        DataError: context, question or answers are missing or not of the kind above.
    """
    stream = _stream(where, context)
    if not isinstance(question, str) or not question.strip():
        raise DataError(where, f"no question (got {_shown(question)})", "give the row a question")
    gold = _answers(where, answers)
    metadata: dict[str, Any] = {"source": where, "match": str(match)}
    if match == Match.ALL:
        metadata["required"] = list(gold)
        gold = (", ".join(gold),)
    metadata["columns"] = {
        key: value for key, value in (columns or {}).items() if isinstance(value, str | int | float)
    }
    return Task(content_id(stream, question), stream, (Probe(question, gold),), metadata)


def collect(rows: Iterable[tuple[str, Row | DataError]], convert: Convert, source: str) -> list[Task]:
    """Convert every row. Rows with equal content get the ids ``ID``, ``ID-2``, ``ID-3`` ...

    Args:
        rows: where the row stands, and the row or the error met while reading it.
        convert: makes a task of a row, raising DataError when it cannot.
        source: names all the rows together in errors.

    Raises:
        DataError: one or more rows are bad (the first 20 are listed, all are counted), or there are none.
    """
    tasks: list[Task] = []
    bad: list[DataError] = []
    seen: Counter[str] = Counter()
    for where, row in rows:
        try:
            if isinstance(row, DataError):
                raise row
            task = convert(where, row)
        except DataError as error:
            bad.append(error)
            continue
        seen[task.id] += 1
        tasks.append(task if seen[task.id] == 1 else replace(task, id=f"{task.id}-{seen[task.id]}"))
    if len(bad) == 1:
        raise bad[0]
    if bad:
        lines = [f"\n  - {str(error).replace(chr(10), chr(10) + '  ')}" for error in bad[:_MOST_SHOWN]]
        if len(bad) > _MOST_SHOWN:
            lines.append(f"\n  - and {len(bad) - _MOST_SHOWN} more")
        raise DataError(f"{source}: {len(bad)} of {len(bad) + len(tasks)} rows cannot become tasks", "".join(lines))
    if not tasks:
        raise DataError(f"{source}: no tasks", "it holds no rows", "point the recipe to a file with at least one row")
    return tasks


def _stream(where: str, context: Any) -> tuple[str, ...]:
    pieces = context if isinstance(context, list) else [context]
    if not pieces or not all(isinstance(piece, str) and piece.strip() for piece in pieces):
        fix = "the context must be a text, or a list of texts"
        if isinstance(context, list) and any(isinstance(piece, int) for piece in context):
            fix = (
                "the numbers look like document indices (MemAgent's qa_1/qa_2 files); put the documents in their place"
            )
        raise DataError(where, f"no context (got {_shown(context)})", fix)
    return tuple(pieces)


def _answers(where: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, dict):
        raise DataError(
            where,
            f"the answers are a mapping with keys {', '.join(map(str, value))}",
            "name the key that holds the text",
        )
    items = value if isinstance(value, list) else [value]
    texts = [str(item) if isinstance(item, int | float) and not isinstance(item, bool) else item for item in items]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise DataError(
            where, f"no answer (got {_shown(value)})", "give a text or a list of texts, none of them empty"
        )
    return tuple(dict.fromkeys(texts))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

"""Bank files of MemFactory: one step of a memory manager in each row.

A row holds the bank as it is, what was newly said, and a question that the bank should answer afterwards. In
MemFactory's short names: ``M`` (or ``memory``), ``f`` (``fact``), ``q`` (``query``), ``a`` (``answer``), and
``context_memory``. No such file is published; the names are those that MemFactory's code reads.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from memfactory.environments.base import Split
from memfactory.environments.dialogue_files import gold_text, tasks_of
from memfactory.environments.rows import Row, content_id
from memfactory.episode import Probe, Task
from memfactory.errors import DataError

NAMES = {"memory": "M", "fact": "f", "query": "q", "answer": "a"}
"""Long and short name of each column; a row may use either."""

SOURCE = "write rows with `memory`, `fact`, `query`, `answer` and perhaps `context_memory`, as JSON or JSON Lines"

_TEXT_KEYS = ("text", "memory", "content", "fact", "value")
_ID_KEYS = ("id", "memory_id", "key")


@dataclass(frozen=True)
class BankFiles:
    """One task for each row: the new facts are the stream (one chunk each), the question is the probe.

    ``metadata["memory"]`` is the bank before the step, a list of ``{"id", "text"}``, for agents that begin with a
    filled bank; entries without an id are numbered ``m1``, ``m2`` ... ``metadata["context_memory"]`` is the same for
    the row's ``context_memory``: what else the answer may need.
    """

    train: str = ""
    """File of the training split, JSON or JSON Lines."""
    test: str = ""
    """File of the held-out split."""

    def tasks(self, split: Split, count: int | None = None) -> Sequence[Task]:
        """The first `count` rows of the file of `split`.

        Raises:
            RecipeError: the recipe names no file for `split`.
            DataError: the file is missing, or rows are wrong (file and row or line are named).
        """
        return tasks_of(split, self.train, self.test, count, SOURCE, _task)


def _task(where: str, row: Row) -> Task:
    memory = entries(f"{where} memory", _column(where, row, "memory", default=[]))
    facts = _texts(where, "fact", _column(where, row, "fact"))
    asked = _texts(where, "query", _column(where, row, "query"))
    given = _column(where, row, "answer")
    # one question may have a list of aliases; several have one answer, or one list of aliases, each
    golds = [given] if len(asked) == 1 else given
    if not isinstance(golds, list) or len(golds) != len(asked):
        raise DataError(where, f"{len(asked)} queries", "give as many answers, in the same order")
    probes = tuple(Probe(query, _aliases(where, gold)) for query, gold in zip(asked, golds, strict=True))
    context = entries(f"{where} context_memory", row.get("context_memory") or [])
    # the bank is part of the problem: two rows that differ in nothing else are two tasks
    bank = json.dumps([memory, context], ensure_ascii=False)
    return Task(
        id=content_id((bank, *facts), "\n".join(asked)),
        stream=facts,
        probes=probes,
        metadata={"source": where, "memory": memory, "context_memory": context},
    )


def entries(where: str, value: Any) -> list[dict[str, str]]:
    """A bank as a list of ``{"id", "text"}``.

    Args:
        where: names the bank in errors.
        value: a list of texts or of mappings, a mapping of id to text, or one text with an entry on each line.

    Raises:
        DataError: it is none of these, an entry has no text, or two have the same id.
    """
    if isinstance(value, str):
        value = [line.strip() for line in value.splitlines() if line.strip()]
    if isinstance(value, dict):
        value = [{"id": str(id), **_as_mapping(item)} for id, item in value.items()]
    if not isinstance(value, list):
        raise DataError(where, f"a {type(value).__name__}", "give a list of entries, e.g. [{id: m1, text: ...}]")
    found: list[dict[str, str]] = []
    for number, item in enumerate(value, 1):
        item = _as_mapping(item)
        text = next((item[key] for key in _TEXT_KEYS if isinstance(item.get(key), str)), "")
        if not text.strip():
            raise DataError(f"{where} entry {number}", "it has no text", f"name the text {' or '.join(_TEXT_KEYS)}")
        id = next((str(item[key]) for key in _ID_KEYS if item.get(key) is not None), f"m{number}")
        found.append({"id": id, "text": text})
    ids = [entry["id"] for entry in found]
    twice = sorted({id for id in ids if ids.count(id) > 1})
    if twice:
        raise DataError(where, f"id {', '.join(twice)} more than once", "give each entry an id of its own")
    return found


def _as_mapping(item: Any) -> Row:
    return item if isinstance(item, dict) else {"text": item}


def _column(where: str, row: Row, name: str, default: Any = None) -> Any:
    short = NAMES[name]
    if name in row and short in row:
        raise DataError(where, f"both `{name}` and `{short}`", "keep one of them")
    value = row.get(name, row.get(short, default))
    if value is None:
        columns = ", ".join(map(str, row)) or "none"
        raise DataError(where, f"no `{name}` and no `{short}`; its columns are {columns}", SOURCE)
    return value


def _texts(where: str, name: str, value: Any) -> tuple[str, ...]:
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise DataError(where, f"`{name}` is not a text", "give a text, or a list of texts, none of them empty")
    return tuple(texts)


def _aliases(where: str, gold: Any) -> tuple[str, ...]:
    golds = gold if isinstance(gold, list) and gold else [gold]
    return tuple(dict.fromkeys(gold_text(where, item) for item in golds))

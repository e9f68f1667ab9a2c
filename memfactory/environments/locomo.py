"""LoCoMo: long conversations of two people over many sessions, with questions about them.

Maharana et al., ACL 2024 (arXiv 2402.17753). The data is CC BY-NC 4.0, so it does not come with MemFactory: get
``data/locomo10.json`` from the authors' repository (snap-research/LoCoMo) and name it in the recipe.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from memfactory.environments.base import Split
from memfactory.environments.dialogue_files import gold_text, need, read_records
from memfactory.environments.dialogue_sessions import NO_INFORMATION, Said, Session, evidence_of
from memfactory.environments.rows import Row, collect
from memfactory.episode import Probe, Task
from memfactory.errors import DataError, RecipeError

CATEGORIES = {"1": "multi-hop", "2": "temporal", "3": "open-domain", "4": "single-hop", "5": "adversarial"}
"""Official names of the raw ids that `Probe.category` holds. Scores are reported by id, because several published
tables have the names permuted (see :mod:`memfactory.evaluate.categories`)."""

ADVERSARIAL = "5"

QUESTIONS = {
    "conv-26": 152,
    "conv-30": 81,
    "conv-41": 152,
    "conv-42": 199,
    "conv-43": 178,
    "conv-44": 123,
    "conv-47": 150,
    "conv-48": 191,
    "conv-49": 156,
    "conv-50": 158,
}
"""Questions of each conversation in the published file, without the adversarial ones: 1540 in all."""

SOURCE = (
    "download data/locomo10.json of github.com/snap-research/LoCoMo (licence CC BY-NC 4.0: no commercial use) "
    "and set environment.path to it"
)

_TURN_ID = re.compile(r"D:?(\d+):(\d+)")
_SESSION = re.compile(r"session_(\d+)")


@dataclass(frozen=True)
class LoCoMo:
    """Conversations as tasks: a session is a chunk, a question is a probe asked after the last session.

    The default split is Memory-R1's (arXiv 2508.19828), by whole conversations: conv-26 to train (152 questions),
    conv-30 for development (81), the other eight to test (1307), without the adversarial ones.

    ``metadata["sessions"]`` has time and speakers of each session; ``metadata["probes"]``, parallel to
    ``Task.probes``, has the official name of the category and the evidence ids that name no turn (the published
    file has a few).
    """

    path: str = ""
    """The file ``locomo10.json``, or one of the same form."""
    train: list[str] = field(default_factory=lambda: ["conv-26"])
    """Conversations to train on, by ``sample_id``."""
    dev: list[str] = field(default_factory=lambda: ["conv-30"])
    """Conversations of neither split. To evaluate on them, name them in `test` and give another list here."""
    test: list[str] | None = None
    """Conversations to test on; absent: all that are in neither `train` nor `dev`."""
    adversarial: bool = False
    """Also ask the questions of category 5, whose answer is that the conversation does not say. The wrong answer
    that the dataset offers is in ``metadata["probes"][i]["adversarial_answer"]``. Two of them have an ``answer`` too,
    which the official evaluation ignores and so do we; it is kept beside it as ``answer``."""
    per_question: bool = False
    """One task for each question, for agents that read the question before the document; else one task for each
    conversation with all its questions."""

    def __post_init__(self) -> None:
        named = [*self.train, *self.dev, *(self.test or [])]
        twice = sorted({name for name in named if named.count(name) > 1})
        if twice:
            raise RecipeError(
                "environment locomo",
                f"{', '.join(twice)} named more than once in train, dev and test",
                "name each conversation in one of them",
            )

    def tasks(self, split: Split, count: int | None = None) -> Sequence[Task]:
        """The first `count` tasks of `split`, in the order of the file.

        Raises:
            DataError: the file is missing or wrong (conversation and question are named), or lacks a conversation
                that the recipe names.
        """
        rows = [(self._where(where, row), row) for where, row in read_records(self.path, "path", SOURCE)]
        present = [str(row.get("sample_id")) for _, row in rows if isinstance(row, dict)]
        broken = len(present) < len(rows)  # then say what is wrong with them rather than that one is missing
        for name in (self.train if split == Split.TRAIN else self.test) or []:
            if name not in present and not broken:
                known = f"the file has {', '.join(present)}"
                raise DataError(self.path, f"no conversation '{name}'", f"name it in environment.{split}: {known}")
        if split == Split.TRAIN:
            wanted = set(self.train)
        else:
            wanted = set(present) - set(self.train) - set(self.dev) if self.test is None else set(self.test)
        chosen = [
            (where, row) for where, row in rows if isinstance(row, DataError) or str(row.get("sample_id")) in wanted
        ]
        if not chosen:
            raise DataError(self.path, f"no conversation for the {split} split", f"name some in environment.{split}")
        tasks: list[Task] = collect(chosen, self._task, self.path)
        if self.per_question:
            tasks = [single for task in tasks for single in questions(task)]
        return tasks[:count]

    @staticmethod
    def _where(where: str, row: Row | DataError) -> str:
        return f"{where} ({row['sample_id']})" if isinstance(row, dict) and row.get("sample_id") else where

    def _task(self, where: str, row: Row) -> Task:
        name = need(where, row, "sample_id", str, "the conversation's name, e.g. conv-26")
        sessions = list(_sessions(where, need(where, row, "conversation", dict)))
        if not sessions:
            raise DataError(where, "no sessions", "`conversation` must hold lists `session_1`, `session_2`, ...")
        probes: list[Probe] = []
        notes: list[dict[str, Any]] = []
        for number, item in enumerate(need(where, row, "qa", list), 1):
            probe, note = _probe(f"{where} question {number}", item, sessions)
            if probe.category != ADVERSARIAL or self.adversarial:
                probes.append(probe)
                notes.append({"number": number, **note})
        if not probes:
            raise DataError(where, "no questions but adversarial ones", "set environment.adversarial: true")
        return Task(
            id=name,
            stream=tuple(session.text for session in sessions),
            probes=tuple(probes),
            metadata={
                "source": where,
                "conversation": name,
                "sessions": [session.record() for session in sessions],
                "probes": notes,
            },
        )


def questions(task: Task) -> Iterator[Task]:
    """One task for each probe of `task`, called ``ID/NUMBER`` by the question's number in the file."""
    for probe, note in zip(task.probes, task.metadata["probes"], strict=True):
        yield replace(
            task,
            id=f"{task.id}/{note['number']}",
            probes=(probe,),
            metadata={**task.metadata, "probes": [note]},
        )


def _sessions(where: str, conversation: Row) -> Iterator[Session]:
    """Sessions that were held, in order. The published file dates some that have no turns."""
    numbers = sorted(int(match[1]) for key in conversation if (match := _SESSION.fullmatch(key)))
    for number in numbers:
        turns = conversation[f"session_{number}"]
        here = f"{where} session_{number}"
        if not isinstance(turns, list):
            raise DataError(here, f"a {type(turns).__name__}", "it must be a list of turns")
        if turns:
            when = str(conversation.get(f"session_{number}_date_time") or "")
            yield Session(
                tuple(_said(f"{here} turn {n}", turn) for n, turn in enumerate(turns, 1)), when, f"D{number}"
            )


def _said(where: str, turn: Any) -> Said:
    if not isinstance(turn, dict):
        raise DataError(where, f"a {type(turn).__name__}", "a turn must be a mapping with speaker, dia_id and text")
    caption = turn.get("blip_caption")
    text = turn.get("text") or ""
    if not isinstance(text, str) or not (text.strip() or caption):
        raise DataError(where, "it has no text", "a turn must have a `text`")
    text = " ".join(text.split())  # the published file has turns with line breaks in them
    if caption:  # a picture was sent: the caption is all that a text model can know of it
        text = f"{text} (sends a picture: {caption})".lstrip()
    found = _TURN_ID.search(str(turn.get("dia_id", "")))
    return Said(need(where, turn, "speaker", str), text, _turn_id(found) if found else "")


def _turn_id(match: re.Match[str]) -> str:
    return f"D{int(match[1])}:{int(match[2])}"


def _probe(where: str, item: Any, sessions: Sequence[Session]) -> tuple[Probe, dict[str, Any]]:
    if not isinstance(item, dict):
        raise DataError(
            where, f"a {type(item).__name__}", "a question must be a mapping with question, answer, category"
        )
    question = need(where, item, "question", str)
    category = str(item.get("category"))
    if category not in CATEGORIES:
        raise DataError(where, f"category {item.get('category')!r}", "it must be a number from 1 to 5")
    note: dict[str, Any] = {"category": CATEGORIES[category]}
    if category == ADVERSARIAL:
        answers: tuple[str, ...] = NO_INFORMATION
        note.update({key: item[key] for key in ("adversarial_answer", "answer") if item.get(key) is not None})
    else:
        answers = (gold_text(where, item.get("answer")),)
    # one text of the published file may hold several ids, ids with a leading zero, or no id at all
    written = [str(text) for text in item.get("evidence") or []]
    ids = [_turn_id(match) for text in written for match in _TURN_ID.finditer(text)]
    evidence, missing = evidence_of(sessions, ids)
    missing += [text for text in written if not _TURN_ID.search(text)]
    if missing:
        note["evidence_missing"] = missing
    return Probe(question, answers, evidence, category), note

"""LongMemEval: 500 questions, each with a history of chat sessions between a user and an assistant.

Wu et al., ICLR 2025 (arXiv 2410.10813). The files do not come with MemFactory: get them from the Hub dataset
``xiaowu0162/longmemeval-cleaned`` (its code is MIT; read the page of the data for its terms).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from memfactory.environments.base import Split
from memfactory.environments.dialogue_files import gold_text, need, read_records
from memfactory.environments.dialogue_sessions import NO_INFORMATION, Said, Session, read_time
from memfactory.environments.rows import Row, collect
from memfactory.episode import Evidence, Probe, Task
from memfactory.errors import DataError, RecipeError

TYPES = (
    "single-session-user",
    "single-session-assistant",
    "single-session-preference",
    "multi-session",
    "knowledge-update",
    "temporal-reasoning",
)
"""Values of ``question_type``, kept in `Probe.category`."""

ABSTENTION = "_abs"
"""How the id of a question ends whose answer is not in the history."""

SOURCE = (
    "download longmemeval_oracle.json, longmemeval_s_cleaned.json or longmemeval_m_cleaned.json of the Hub dataset "
    "xiaowu0162/longmemeval-cleaned (see its page for the licence; the code is MIT) and set environment.path to it"
)


@dataclass(frozen=True)
class LongMemEval:
    """One task for each question: a session of the history is a chunk.

    ``metadata`` has ``question_id``, ``question_date``, ``abstention``, ``sessions`` (id and time of each chunk) and
    ``answer_chunks`` (chunks that the dataset says the answer is in). Turns marked ``has_answer`` are the evidence.

    The official evaluation is by a judge. The gold of ``single-session-preference`` is a rubric, and that of an
    abstention question an explanation, so comparing words with them says little.
    """

    path: str = ""
    """One of the three files, which differ in the number of sessions around the evidence."""
    train_percent: int = 0
    """Share of questions to train on, 0 to 100. Which ones follows from their ids alone, so the splits are
    the same in all three files. At 0 the whole file is the test split, as it was published."""
    dated_questions: bool = True
    """Begin each question with the date on which it is asked; many temporal ones cannot be answered without."""
    sort_by_date: bool = True
    """Read the sessions in the order of their dates where all can be read. The oracle file's are not in order."""

    def __post_init__(self) -> None:
        if not 0 <= self.train_percent <= 100:
            raise RecipeError("environment.train_percent", f"got {self.train_percent}", "give a number from 0 to 100")

    def tasks(self, split: Split, count: int | None = None) -> Sequence[Task]:
        """The first `count` questions of `split`, in the order of the file.

        Raises:
            RecipeError: a split is asked for that `train_percent` leaves empty.
            DataError: the file is missing, or questions are wrong (file, row and id are named).
        """
        if self.train_percent == (0 if split == Split.TRAIN else 100):
            raise RecipeError(
                f"environment.train_percent: {self.train_percent}",
                f"it leaves no question for the {split} split",
                "e.g. train_percent: 50",
            )
        chosen: list[tuple[str, Row | DataError]] = []
        for where, row in read_records(self.path, "path", SOURCE):
            if isinstance(row, DataError) or split_of(str(row.get("question_id")), self.train_percent) == split:
                chosen.append((where, row))
            if count is not None and len(chosen) == count:
                break
        return collect(chosen, self._task, self.path)

    def _task(self, where: str, row: Row) -> Task:
        name = need(where, row, "question_id", str)
        where = f"{where} ({name})"
        question = need(where, row, "question", str)
        kind = need(where, row, "question_type", str)
        if kind not in TYPES:
            raise DataError(where, f"question_type '{kind}'", f"known are {', '.join(TYPES)}")
        sessions = list(_sessions(where, row))
        if not sessions:
            raise DataError(where, "`haystack_sessions` holds no turns", "is the download whole?")
        times = [read_time(session.when) for session, _ in sessions]
        if self.sort_by_date and all(times):
            order = sorted(range(len(sessions)), key=lambda n: (times[n], n))
            sessions = [sessions[n] for n in order]
        abstention = name.endswith(ABSTENTION)
        asked = str(row.get("question_date") or "")
        if asked and self.dated_questions:
            question = f"Today is {asked}. {question}"
        gold = gold_text(where, row.get("answer"))
        named = set(map(str, row.get("answer_session_ids") or []))
        return Task(
            id=name,
            stream=tuple(session.text for session, _ in sessions),
            probes=(
                Probe(
                    question,
                    (gold, *NO_INFORMATION) if abstention else (gold,),
                    tuple(Evidence(text, chunk) for chunk, (_, marked) in enumerate(sessions) for text in marked),
                    kind,
                ),
            ),
            metadata={
                "source": where,
                "question_id": name,
                "question_date": asked,
                "abstention": abstention,
                "sessions": [session.record() for session, _ in sessions],
                "answer_chunks": [chunk for chunk, (session, _) in enumerate(sessions) if session.id in named],
            },
        )


def split_of(question_id: str, train_percent: int) -> Split:
    """The split that a question belongs to, by its id alone. A question and its abstention twin stay together."""
    digest = hashlib.sha256(question_id.removesuffix(ABSTENTION).encode()).digest()
    return Split.TRAIN if int.from_bytes(digest[:4], "big") % 100 < train_percent else Split.TEST


def _sessions(where: str, row: Row) -> Iterator[tuple[Session, list[str]]]:
    """Sessions with turns, and the texts in them that are marked as evidence."""
    held = need(where, row, "haystack_sessions", list)
    dates = _parallel(where, row, "haystack_dates", len(held))
    ids = _parallel(where, row, "haystack_session_ids", len(held))
    for number, (turns, date, id) in enumerate(zip(held, dates, ids, strict=True), 1):
        here = f"{where} session {number}"
        if not isinstance(turns, list):
            raise DataError(here, f"a {type(turns).__name__}", "it must be a list of turns")
        said: list[Said] = []
        marked: list[str] = []
        for place, turn in enumerate(turns, 1):
            if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
                raise DataError(f"{here} turn {place}", "it has no `content`", "a turn is {role, content}")
            if not turn["content"].strip():
                continue
            said.append(Said(need(f"{here} turn {place}", turn, "role", str), turn["content"]))
            if turn.get("has_answer"):
                marked.append(turn["content"])
        if said:
            yield Session(tuple(said), date, id), marked


def _parallel(where: str, row: Row, key: str, length: int) -> list[str]:
    """The list ``row[key]`` as texts, one for each session; empty texts where the file has no such list."""
    values: Any = row.get(key)
    if values is None:
        return [""] * length
    if not isinstance(values, list) or len(values) != length:
        got = f"{len(values)} of them" if isinstance(values, list) else f"a {type(values).__name__}"
        raise DataError(where, f"`{key}`: {got} for {length} sessions", "there must be one for each session")
    return [str(value) for value in values]

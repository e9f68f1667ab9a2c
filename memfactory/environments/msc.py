"""MSC, Multi-Session Chat: two people chat in up to five sessions, days apart.

Xu et al., ACL 2022 (arXiv 2107.07567), and the questions that MemGPT (arXiv 2310.08560) wrote for it, "MSC
Self-Instruct". Neither comes with MemFactory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from memfactory.environments.base import Split
from memfactory.environments.dialogue_files import gold_text, need, tasks_of
from memfactory.environments.dialogue_sessions import Said, Session
from memfactory.environments.rows import Row, content_id
from memfactory.episode import Probe, Task
from memfactory.errors import DataError

SOURCE = (
    "MSC comes with ParlAI (parl.ai/projects/msc, files msc_dialogue/session_N/train.txt and so on), its questions "
    "are the Hub dataset MemGPT/MSC-Self-Instruct; read their pages for the licences, then set environment.train "
    "or environment.test to a file"
)

QUESTION = "question"
REPLY = "reply"
_SPEAKERS = ("Speaker 1", "Speaker 2")


@dataclass(frozen=True)
class MultiSessionChat:
    """One task for each row of the files; the form of a row is seen from its columns.

    - With ``self_instruct`` (``B`` asks, ``A`` answers): the sessions of ``previous_dialogs`` and the last one in
      ``dialog`` are the chunks, the question is the probe. `Probe.category` is ``question``.
    - Without: the sessions of ``previous_dialogs`` are the chunks and the probe asks for the last utterance of
      ``dialog``, after the ones before it. `Probe.category` is ``reply``; score it by similarity, not exact match.

    ``metadata["personas"]`` has the persona lines of both speakers where the file has them; they are never shown.
    """

    train: str = ""
    """File of the training split, JSON or one row a line under any name (ParlAI's end in ``.txt``)."""
    test: str = ""
    """File of the held-out split."""

    def tasks(self, split: Split, count: int | None = None) -> Sequence[Task]:
        """The first `count` rows of the file of `split`.

        Raises:
            RecipeError: the recipe names no file for `split`.
            DataError: the file is missing, or rows are wrong (file and line are named).
        """
        return tasks_of(split, self.train, self.test, count, SOURCE, _task)


def _task(where: str, row: Row) -> Task:
    previous = row.get("previous_dialogs") or []
    if not isinstance(previous, list):
        raise DataError(where, "`previous_dialogs` is not a list", "it must hold the earlier sessions")
    sessions = [_session(f"{where} previous dialog {n}", item) for n, item in enumerate(previous, 1)]
    asked = row.get("self_instruct")
    last = _said(where, row.get("dialog"))
    if asked is not None:
        if not isinstance(asked, dict):
            raise DataError(where, "`self_instruct` is not a mapping", "it must be {B: question, A: answer}")
        question = need(where, asked, "B", str, "`self_instruct` must be {B: question, A: answer}")
        answer = gold_text(where, asked.get("A"))
        category = QUESTION
        if last:
            sessions.append(Session(last))
    else:
        if len(last) < 2:
            raise DataError(where, "`dialog` has fewer than two utterances", "it must be a list of {text}")
        so_far = Session(last[:-1]).text
        question = f"The chat goes on:\n{so_far}\nWhat does {last[-1].speaker} say next?"
        answer, category = last[-1].text, REPLY
    if not sessions:
        raise DataError(where, "no earlier session", "rows of session 1 have no history; use a file of session 2 to 5")
    stream = tuple(session.text for session in sessions)
    metadata: dict[str, Any] = {"source": where, "sessions": [session.record() for session in sessions]}
    if isinstance(row.get("personas"), list):
        metadata["personas"] = row["personas"]
    if isinstance(row.get("metadata"), dict):
        metadata["columns"] = {key: value for key, value in row["metadata"].items() if isinstance(value, str | int)}
    return Task(content_id(stream, question), stream, (Probe(question, (answer,), (), category),), metadata)


def _session(where: str, item: Any) -> Session:
    if not isinstance(item, dict):
        raise DataError(where, f"a {type(item).__name__}", "an earlier session must be a mapping with `dialog`")
    when = item.get("time_back") or ""
    if not when and item.get("time_num") is not None:
        when = f"{item['time_num']} {item.get('time_unit', '')}".strip() + " ago"
    said = _said(where, item.get("dialog"))
    if not said:
        raise DataError(where, "`dialog` is empty", "it must be a list of {text}")
    return Session(said, str(when).strip())


def _said(where: str, dialog: Any) -> tuple[Said, ...]:
    if dialog is None:
        return ()
    if not isinstance(dialog, list):
        raise DataError(where, "`dialog` is not a list", "it must be a list of {text}")
    said = []
    for number, turn in enumerate(dialog):
        here = f"{where} utterance {number + 1}"
        if not isinstance(turn, dict):
            raise DataError(here, f"a {type(turn).__name__}", "an utterance must be a mapping with `text`")
        # Earlier sessions name no speaker: they take turns, and Speaker 1 begins. So does one utterance of some last
        # sessions, which has a number in place of the speaker.
        speaker = turn.get("id") if turn.get("id") in _SPEAKERS else _SPEAKERS[number % 2]
        said.append(Said(str(speaker), need(here, turn, "text", str).strip()))
    return tuple(said)

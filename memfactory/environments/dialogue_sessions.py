"""Sessions of a dialogue, and how they become the chunks of a task: shared by every dialogue dataset."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from memfactory.episode import Evidence

NO_INFORMATION = ("No information available", "Not mentioned")
"""Accepted where the dialogue does not say what is asked."""

_TIMES = (
    "%I:%M %p on %d %B, %Y",  # LoCoMo
    "%Y/%m/%d (%a) %H:%M",  # LongMemEval
    "%Y/%m/%d %H:%M",
)


@dataclass(frozen=True, slots=True)
class Said:
    """One utterance."""

    speaker: str
    text: str
    id: str = ""
    """Its name in the dataset; empty where it has none."""


@dataclass(frozen=True, slots=True)
class Session:
    """One sitting of a dialogue. It becomes one chunk of ``Task.stream``."""

    said: tuple[Said, ...]
    when: str = ""
    """When it took place, as the dataset writes it; empty where it does not say."""
    id: str = ""

    @property
    def time(self) -> str:
        """`when` as ISO 8601, or empty where it is no date that we can read."""
        moment = read_time(self.when)
        return moment.isoformat(timespec="minutes") if moment else ""

    @property
    def text(self) -> str:
        """The chunk: when it was, then the utterances, each from a line of its own on, ``SPEAKER: TEXT``."""
        head = [f"[{self.when}]"] if self.when else []
        return "\n".join([*head, *(f"{said.speaker}: {said.text}" for said in self.said)])

    def record(self) -> dict[str, Any]:
        """What ``Task.metadata["sessions"]`` keeps of it."""
        speakers = list(dict.fromkeys(said.speaker for said in self.said))
        return {"id": self.id, "when": self.when, "time": self.time, "speakers": speakers}


def read_time(text: str) -> datetime | None:
    """The moment that `text` names in one of the datasets' ways, or None."""
    for form in _TIMES:
        try:
            return datetime.strptime(" ".join(text.split()), form)
        except ValueError:
            continue
    return None


def evidence_of(sessions: Sequence[Session], ids: Iterable[str]) -> tuple[tuple[Evidence, ...], list[str]]:
    """Evidence for the utterances called `ids`, and the ids that no session holds."""
    where = {said.id: Evidence(said.text, chunk) for chunk, session in enumerate(sessions) for said in session.said}
    ids = list(dict.fromkeys(ids))
    return tuple(where[id] for id in ids if id in where), [id for id in ids if id not in where]

"""The evaluation folder: what was measured, in files that any tool can read.

``evaluation.json`` holds the table with all settings, ``episodes.jsonl`` every episode, ``table.md`` and ``table.csv``
the table for people. The fields are documented in ``docs/evaluation.md``.

``episodes.jsonl`` is also the cache. Every finished episode is a line with a key that says which weights ran which
task under which settings, written as soon as it is done: an evaluation that was killed goes on from there, and one
with another checkpoint or another metric runs only what is new.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memfactory.checkpoints import saving
from memfactory.episode import Episode, Task
from memfactory.errors import DataError
from memfactory.held import held
from memfactory.runs import SCHEMA_VERSION, Record, episode_from_record, episode_record

LONG = 65_536
"""Characters of a stream, or of one message, that are kept; of longer ones, the beginning and the end."""

Place = tuple[str, str, str, str]
"""Candidate, suite, mode and key of a line: no two lines of ``episodes.jsonl`` have the same."""


@dataclass(frozen=True)
class EvalFolder:
    """An evaluation folder at `path`."""

    path: Path

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the folder from a second evaluation.

        Raises:
            RecipeError: another one writes there, or it cannot be made.
        """
        with held(self.path, f"evaluation folder {self.path}", "evaluating", "--output"):
            yield

    @property
    def episodes_file(self) -> Path:
        return self.path / "episodes.jsonl"

    @property
    def evaluation_file(self) -> Path:
        return self.path / "evaluation.json"

    def cached(self) -> dict[Place, Record]:
        """Lines of ``episodes.jsonl``, but for episodes that failed: they are tried again. A torn last line is
        left out, and cut off so that lines can follow.

        Raises:
            DataError: another line is not readable, or of a newer version.
        """
        found: dict[Place, Record] = {}
        if not self.episodes_file.exists():
            return found
        whole = 0
        with self.episodes_file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    record = json.loads(line)
                    newer = record["schema"] > SCHEMA_VERSION
                    if not newer and not record["failed"]:
                        found[place_of(record)] = record
                except (ValueError, LookupError, TypeError) as error:
                    raise DataError(
                        f"{self.episodes_file} line {number}", f"not an episode ({error})", "delete the line"
                    ) from error
                if newer:
                    raise DataError(f"{self.episodes_file} line {number}", "of a newer version", "upgrade memfactory")
                whole += len(line)
        if whole < self.episodes_file.stat().st_size:
            with self.episodes_file.open("r+b") as stream:
                stream.truncate(whole)
        return found

    def append(self, record: Record) -> None:
        """Add one line to ``episodes.jsonl``, at once: a killed process loses at most the one it was writing."""
        with saving(self.episodes_file), self.episodes_file.open("ab") as stream:
            stream.write(_line(record))

    def write(self, records: Iterable[Record], evaluation: Record, tables: dict[str, str]) -> None:
        """Replace everything, each file in one go.

        Args:
            records: all lines of ``episodes.jsonl``.
            evaluation: what ``evaluation.json`` holds.
            tables: text by name of the file.
        """
        with saving(self.path):
            temporary = self.episodes_file.with_suffix(".tmp")
            with temporary.open("wb") as stream:
                for record in records:
                    stream.write(_line(record))
            os.replace(temporary, self.episodes_file)
            told = json.dumps({"schema": SCHEMA_VERSION, **evaluation}, indent=1, allow_nan=False) + "\n"
            for name, text in {**tables, self.evaluation_file.name: told}.items():
                (self.path / f"{name}.tmp").write_text(text, encoding="utf-8", newline="")
                os.replace(self.path / f"{name}.tmp", self.path / name)


def place_of(record: Record) -> Place:
    """Where a line stands in the evaluation. Its key says what was run, and may stand in several places: the same
    weights under two names, a task of two suites."""
    return record["candidate"], record["split"], record["mode"], record["key"]


def key_of(task: Task, *settings: Any) -> str:
    """20 hex digits: of the task's own content and of `settings`, which JSON can hold."""
    probes = [[probe.question, probe.after] for probe in task.probes]
    told = json.dumps([task.id, probes, _plain(task.metadata), settings], sort_keys=True, default=str)
    digest = hashlib.sha256(told.encode())
    for piece in task.stream:
        digest.update(f"\0{len(piece)}\0".encode())
        digest.update(piece.encode("utf-8", "replace"))
    return digest.hexdigest()[:20]


def _plain(metadata: dict[str, Any]) -> dict[str, Any]:
    """What of a task's metadata can change an episode: where its row stands cannot."""
    return {name: value for name, value in metadata.items() if name not in ("source", "columns")}


def to_record(episode: Episode, **place: Any) -> Record:
    """`episode` as a line, with `place` (suite, candidate, mode, sample, key, seconds). Long texts are shortened."""
    record = episode_record(episode, tokens=False)
    record["task"]["stream"] = _short_stream(record["task"]["stream"])
    for turn in record["turns"]:
        turn["messages"] = [
            {**message, "content": _short(message["content"])} if len(message["content"]) > LONG else message
            for message in turn["messages"]
        ]
    return {"schema": SCHEMA_VERSION, "step": 0, **place, **record}


def from_record(record: Record, task: Task) -> Episode:
    """The episode of a line, on the `task` as it is loaded now, without scores."""
    episode = episode_from_record(record)
    episode.task = task
    for number, answer in enumerate(episode.answers):
        answer.probe = task.probes[number]
    episode.scores, episode.reward = {}, None
    for turn in episode.turns:
        turn.scores = {}
    return episode


def _short_stream(stream: list[str]) -> list[str]:
    if sum(map(len, stream)) <= LONG:
        return stream
    each = max(200, LONG // len(stream))
    return [_short(piece, each) for piece in stream]


def _short(text: str, limit: int = LONG) -> str:
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"


def _line(record: Record) -> bytes:
    # pure ASCII: a lone surrogate or a line separator in model text cannot break the file
    return (json.dumps(record, ensure_ascii=True, separators=(",", ":"), default=str) + "\n").encode("ascii")

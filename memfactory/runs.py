"""The run folder: everything that stays of a run, in files that any tool can read.

``recipe.yaml`` says what was asked for, ``metrics.jsonl`` what was measured, ``rewards.jsonl`` what each reward
dimension did, ``episodes.jsonl`` what the agent saw and wrote, ``ledger.jsonl`` what became of each prompt,
``summary.json`` what came out, ``checkpoints/`` what training goes on from. The fields are documented in
``docs/run-folder.md``. Only the main process of a run writes here.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from memfactory.checkpoints import damage, is_written, saving
from memfactory.episode import (
    Answer,
    Choice,
    Episode,
    Evidence,
    Operation,
    Probe,
    Retrieved,
    Score,
    StopReason,
    Task,
    Turn,
)
from memfactory.errors import DataError, EngineError, RecipeError, boundary
from memfactory.held import held
from memfactory.recipe import Recipe

SCHEMA_VERSION = 1
"""Version of every line and file below. It grows when a field changes its meaning or goes away."""

Phase = Literal["warmup", "train", "eval"]
Record = dict[str, Any]
"""One line of a JSON-lines file."""


@dataclass(frozen=True)
class RunFolder:
    """A run folder at `path`. Construct it to read a run; use :meth:`open` to start or continue one."""

    path: Path

    @classmethod
    def open(cls, path: str | Path, recipe: Recipe, *, resume: bool) -> RunFolder:
        """Make the folder and store the resolved recipe in it, or continue the run it holds.

        A continued run first loses the lines written after its newest checkpoint, because training
        will write them again. A folder without a run is started anew also under `resume`, so that a
        job which is restarted automatically can always pass it.

        Raises:
            RecipeError: the folder holds a run and `resume` is false, or holds the run of another
                recipe (the keys that differ are named), or cannot be made.
            EngineError: all its checkpoints are damaged.
        """
        folder = cls(Path(path))
        if not folder.recipe_file.exists():
            with boundary(RecipeError, f"run folder {path} cannot be made", "choose another with output_dir=..."):
                folder.checkpoints.mkdir(parents=True, exist_ok=True)
                stored = yaml.safe_dump(recipe.dump(), sort_keys=False, allow_unicode=True)
                _write_atomically(folder.recipe_file, stored)
            return folder
        if not resume:
            raise RecipeError(f"run folder {path}", "it already holds a run", "output_dir=... for another folder")
        folder.refuse_other(recipe)
        checkpoint, damaged = folder.latest_checkpoint(), folder.damaged_checkpoints()
        if checkpoint is None and damaged:
            raise EngineError(
                f"run folder {path} has no checkpoint to go on from",
                "; ".join(f"{broken.name}: {what}" for broken, what in damaged),
                "put the file back from a backup, or begin anew with --start-over, which sets that run aside",
            )
        folder.truncate_after(checkpoint_step(checkpoint) if checkpoint else -1)
        return folder

    def refuse_other(self, recipe: Recipe) -> None:
        """Fail where the folder holds a run of another recipe.

        Raises:
            RecipeError: it does; the keys that differ are named.
        """
        differences = self.differences(recipe)
        if differences:
            raise RecipeError(
                f"run folder {self.path}",
                f"its run was started from another recipe: {'; '.join(differences)}",
                "go on with the recipe it was started from, or give a new folder with output_dir=..., or use "
                "--start-over, which sets that run aside",
            )

    def differences(self, recipe: Recipe) -> list[str]:
        """What of the stored recipe differs from `recipe`, in words; nothing where there is none."""
        if not self.recipe_file.exists():
            return []
        stored = self.read_recipe()
        with suppress(ValidationError):  # keys that an older version did not know of then have their defaults
            stored = Recipe.model_validate(stored).dump()
        return _differences(stored, recipe.dump())

    def set_aside(self) -> Path | None:
        """Rename the folder, if it holds a run, to the first free ``NAME.1``, ``NAME.2``, ...: where it is now.

        Raises:
            RecipeError: another process is training in it.
        """
        if not self.recipe_file.exists():
            return None
        with self.held():
            number = 1
            while (target := self.path.with_name(f"{self.path.name}.{number}")).exists():
                number += 1
            return self.path.rename(target)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the folder from a second training process; the system lets go of it however the first one ends.

        Raises:
            RecipeError: another process is training in it.
        """
        with held(self.path, f"run folder {self.path}", "training", "output_dir=..."):
            yield

    @property
    def recipe_file(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def episodes_file(self) -> Path:
        return self.path / "episodes.jsonl"

    @property
    def rewards_file(self) -> Path:
        return self.path / "rewards.jsonl"

    @property
    def ledger_file(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def summary_file(self) -> Path:
        return self.path / "summary.json"

    @property
    def checkpoints(self) -> Path:
        """The trainer's own output folder."""
        return self.path / "checkpoints"

    def log_metrics(self, step: int, values: Mapping[str, float | None], *, phase: Phase) -> None:
        """Append one line to ``metrics.jsonl``.

        Args:
            step: optimizer steps done; the first training step is 1, what precedes training is 0.
            values: measurements by name. None, and a number that is not finite, is stored as null.
        """
        numbers = {name: _finite(value) for name, value in values.items()}
        head = {"schema": SCHEMA_VERSION, "step": step, "phase": phase, "time": round(time.time(), 3)}
        _append(self.metrics_file, [{**head, "values": numbers}])

    def log_episodes(self, step: int, split: str, episodes: Iterable[Episode], *, tokens: bool = True) -> None:
        """Append one line per episode to ``episodes.jsonl``.

        Args:
            step: the optimizer step that trains on these episodes (the first is 1), or the optimizer
                steps done before an evaluation.
            split: what they were for: ``train``, ``eval``, ``eval_greedy``, ...
            tokens: also store token ids and log-probabilities, most of the bytes.
        """
        head = {"schema": SCHEMA_VERSION, "step": step, "split": split}
        _append(self.episodes_file, ({**head, **episode_record(episode, tokens=tokens)} for episode in episodes))

    def log_rewards(self, step: int, record: Mapping[str, Any]) -> None:
        """Append one line to ``rewards.jsonl``: what each dimension did in the batch of `step`, and why it failed."""
        _append(self.rewards_file, [_plain({"schema": SCHEMA_VERSION, "step": step, **record})])

    def log_ledger(self, record: Mapping[str, Any]) -> None:
        """Append one line to ``ledger.jsonl``: see :class:`memfactory.train.ledger.Ledger`."""
        _append(self.ledger_file, [{"schema": SCHEMA_VERSION, **record}])

    def read_ledger(self) -> list[Record]:
        """All lines of ``ledger.jsonl``, in the order written."""
        return list(_read(self.ledger_file))

    def read_rewards(self) -> list[Record]:
        """All lines of ``rewards.jsonl``, in the order written."""
        return list(_read(self.rewards_file))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Replace ``summary.json`` in one go: a reader finds the old or the new one, never a part."""
        data = _plain({**summary, "schema": SCHEMA_VERSION})
        _write_atomically(self.summary_file, json.dumps(data, indent=2, default=str) + "\n")

    def read_recipe(self) -> Record:
        """The stored recipe as plain data.

        Raises:
            DataError: there is none, so this is not a run folder, or it is not readable.
        """
        with boundary(DataError, f"{self.path} is no run folder", "give the folder that holds recipe.yaml"):
            data = yaml.safe_load(self.recipe_file.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise DataError(str(self.recipe_file), "not a mapping of sections")
        return data

    def read_summary(self) -> Record:
        """The summary; empty while the run has written none."""
        if not self.summary_file.exists():
            return {}
        with boundary(DataError, f"{self.summary_file} is not readable"):
            data: Record = json.loads(self.summary_file.read_text(encoding="utf-8"))
            return data

    def read_metrics(self) -> list[Record]:
        """All lines of ``metrics.jsonl``, in the order written. A torn last line is skipped."""
        return list(_read(self.metrics_file))

    def read_episodes(
        self, split: str | None = None, step: int | None = None, *, tokens: bool = True
    ) -> Iterator[Record]:
        """Lines of ``episodes.jsonl``, one at a time, because the file can be larger than memory.

        :func:`episode_from_record` makes an :class:`Episode` of one. A torn last line is skipped.

        Args:
            split: only these, if given.
            step: only of this one, if given.
            tokens: also token ids and log-probabilities. Without them a line takes a fraction of the time to read.
        """
        for record in _read(self.episodes_file, without=None if tokens else _TOKENS):
            if (split is None or record["split"] == split) and (step is None or record["step"] == step):
                yield record

    def truncate_after(self, step: int) -> None:
        """Drop the lines of later steps (and a torn last line), so that a resumed run has no duplicates.

        Warm-up counts its own steps and comes before step 1, so its lines stay. A negative `step` means
        that there is nothing to go on from but a warmed-up model, if it was saved, and drops all other lines.
        """
        warm = step >= 0 or (self.path / "initial").is_dir()

        def kept(record: Record) -> bool:
            return warm if record.get("phase") == "warmup" else record["step"] <= step

        for file in (self.metrics_file, self.episodes_file, self.rewards_file, self.ledger_file):
            if file.exists():
                _filter(file, kept)

    def latest_checkpoint(self) -> Path | None:
        """The newest ``checkpoints/checkpoint-N`` that was written to its end and is whole, or None."""
        for checkpoint in sorted(self._checkpoints(), key=checkpoint_step, reverse=True):
            if is_written(checkpoint) and not damage(checkpoint):
                return checkpoint
        return None

    def damaged_checkpoints(self) -> list[tuple[Path, str]]:
        """Checkpoints that were written to their end and are not whole now, oldest first, and what is wrong."""
        written = sorted(filter(is_written, self._checkpoints()), key=checkpoint_step)
        return [(checkpoint, what) for checkpoint in written if (what := damage(checkpoint))]

    def clean_checkpoints(self) -> list[str]:
        """Remove checkpoints that were never written to their end, and rename damaged ones to ``damaged-...``.

        The trainer counts folders by their name when it deletes old checkpoints: these would stand for good ones.

        Returns:
            what was renamed and why, in words.
        """
        told = []
        for checkpoint, what in self.damaged_checkpoints():
            target = checkpoint.with_name(f"damaged-{checkpoint.name}")
            shutil.rmtree(target, ignore_errors=True)
            checkpoint.rename(target)
            told.append(f"{checkpoint} is damaged: {what}; it is now {target.name} and is not used")
        for checkpoint in list(self._checkpoints()):
            if not is_written(checkpoint):
                shutil.rmtree(checkpoint)
        return told

    def _checkpoints(self) -> Iterator[Path]:
        for folder in self.checkpoints.glob("checkpoint-*"):
            if folder.name.removeprefix("checkpoint-").isdecimal():
                yield folder


def checkpoint_step(checkpoint: Path) -> int:
    """Optimizer steps done in the folder ``checkpoint-N``: N."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def episode_record(episode: Episode, *, tokens: bool = True) -> Record:
    """`episode` as plain JSON data; without `tokens`, only their counts are kept."""
    return {
        "id": episode.id,
        "group": episode.group,
        "task": {
            "id": episode.task.id,
            "stream": list(episode.task.stream),
            "probes": [asdict(probe) for probe in episode.task.probes],
            "metadata": episode.task.metadata,
        },
        "turns": [_turn_record(turn, tokens=tokens) for turn in episode.turns],
        "answers": [
            {"probe": asdict(answer.probe), "text": answer.text, "raw": answer.raw, "turn": answer.turn}
            for answer in episode.answers
        ],
        "memory": episode.memory,
        "scores": _scores_record(episode.scores),
        "reward": _finite(episode.reward),
        "advantage": _finite(episode.advantage),
        "failed": episode.failed,
    }


def _scores_record(scores: Mapping[str, Score]) -> Record:
    return {name: {"value": score.value, "reason": score.reason} for name, score in scores.items()}


def _scores(data: Record) -> dict[str, Score]:
    return {name: Score(score["value"], score["reason"]) for name, score in data.items()}


def _turn_record(turn: Turn, *, tokens: bool) -> Record:
    record: Record = {
        "module": turn.module,
        "chunk": turn.chunk,
        "messages": turn.messages,
        "text": turn.text,
        "stop": str(turn.stop),
        "prompt_tokens": turn.tokens[0],
        "completion_tokens": turn.tokens[1],
        "memory_before": turn.memory_before,
        "memory_after": turn.memory_after,
        "error": turn.error,
        "operations": [asdict(operation) for operation in turn.operations],
        "retrieved": [asdict(entry) for entry in turn.retrieved],
        "cited": turn.cited,
        "choice": _choice_record(turn.choice),
        "scores": _scores_record(turn.scores),
        "advantage": _finite(turn.advantage),
        "policy_version": turn.policy_version,
        "trainable": turn.trainable,
        "prefix_key": turn.prefix_key,
    }
    if tokens:
        record["prompt_ids"] = list(turn.prompt_ids)
        record["completion_ids"] = list(turn.completion_ids)
        record["logprobs"] = [_finite(logprob, digits=6) for logprob in turn.logprobs]
    return record


def episode_from_record(record: Record) -> Episode:
    """The episode that :func:`episode_record` stored. Tokens are empty where they were left out.

    Raises:
        DataError: a field is missing or of the wrong kind.
    """
    with boundary(DataError, f"episode {record.get('id', '?')} is not an episode record"):
        task = record["task"]
        return Episode(
            task=Task(task["id"], tuple(task["stream"]), tuple(map(_probe, task["probes"])), task["metadata"]),
            turns=[_turn(turn) for turn in record["turns"]],
            answers=[_answer(answer) for answer in record["answers"]],
            memory=record["memory"],
            id=record["id"],
            group=record["group"],
            scores=_scores(record["scores"]),
            reward=record["reward"],
            advantage=_or_nan(record["advantage"]),
            failed=record.get("failed", ""),  # absent in older records
        )


def _answer(data: Record) -> Answer:
    return Answer(_probe(data["probe"]), data["text"], data["raw"], data.get("turn"))  # absent in older records


def _probe(data: Record) -> Probe:
    evidence = tuple(Evidence(item["text"], item["chunk"]) for item in data["evidence"])
    # the last two are absent in older records
    return Probe(data["question"], tuple(data["answers"]), evidence, data.get("category", ""), data.get("after"))


def _turn(data: Record) -> Turn:
    return Turn(
        module=data["module"],
        prompt_ids=data.get("prompt_ids", []),
        completion_ids=data.get("completion_ids", []),
        logprobs=[_or_nan(logprob) for logprob in data.get("logprobs", [])],
        text=data["text"],
        stop=StopReason(data["stop"]),
        messages=data["messages"],
        policy_version=data["policy_version"],
        trainable=data["trainable"],
        prefix_key=data["prefix_key"],
        chunk=data["chunk"],
        memory_before=data["memory_before"],
        memory_after=data["memory_after"],
        error=data["error"],
        operations=[_operation(operation) for operation in data.get("operations", [])],  # absent in older records
        retrieved=[Retrieved(**entry) for entry in data.get("retrieved", [])],
        cited=data.get("cited", []),
        choice=_choice(data.get("choice")),
        scores=_scores(data.get("scores", {})),
        advantage=_or_nan(data["advantage"]),
        counts=None if "prompt_ids" in data else (data["prompt_tokens"], data["completion_tokens"]),
    )


def _choice_record(choice: Choice | None) -> Record | None:
    """Without its features: they are vectors for one update, and nothing reads them afterwards."""
    if choice is None:
        return None
    drawn = {"candidates": list(choice.candidates), "chosen": list(choice.chosen)}
    return drawn | {"logprob": _finite(choice.logprob, digits=6)}


def _choice(data: Record | None) -> Choice | None:
    if data is None:
        return None
    return Choice(tuple(data["candidates"]), tuple(data["chosen"]), _or_nan(data["logprob"]))


def _operation(data: Record) -> Operation:
    return Operation(**{**data, "tags": tuple(data.get("tags", ()))})


def _finite(value: float | None, digits: int | None = None) -> float | None:
    """`value` as JSON can hold it: NaN and infinities have no JSON and become None."""
    if value is None:
        return None
    number = value if isinstance(value, int) else float(value)  # numpy and torch scalars are not JSON either
    if not math.isfinite(number):
        return None
    return number if digits is None else round(number, digits)


def _plain(data: Any) -> Any:
    """`data` with every number in it that is not finite replaced by None."""
    if isinstance(data, Mapping):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    return _finite(data) if isinstance(data, float) else data


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _append(file: Path, records: Iterable[Record]) -> None:
    with saving(file), file.open("a", encoding="ascii", newline="\n") as stream:
        for record in records:
            # pure ASCII: a lone surrogate or a line separator in model text cannot break the file
            stream.write(json.dumps(record, ensure_ascii=True, separators=(",", ":"), default=str) + "\n")


_TOKENS = re.compile(rb',"(?:prompt_ids|completion_ids|logprobs)":\[[-+0-9.,eEnul]*\]')
"""A list of numbers under one of these names, as :func:`_append` writes it. It cannot stand inside of a text, where a
quotation mark has a backslash before it."""


def _read(file: Path, without: re.Pattern[bytes] | None = None) -> Iterator[Record]:
    """Records of a JSON-lines file; none when the file does not exist.

    Args:
        without: what is cut out of each line before it is parsed.

    Raises:
        DataError: a line other than the last is not JSON, or was written by a newer version.
    """
    if not file.exists():
        return
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                record = json.loads(line if without is None else without.sub(b"", line))
            except ValueError as error:
                if not line.endswith(b"\n"):  # cut off by a kill, or still being written
                    return
                raise DataError(
                    f"{file} line {number}", f"not valid JSON ({error})", "delete the line, or take a backup"
                ) from error
            if record.get("schema", 0) > SCHEMA_VERSION:
                raise DataError(
                    f"{file} line {number}",
                    f"schema {record['schema']} is newer than this version reads ({SCHEMA_VERSION})",
                    "upgrade memfactory",
                )
            yield record


def _filter(file: Path, kept: Callable[[Record], bool]) -> None:
    temporary = file.with_name(file.name + ".tmp")
    temporary.unlink(missing_ok=True)
    _append(temporary, (record for record in _read(file) if kept(record)))
    os.replace(temporary, file)


def _write_atomically(file: Path, text: str) -> None:
    temporary = file.with_name(file.name + ".tmp")
    with saving(file):
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, file)


_PLACES = ("output_dir", "rollout.vllm.")
"""Keys of a recipe that say where a run works or how long it waits, and nothing about what it computes."""


def _differences(stored: Record, given: Record) -> list[str]:
    """``a.b was 1, is 2`` for each key that differs, places aside: a job that is queued again gets other nodes."""
    before, now = flat(stored), flat(given)
    absent = "absent"
    return [
        f"{key} was {before.get(key, absent)}, is {now.get(key, absent)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(_PLACES)
    ]


def flat(data: Any, prefix: str = "") -> dict[str, str]:
    """Leaves of nested mappings and lists, as JSON, by dotted key."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else None
    if not items:
        return {prefix: json.dumps(data, default=str)}
    leaves: dict[str, str] = {}
    for key, value in items:
        leaves.update(flat(value, f"{prefix}.{key}" if prefix else str(key)))
    return leaves

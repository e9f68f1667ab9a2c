"""What a report reads: a run folder or an evaluation folder, checked and brought into one form."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from memfactory.errors import DataError
from memfactory.evaluate.report_numbers import Lines, curves
from memfactory.evaluate.report_rewards import summarise_rewards
from memfactory.runs import SCHEMA_VERSION, Record, RunFolder

JUDGE = "answer.correct_judge"
"""The dimension in which `memfactory eval --judge` puts a judge's verdict on the answers that the metric measures."""


class EvaluationRow(BaseModel):
    """A row of ``evaluation.json``: one candidate on one suite, see ``docs/evaluation.md``."""

    model_config = ConfigDict(extra="ignore")

    suite: str
    candidate: str
    mode: str
    tasks: int
    episodes: int
    failed: int
    faults: dict[str, int] = {}
    """Measurements that failed, by whose fault it was."""
    metric: str
    mean: float | None
    low: float | None
    high: float | None
    samples: int
    pass_at: dict[str, float] = {}
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    tokens: float
    seconds: float
    peak_context: int
    dimensions: dict[str, float | None] = {}
    categories: dict[str, float] = {}
    judge: dict[str, float | None] = {}
    """``mean``, ``disagree`` and ``kappa``; empty where no judge was asked."""


class Evaluation(BaseModel):
    """``evaluation.json``."""

    model_config = ConfigDict(extra="ignore")

    recipe: str
    recipe_hash: str = ""
    seed: int | None = None
    candidates: list[Record] = []
    suites: list[Record] = []
    rows: list[EvaluationRow]
    notes: list[str] = []

    @property
    def judged(self) -> dict[str, str]:
        """By suite that a judge was asked about, the rule that its verdicts stand beside."""
        return {row.suite: row.metric for row in self.rows if row.judge}


@dataclass
class Source:
    """One folder on the page."""

    folder: RunFolder
    """Its episodes lie in the same place for both kinds."""
    kind: Literal["run", "evaluation"]
    name: str
    recipe: Record = field(default_factory=dict)
    summary: Record = field(default_factory=dict)
    metrics: dict[str, Lines] = field(default_factory=lambda: curves([]))
    rewards: Record | None = None
    evaluation: Evaluation | None = None

    @property
    def status(self) -> str:
        """``finished``, ``interrupted``, or ``unfinished`` for a run that has not said how it ended."""
        return str(self.summary.get("stopped") or "unfinished")

    @property
    def seed(self) -> int | None:
        seed: int | None = self.summary.get("seed", self.recipe.get("seed"))
        return seed


def read_source(path: Path) -> Source:
    """What lies in `path`. Works at any time of a run: what has not been written yet is empty.

    Raises:
        DataError: it is neither a run folder nor an evaluation folder, or one of its files is broken.
    """
    folder = RunFolder(path)
    if (path / "evaluation.json").is_file() and not folder.recipe_file.is_file():
        evaluation = read_evaluation(path / "evaluation.json")
        return Source(folder, "evaluation", path.resolve().name, evaluation=evaluation)
    if not folder.recipe_file.is_file():
        raise DataError(
            f"{path} is no run folder and no evaluation folder",
            "neither recipe.yaml nor evaluation.json lies in it" if path.is_dir() else "there is no such folder",
            "give what `memfactory train` or `memfactory eval` has written, e.g. runs/NAME or evals/NAME",
        )
    recipe, summary = folder.read_recipe(), folder.read_summary()
    return Source(
        folder,
        "run",
        str(summary.get("name") or recipe.get("name") or path.resolve().name),
        recipe=recipe,
        summary=summary,
        metrics=curves(folder.read_metrics()),
        rewards=summarise_rewards(folder.read_rewards()),
    )


def read_evaluation(file: Path) -> Evaluation:
    """The evaluation in `file`.

    Raises:
        DataError: it is not readable, of a newer version, or a field is missing or of the wrong kind.
    """
    fix = "write it again with the same `memfactory eval` command: finished episodes are not run again"
    try:
        data: Any = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(data, dict) and data.get("schema", 0) > SCHEMA_VERSION:
            why = f"schema {data['schema']} is newer than this version reads ({SCHEMA_VERSION})"
            raise DataError(str(file), why, "upgrade memfactory")
        return Evaluation.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(f"{file} is no evaluation", f"{place}: {first['msg']}", fix) from error
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{file} is not readable", str(error), fix) from error


def tell_apart(sources: list[Source]) -> None:
    """Name sources of the same name by their folder, and by a number where that is the same too."""
    names = [source.name for source in sources]
    for source in sources:
        if names.count(source.name) > 1:
            source.name = f"{source.name} ({source.folder.path.resolve().name})"
    seen: dict[str, int] = {}
    for source in sources:
        number = seen[source.name] = seen.get(source.name, 0) + 1
        if number > 1:
            source.name = f"{source.name} ({number})"

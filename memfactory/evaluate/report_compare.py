"""Runs beside each other: what differs in their recipes, their results, and points for the Pareto front."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from memfactory.evaluate.report_numbers import duration, results
from memfactory.evaluate.report_source import Source
from memfactory.runs import Record, flat

Values = dict[str, float | None]
_PLACES = ("output_dir", "name")
_COSTS = ("completions/mean_length", "turns/per_episode", "tokens/generated", "tokens/trained")


@dataclass(frozen=True)
class Point:
    """One checkpoint of a run, or one row of an evaluation, in the plane of any two of its values."""

    source: int
    label: str
    among: str
    """Only points of the same kind can be compared: suite and mode, or the evaluations of runs."""
    values: dict[str, float]


def recipe_differences(sources: Sequence[Source]) -> list[tuple[str, list[str]]]:
    """Keys of the resolved recipes that are not the same in all runs, and what each run has there."""
    leaves = [flat(source.recipe) for source in sources if source.kind == "run"]
    keys = dict.fromkeys(key for own in leaves for key in own if not key.startswith(_PLACES))
    rows = [(key, [own.get(key, "") for own in leaves]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def results_beside(sources: Sequence[Source]) -> list[tuple[str, list[str]]]:
    """Rows of a table with a column for each run: numbers before and after, and what it cost."""
    columns: list[dict[str, str]] = []
    for source in sources:
        if source.kind != "run":
            continue
        column: dict[str, str] = {"status": source.status}
        for mode in results(source.summary, source.metrics["eval"])["modes"]:
            for row in mode["rows"]:
                name = "accuracy" if row["name"] == "em" else row["name"]
                column[f"{name}, {mode['mode']}"] = f"{shown_number(row['before'])} → {shown_number(row['after'])}"
        train = source.metrics["train"]
        column["steps"] = str(source.summary.get("steps", train[-1][0] if train else "–"))
        column["wall time"] = duration(source.summary.get("wall_seconds")) or "–"
        columns.append(column)
    names = list(dict.fromkeys(name for column in columns for name in column))
    names.sort(key=lambda name: (name in ("steps", "wall time"), name != "status", "accuracy" not in name))
    return [(name, [column.get(name, "–") for column in columns]) for name in names]


def points(sources: Sequence[Source]) -> list[Record]:
    """Every checkpoint that was evaluated, and every row of an evaluation."""
    found = [point for number, source in enumerate(sources) for point in _points(number, source)]
    return [asdict(point) for point in found if len(point.values) > 1]


def _points(number: int, source: Source) -> Iterable[Point]:
    if source.evaluation is not None:
        for row in source.evaluation.rows:
            # the metric first; the dimension's own mean is over episodes, this one over questions
            values: Values = {row.metric: row.mean, **row.dimensions}
            values[row.metric] = row.dimensions.get(row.metric) if row.mean is None else row.mean
            values |= {f"pass@{k}": value for k, value in row.pass_at.items()}
            costs = {"tokens per episode": row.tokens, "seconds per episode": row.seconds}
            values |= {**costs, "longest context (tokens)": row.peak_context, "failed": row.failed}
            yield Point(number, row.candidate, f"{row.suite}, {row.mode}", _known(values))
        return
    train = source.metrics["train"]
    for step, measured in source.metrics["eval"]:
        values = {name: value for name, value in measured.items() if name != "n"}
        done = [line for at, line in train if at <= step]
        values |= {f"training: {name}": value for name, value in (done[-1] if done else {}).items() if _wanted(name)}
        spent = sum(value or 0 for line in done for name, value in line.items() if name.startswith("time/"))
        yield Point(
            number,
            f"step {step}",
            "evaluations of runs",
            _known({**values, "step": step, "seconds of training": spent}),
        )


def _wanted(name: str) -> bool:
    return name in ("reward", *_COSTS) or (name.startswith("rewards/") and name.endswith(("/mean", "/pass_rate")))


def _known(values: Values) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}


def shown_number(value: float | None) -> str:
    """Three digits, or a dash."""
    return "–" if value is None else f"{value:.3g}"

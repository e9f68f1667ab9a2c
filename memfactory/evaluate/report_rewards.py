"""The rewards of a run for its report: ``rewards.jsonl``, which has a line per logged step, as one small summary."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from memfactory.runs import Record

MAX_DISAGREEMENTS = 20
"""Episodes named over the whole run."""
MATRIX_STEPS = 10
"""Logged steps that the correlations are averaged over: those of one batch are noisy, those of a run mix policies."""
MAX_REASONS = 5
"""Reasons for None named per dimension."""
MAX_EXAMPLES = 5
"""Faults shown, each of another kind."""
MAX_TEXT = 500
"""Longest reason or example: a reason can quote what a model wrote. Unit: characters."""
MAX_TRACEBACK = 4000
"""Longest traceback. Unit: characters."""


def summarise_rewards(lines: Iterable[Record]) -> Record | None:
    """What the page shows of ``rewards.jsonl``; None for a run that has no line of it.

    A step logged twice counts once, the later line.

    Returns:
        steps, the first and the last; dimensions, one row each; correlation; disagreements, the widest first; faults.
    """
    by_step = {line["step"]: line for line in lines}
    ordered = [by_step[step] for step in sorted(by_step)]
    if not ordered:
        return None
    return {
        "steps": [ordered[0]["step"], ordered[-1]["step"]],
        "dimensions": _dimensions(ordered),
        "correlation": _correlation(ordered),
        "disagreements": _disagreements(ordered),
        "faults": _faults(ordered),
    }


def wanted_episodes(rewards: Record | None) -> list[tuple[int, str]]:
    """Step and id of the episodes that the page links to, the most wanted first."""
    return [(item["step"], item["episode"]) for item in rewards["disagreements"]] if rewards else []


def _dimensions(lines: list[Record]) -> list[Record]:
    rows = []
    for name in dict.fromkeys(name for line in lines for name in line.get("dimensions", {})):
        own = [line["dimensions"][name] for line in lines if name in line.get("dimensions", {})]
        first, last = own[0], own[-1]
        reasons: Counter[str] = Counter()
        wording: dict[str, str] = {}
        for summary in own:
            for reason, count in (summary.get("reasons") or {}).items():
                reasons[wording.setdefault(_kind(reason), reason)] += count
        row = {
            "name": name,
            "role": last.get("role"),
            "scope": last.get("scope"),
            "none_share": _mean(summary.get("none_share") for summary in own),
            "reasons": [(_cut(reason), count) for reason, count in reasons.most_common(MAX_REASONS)],
            "more_reasons": max(0, len(reasons) - MAX_REASONS),
        }
        for key in ("weight", "mean", "std", "pass_rate"):
            row[key] = [first.get(key), last.get(key)]
        rows.append(row)
    return rows


def _correlation(lines: list[Record]) -> Record | None:
    """Mean of each cell over the last steps in which it has a value."""
    recent = [line for line in lines if line.get("correlation")][-MATRIX_STEPS:]
    if not recent:
        return None
    names = recent[-1]["correlation"]["names"]
    cells: list[dict[Any, float | None]] = []
    for line in recent:
        own, matrix = line["correlation"]["names"], line["correlation"]["matrix"]
        rows = zip(own, matrix, strict=True)
        cells.append({(a, b): value for a, row in rows for b, value in zip(own, row, strict=True)})
    return {
        "names": names,
        "matrix": [[_mean(step.get((a, b)) for step in cells) for b in names] for a in names],
        "steps": [recent[0]["step"], recent[-1]["step"]],
        "count": len(recent),
    }


def _disagreements(lines: list[Record]) -> list[Record]:
    """The episodes furthest apart over the run, each once."""
    widest: dict[Any, Record] = {}
    for line in lines:
        for number, item in enumerate(line.get("disagreements", [])):
            key = item["episode"] or (line["step"], number)  # without an id it cannot be told to be the same
            if key not in widest or item["gap"] > widest[key]["gap"]:
                widest[key] = {**item, "step": line["step"]}
    return sorted(widest.values(), key=lambda item: -item["gap"])[:MAX_DISAGREEMENTS]


def _faults(lines: list[Record]) -> Record:
    count: Counter[str] = Counter()
    for line in lines:
        count.update(line.get("faults", {}).get("count", {}))
    return {
        "count": dict(count.most_common()),
        "examples": [(step, _cut(text)) for step, text in _kinds(lines, "examples")],
        # what went wrong stands at the end of a traceback
        "tracebacks": [(step, _cut(text, MAX_TRACEBACK, end=True)) for step, text in _kinds(lines, "tracebacks")],
    }


def _kinds(lines: list[Record], key: str) -> Iterator[tuple[int, str]]:
    """The first texts of each kind."""
    seen: set[str] = set()
    for line in lines:
        for text in line.get("faults", {}).get(key, []):
            if _kind(text) in seen:
                continue
            seen.add(_kind(text))
            yield line["step"], text
            if len(seen) == MAX_EXAMPLES:
                return


def _kind(text: str) -> str:
    """`text` without its numbers: one broken function says the same of every episode, but for the episode's id."""
    return re.sub(r"\d+", "", text)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _cut(text: str, limit: int = MAX_TEXT, *, end: bool = False) -> str:
    if len(text) <= limit:
        return text
    return f"…{text[-limit:]}" if end else f"{text[:limit]}…"

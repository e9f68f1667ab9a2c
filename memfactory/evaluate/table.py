"""The table of an evaluation, for people (terminal, Markdown) and for programs (CSV)."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from memfactory.evaluate.failures import by_fault
from memfactory.evaluate.rows import Row


def terminal_table(rows: Sequence[Row], title: str) -> Group:
    """A table for each suite and mode, narrow enough for a terminal of 80 columns."""
    head = [name for name in _head(rows) if name not in (*_SHARED, "context")]
    parts: list[Table | Text] = [Text(title, style="bold")]
    for place in dict.fromkeys((row.suite, row.mode) for row in rows):
        own = [row for row in rows if (row.suite, row.mode) == place]
        first = dict(zip(_SHARED, _cells(own[0], _SHARED), strict=True))
        told = f"{first['suite']}, {first['mode']}: {first['metric']}, {first['tasks']} tasks"
        table = Table(
            title=Text(told), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
        )
        for name in head:
            # an interval stands below its number, and the longest context below all tokens
            told = "tokens\n(context)" if name == "tokens" else name.replace(" [", "\n[")
            table.add_column(told, no_wrap=name != "candidate", overflow="fold")  # its name alone may be broken
        for row in own:
            cells = dict(zip(head, _cells(row, head), strict=True))
            cells["tokens"] += f"\n({row.peak_context})"
            table.add_row(*(Text(cell.replace(" [", "\n[")) for cell in cells.values()))
        parts.append(table)
    return Group(*parts)


def markdown(rows: Sequence[Row], title: str, settings: Sequence[str], notes: Sequence[str]) -> str:
    """The table with what must be known to read it."""
    head = _head(rows)
    lines = [f"# {title}", ""]
    lines += [f"- {setting}" for setting in settings]
    lines += ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in _cells(row, head)) + " |" for row in rows]
    by_category = [row for row in rows if row.categories]
    if by_category:
        names = list(dict.fromkeys(name for row in by_category for name in row.categories))
        lines += ["", "By category, as the dataset numbers it:", ""]
        lines += ["| suite | candidate | mode | " + " | ".join(names) + " |", "|" + "---|" * (3 + len(names))]
        for row in by_category:
            shares = [_number(row.categories.get(name)) for name in names]
            lines.append(f"| {row.suite} | {row.candidate} | {row.mode} | " + " | ".join(shares) + " |")
    lines += ["", *(f"- {note}" for note in notes)] if notes else []
    return "\n".join(lines) + "\n"


def csv_table(rows: Sequence[Row]) -> str:
    """Every number of every row, a column for each."""
    records = []
    for row in rows:
        flat: dict[str, Any] = {}
        for name, value in row.record().items():
            if isinstance(value, dict):
                flat |= {f"{name}/{key}": part for key, part in value.items()}
            else:
                flat[name] = value
        records.append(flat)
    columns = list(dict.fromkeys(name for record in records for name in record))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return stream.getvalue()


def ordered(rows: Sequence[Row]) -> list[Row]:
    """`rows` with those side by side that are compared."""
    places = list(dict.fromkeys((row.suite, row.mode) for row in rows))
    return sorted(rows, key=lambda row: places.index((row.suite, row.mode)))


_ALWAYS = ("suite", "candidate", "mode", "tasks", "metric", "mean [95 %]")
_SHARED = ("suite", "mode", "tasks", "metric")
"""What the rows of one suite and mode have in common."""
_COST = ("tokens", "seconds", "context")


def _head(rows: Sequence[Row]) -> list[str]:
    levels = list(dict.fromkeys(k for row in rows for k in row.pass_at if k != "1"))
    head = [*_ALWAYS, *(f"pass@{k}" for k in sorted(levels, key=int))]
    if any(row.difference is not None for row in rows):
        head.append("to the first [95 %]")
    if any(row.judge for row in rows):
        head += ["judge", "disagree"]
    head += _COST
    if any(row.failed for row in rows):
        head.append("failed")
    return head


def _cells(row: Row, head: Sequence[str]) -> list[str]:
    cells = {
        "suite": row.suite,
        "candidate": row.candidate,
        "mode": f"{row.mode} x {row.samples}" if row.samples > 1 else row.mode,
        "tasks": str(row.tasks),
        "metric": row.metric,
        "mean [95 %]": _with_interval(row.mean, row.low, row.high),
        "to the first [95 %]": _with_interval(row.difference, row.difference_low, row.difference_high, sign=True),
        "judge": _verdicts(row),
        "disagree": _number(row.judge.get("disagree")),
        "tokens": f"{row.tokens:.0f}",
        "seconds": f"{row.seconds:.3g}",
        "context": str(row.peak_context),
        "failed": by_fault(row.failures),
        **{f"pass@{k}": _number(value) for k, value in row.pass_at.items()},
    }
    return [cells.get(name, "") for name in head]


def _with_interval(mean: float | None, low: float | None, high: float | None, *, sign: bool = False) -> str:
    if mean is None:
        return ""
    form = "+.3f" if sign else ".3f"
    return f"{mean:{form}}" if low is None or high is None else f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def _verdicts(row: Row) -> str:
    lost = int(row.judge.get("failed") or 0)
    told = _number(row.judge.get("mean"))
    return " ".join([told] * bool(told) + [f"(failed {lost})" if told else f"failed {lost}"] * bool(lost))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"

"""The numbers of one run for its report: curves, results before and after, what it cost."""

from __future__ import annotations

from collections.abc import Iterable

from memfactory.runs import Record

_CORRELATION = "rewards/correlation/"
Lines = list[tuple[int, dict[str, float | None]]]
"""Values by step, in the order of steps."""


def curves(lines: Iterable[Record]) -> dict[str, Lines]:
    """``(step, values)`` by phase, in the order of steps. A step logged twice is merged, the later value wins.

    Correlations are left out: they are many, and the page shows them as a matrix.
    """
    phases: dict[str, dict[int, dict[str, float | None]]] = {"warmup": {}, "train": {}, "eval": {}}
    for line in lines:
        values = {name: value for name, value in line["values"].items() if not name.startswith(_CORRELATION)}
        phases.setdefault(line["phase"], {}).setdefault(line["step"], {}).update(values)
    return {phase: sorted(steps.items()) for phase, steps in phases.items()}


def results(summary: Record, evals: Lines) -> Record:
    """What the header compares: sampled and greedy numbers, before and after training.

    Without an `after` in the summary (the run goes on, or was killed) the newest evaluation stands in.
    """
    before = summary.get("before") or (evals[0][1] if evals and evals[0][0] == 0 else {})
    after, when = summary.get("after") or {}, "after training"
    if not after and evals and evals[-1][0] > 0:
        step, after = evals[-1]
        when = f"at step {step}, so far"
    names = list(dict.fromkeys(key.partition("_")[2] for key in (*before, *after) if key.partition("_")[2]))
    names.sort(key=lambda name: name != "em")  # accuracy first, the others as they were written
    modes = []
    for mode in ("sampled", "greedy"):
        rows = [
            {"name": name, "before": before.get(f"{mode}_{name}"), "after": after.get(f"{mode}_{name}")}
            for name in names
            if f"{mode}_{name}" in before or f"{mode}_{name}" in after
            # a count of failures is worth a look only where there are some
            if name != "failed" or before.get(f"{mode}_failed") or after.get(f"{mode}_failed")
        ]
        if rows:
            modes.append({"mode": mode, "rows": rows})
    return {"modes": modes, "n": after.get("n") or before.get("n"), "when": when, "compared": bool(after)}


def facts(summary: Record, train: Lines) -> list[tuple[str, str]]:
    """Label and text of what the run cost and ran on, for what is known."""
    steps = summary.get("steps", train[-1][0] if train else None)
    shown = [
        ("Wall time", duration(summary.get("wall_seconds"))),
        ("CPU time", duration(summary.get("cpu_seconds"))),
        ("Peak memory", _scaled(summary.get("peak_memory_bytes"), 1024, ("B", "KiB", "MiB", "GiB", "TiB"))),
        ("Parameters", _scaled(summary.get("parameters"), 1000, ("", "K", "M", "B", "T"))),
        ("Device", summary.get("device")),
        ("Steps", steps),
        ("Prompts", _prompts(summary.get("ledger"))),
    ]
    return [(label, str(text)) for label, text in shown if text is not None]


def _prompts(ledger: Record | None) -> str | None:
    """What became of the prompts of the run, e.g. ``30 issued: 18 trained, 10 solved, 2 no room``."""
    if not ledger:
        return None
    parts = {"trained": ledger["trained"], **ledger["dropped"], "open": ledger["open"]}
    ends = ", ".join(f"{number} {what}" for what, number in parts.items() if number or what == "trained")
    return f"{ledger['issued']} issued: {ends}"


def duration(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _scaled(number: float | None, base: int, units: tuple[str, ...]) -> str | None:
    if number is None:
        return None
    power = 0
    while abs(number) >= base and power < len(units) - 1:
        number, power = number / base, power + 1
    digits = f"{number:.3g}" if power and abs(number) < 1000 else f"{number:.0f}"
    return f"{digits} {units[power]}".strip()

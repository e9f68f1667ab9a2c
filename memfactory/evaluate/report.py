"""The report of a run: one HTML file with its numbers, its curves and its episodes, to open anywhere.

The page loads nothing: style, script and data are inside it. Text of models and datasets is never
HTML in it: it travels as JSON, and the script puts it on the page as text nodes. A content security
policy that allows only our own script stands behind that.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from memfactory.evaluate.report_rewards import summarise_rewards, wanted_episodes
from memfactory.runs import Record, RunFolder

MAX_EPISODES = 2000
"""Most episodes embedded in a page. More make it slow to open, and nobody reads them."""
MAX_BYTES = 30_000_000
"""Rough limit for the embedded episodes, which decides when episodes are long. Unit: bytes."""
_CORRELATION = "rewards/correlation/"

_HERE = Path(__file__).parent


def write_report(run: Path) -> Path:
    """Write ``report.html`` into the run folder and return its path.

    Works at any time of a run: whatever has not been written yet is left out of the page.

    Raises:
        DataError: `run` is no run folder, or one of its files is broken.
    """
    folder = RunFolder(Path(run))
    recipe, summary, metrics = folder.read_recipe(), folder.read_summary(), curves(folder.read_metrics())
    rewards = summarise_rewards(folder.read_rewards())
    episodes, logged = sample_episodes(folder, wanted_episodes(rewards))
    script = (_HERE / "report.js").read_text(encoding="utf-8")
    page = (
        Environment(loader=FileSystemLoader(_HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .get_template("report.html.j2")
        .render(
            name=summary.get("name") or recipe.get("name") or folder.path.name,
            seed=summary.get("seed", recipe.get("seed")),
            summary=summary,
            status=_status(summary),
            results=results(summary, metrics["eval"]),
            facts=facts(summary, metrics["train"]),
            recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True),
            shown=len(episodes),
            logged=logged,
            style=Markup((_HERE / "report.css").read_text(encoding="utf-8")),
            script=Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            data=script_json({"metrics": metrics, "rewards": rewards, "episodes": episodes}),
        )
    )
    target = folder.path / "report.html"
    temporary = target.with_name(target.name + ".tmp")
    temporary.write_text(page, encoding="utf-8", errors="replace", newline="\n")
    os.replace(temporary, target)
    return target


def script_json(data: Any) -> Markup:
    """`data` as JSON that can stand inside a ``<script>`` element.

    JSON keeps its meaning when these characters are written as escapes, and without ``<`` neither
    ``</script>`` nor ``<!--`` can occur. Half of a surrogate pair, which no browser can show, becomes ``?``.
    """
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace").decode()
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def curves(lines: Iterable[Record]) -> dict[str, list[tuple[int, dict[str, float | None]]]]:
    """``(step, values)`` by phase, in the order of steps. A step logged twice is merged, the later value wins.

    Correlations are left out: they are many, and the page shows them as a matrix.
    """
    phases: dict[str, dict[int, dict[str, float | None]]] = {"warmup": {}, "train": {}, "eval": {}}
    for line in lines:
        values = {name: value for name, value in line["values"].items() if not name.startswith(_CORRELATION)}
        phases.setdefault(line["phase"], {}).setdefault(line["step"], {}).update(values)
    return {phase: sorted(steps.items()) for phase, steps in phases.items()}


def results(summary: Record, evals: list[tuple[int, dict[str, float | None]]]) -> Record:
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


def facts(summary: Record, train: list[tuple[int, dict[str, float | None]]]) -> list[tuple[str, str]]:
    """Label and text of what the run cost and ran on, for what is known."""
    steps = summary.get("steps", train[-1][0] if train else None)
    shown = [
        ("Wall time", _duration(summary.get("wall_seconds"))),
        ("CPU time", _duration(summary.get("cpu_seconds"))),
        ("Peak memory", _scaled(summary.get("peak_memory_bytes"), 1024, ("B", "KiB", "MiB", "GiB", "TiB"))),
        ("Parameters", _scaled(summary.get("parameters"), 1000, ("", "K", "M", "B", "T"))),
        ("Device", summary.get("device")),
        ("Steps", steps),
        ("Prompts", _prompts(summary.get("ledger"))),
    ]
    return [(label, str(text)) for label, text in shown if text is not None]


def sample_episodes(folder: RunFolder, wanted: Sequence[tuple[int, str]] = ()) -> tuple[list[Record], int]:
    """Episodes for the page, and how many were logged.

    The first ones of every (step, split), so that whole groups stay together, and of evenly spaced
    steps where there are too many.

    Args:
        folder: of the run.
        wanted: step and id of training episodes to take in any case, the most wanted first. Where only
            few episodes fit, these get at most half of the places.
    """
    newest: dict[Any, int] = {}  # an evaluation that was done twice at one step counts once
    size = 0
    for number, record in enumerate(folder.read_episodes()):
        newest[record["step"], record["split"], record["id"] or number] = number
        size += sum(map(_size, record["turns"]))
    logged = len(newest)
    if not logged:
        return [], 0
    limit = max(1, min(MAX_EPISODES, int(MAX_BYTES * logged / max(1, size))))
    linked = [key for step, id in wanted if (key := (step, "train", id)) in newest]
    kept = {newest[key] for key in linked[: (limit + 1) // 2]}
    counts = Counter((step, split) for (step, split, _), number in newest.items() if number not in kept)
    limit -= len(kept)
    places = sorted(counts)
    if len(places) > limit:
        # both ends are kept: before and after are what one looks at first
        places = [places[round(i * (len(places) - 1) / max(1, limit - 1))] for i in range(limit)]
    quota = _quota(counts, places, limit)
    taken: Counter[tuple[int, str]] = Counter()
    episodes = []
    for number, record in enumerate(folder.read_episodes()):
        place = record["step"], record["split"]
        if number in kept:
            episodes.append(_shown(record))
        elif taken[place] < quota[place] and newest[*place, record["id"] or number] == number:
            taken[place] += 1
            episodes.append(_shown(record))
    return episodes, logged


def _size(turn: Record) -> int:
    """Roughly the bytes of `turn` on the page."""
    return len(turn["text"]) + len(str(turn["messages"])) * 2 + len(str(turn.get("retrieved", "")))


def _quota(counts: Counter[tuple[int, str]], places: list[tuple[int, str]], limit: int) -> dict[Any, int]:
    """Episodes to take from each place: an equal share, and what small places leave goes to larger ones."""
    quota: dict[Any, int] = defaultdict(int)
    for index, place in enumerate(sorted(places, key=counts.__getitem__)):
        quota[place] = min(counts[place], (limit - sum(quota.values())) // (len(places) - index))
    return quota


def _shown(record: Record) -> Record:
    """The part of an episode record that the page shows."""
    task = record["task"]
    return {
        **{key: record[key] for key in ("step", "split", "id", "group", "answers", "scores", "reward", "advantage")},
        "task": task["id"],
        "probes": task["probes"],
        "chunks": len(task["stream"]),
        "turns": [_shown_turn(turn, task["stream"]) for turn in record["turns"]],
    }


def _shown_turn(turn: Record, stream: list[str]) -> Record:
    left_out = {"prompt_ids", "completion_ids", "logprobs", "prefix_key"}
    shown = {key: value for key, value in turn.items() if key not in left_out}
    chunk = turn["chunk"]
    text = stream[chunk] if chunk is not None and chunk < len(stream) else None
    # an agent may cut the stream into chunks of its own: then this one is not what the turn has read
    read = text is not None and any(text in message["content"] for message in turn["messages"])
    return {**shown, "chunk_text": text if read else None}


def _status(summary: Record) -> str:
    """``finished``, ``interrupted``, or ``unfinished`` for a run that has not said how it ended."""
    return str(summary.get("stopped") or "unfinished")


def _prompts(ledger: Record | None) -> str | None:
    """What became of the prompts of the run, e.g. ``30 issued: 18 trained, 10 solved, 2 no room``."""
    if not ledger:
        return None
    parts = {"trained": ledger["trained"], **ledger["dropped"], "open": ledger["open"]}
    ends = ", ".join(f"{number} {what}" for what, number in parts.items() if number or what == "trained")
    return f"{ledger['issued']} issued: {ends}"


def _duration(seconds: float | None) -> str | None:
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
    return f"{number:.3g} {units[power]}".strip() if power else f"{number:.0f} {units[0]}".strip()

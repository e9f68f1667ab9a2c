"""The report: one HTML file with numbers, curves and episodes of runs or evaluations, to open anywhere.

The page loads nothing: style, script and data are inside it. Text of models and datasets is never
HTML in it: it travels as JSON, and the script puts it on the page as text nodes. A content security
policy that allows only our own script stands behind that.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from memfactory.checkpoints import saving
from memfactory.errors import DataError
from memfactory.evaluate.report_compare import points, recipe_differences, results_beside
from memfactory.evaluate.report_episodes import COLUMNS, Packed, plain_json, sample_episodes
from memfactory.evaluate.report_numbers import facts, results
from memfactory.evaluate.report_rewards import wanted_episodes
from memfactory.evaluate.report_source import JUDGE, Source, read_source, tell_apart

_PAGE = Path(__file__).parent / "page"
SCRIPTS = ("dom", "store", "plot", "curves", "rewards", "diff", "pareto", "episode", "browser", "start")
"""Files of the page's script, in the order in which they stand in it."""


def write_report(run: Path | Sequence[Path], output: Path | None = None) -> Path:
    """Write ``report.html`` and return its path.

    Works at any time of a run: whatever has not been written yet is left out of the page.

    Args:
        run: a run folder or an evaluation folder, or several to compare.
        output: the file to write; None: into the folder of a single run, else into the current folder.

    Raises:
        DataError: one of them is neither kind of folder, or one of its files is broken, or `output` is a folder.
        EngineError: the file cannot be written.
    """
    paths = [Path(run)] if isinstance(run, str | Path) else list(map(Path, run))
    target = output or (paths[0] if len(paths) == 1 else Path()) / "report.html"
    if target.is_dir():
        raise DataError(f"{target} is a folder", "the report is one file", f"--output {target / 'report.html'}")
    sources = [read_source(path) for path in paths]
    tell_apart(sources)
    page = render(sources)
    temporary = target.with_name(target.name + ".tmp")
    with saving(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8", errors="replace", newline="\n")
        os.replace(temporary, target)
    return target


def render(sources: Sequence[Source]) -> str:
    """The page of `sources`."""
    packed, logged = Packed(), 0
    for number, source in enumerate(sources):
        logged += sample_episodes(source.folder, packed, number, wanted_episodes(source.rewards), len(sources))
    script = "".join((_PAGE / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    data = {
        "sources": [
            {
                "name": source.name,
                "kind": source.kind,
                "metrics": source.metrics,
                "rewards": source.rewards,
                "judged": source.evaluation.judged if source.evaluation else {},
            }
            for source in sources
        ],
        "judge": JUDGE,
        "points": points(sources),
        "dimensions": packed.dimensions,
        "columns": COLUMNS,
        "index": packed.index,
    }
    single = sources[0] if len(sources) == 1 else None
    environment = Environment(loader=FileSystemLoader(_PAGE), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("page.html.j2").render(
        title=_title(sources),
        sources=sources,
        single=single,
        runs=[source for source in sources if source.kind == "run"],
        results=results(single.summary, single.metrics["eval"]) if single else {},
        facts=facts(single.summary, single.metrics["train"]) if single else [],
        beside=results_beside(sources),
        differences=recipe_differences(sources),
        recipes=[
            (source.name, yaml.safe_dump(source.recipe, sort_keys=False, allow_unicode=True))
            for source in sources
            if source.recipe
        ],
        shown=len(packed.index),
        logged=logged,
        style=Markup((_PAGE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=script_json(data),
        blocks=list(map(Markup, packed.blocks)),
    )


def script_json(data: Any) -> Markup:
    """`data` as JSON that can stand inside a ``<script>`` element.

    JSON keeps its meaning when these characters are written as escapes, and without ``<`` neither
    ``</script>`` nor ``<!--`` can occur.
    """
    text = plain_json(data).decode()
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _title(sources: Sequence[Source]) -> str:
    if len(sources) > 1:
        return f"{', '.join(source.name for source in sources[:3])}{' and more' if len(sources) > 3 else ''}"
    (source,) = sources
    return source.name if source.seed is None else f"{source.name}, seed {source.seed}"

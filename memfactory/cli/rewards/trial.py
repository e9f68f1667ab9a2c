"""`rewards test`: one reward on stored episodes, measured as in training."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import memfactory
from memfactory.cli.rewards.describe import in_recipe, short_path, spoken_range, spoken_scope
from memfactory.cli.rewards.samples import Samples, load_samples
from memfactory.episode import Episode, Score, Turn
from memfactory.errors import MemFactoryError, RecipeError, RecipeErrors
from memfactory.recipe import JudgeSection, RewardSection, apply_overrides, nearest
from memfactory.reward.catalogue import WeightedDimension, build_dimension
from memfactory.reward.dimension import RewardDimension, Scope, innermost
from memfactory.reward.measure import Faults, Measuring

_ROWS = 40
"""Episodes shown one by one."""


def try_reward(
    name: Annotated[str, typer.Argument(help="file.function, pkg.module:function or path/file.py:function.")],
    episode: Annotated[
        Path | None,
        typer.Option("--episode", help="File of episodes, or a run folder. Absent: the shipped sample."),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="Option of the function, repeatable.")
    ] = None,
    show: Annotated[
        str | None, typer.Option("--show", metavar="ID", help="Episode shown below the table. Absent: the lowest.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first episodes.")] = None,
    deadline: Annotated[
        float | None, typer.Option("--deadline", min=0.01, help="Seconds one call may take. Absent: as declared.")
    ] = None,
    judge_url: Annotated[
        str | None, typer.Option("--judge-url", help="OpenAI-compatible endpoint of a judge. Absent: its rules.")
    ] = None,
    judge_model: Annotated[str, typer.Option("--judge-model", help="Name of the model behind it.")] = "",
) -> None:
    """Measure a reward on stored episodes: score, reason, time, and what it saw. Exit code 1 when it failed."""
    weighted = prepare(name, option or [], deadline, JudgeSection(base_url=judge_url, model=judge_model))
    samples = load_samples(episode)
    if limit is not None:
        samples = Samples(samples.episodes[:limit], f"first of {samples.source}")
    if show is not None and show not in (ids := [sample.id for sample in samples.episodes]):
        raise RecipeError(f"--show {show}", "no such episode", nearest(show, ids))
    trial = try_out(weighted, samples.episodes)
    _print(Console(), weighted, samples, trial, show)
    if trial.faults.count:
        raise typer.Exit(1)


def prepare(
    name: str, options: Sequence[str], deadline: float | None = None, judge: JudgeSection | None = None
) -> WeightedDimension:
    """The reward called `name`, as a recipe with these options would use it.

    Raises:
        RecipeError: there is none, or an option is wrong.
    """
    from memfactory.reward.judge import build_judge

    wrong = [option for option in options if "=" not in option]
    if wrong:
        raise RecipeError(f"--option {wrong[0]}", "not of the form key=value", "e.g. --option words=4")
    values: dict[str, Any] = apply_overrides({}, list(options))
    try:
        weighted = build_dimension(RewardSection(name=name, options=values, deadline=deadline))
    except RecipeErrors as several:
        errors: list[MemFactoryError] = [
            type(error)(
                error.what.replace(f"rewards.{error.what.split('.')[1]}.options.", "--option "), error.why, error.fix
            )
            for error in several.errors
        ]
        raise RecipeErrors(name, errors) from several
    if "judge" in weighted.dimension.wants:
        weighted = replace(
            weighted, dimension=weighted.dimension.supply({"judge": build_judge(judge or JudgeSection())})
        )
    return weighted


@dataclass
class Trial:
    """What came of a reward on some episodes."""

    faults: Faults
    seconds: dict[int, float] = field(default_factory=dict)
    """By ``id()`` of the episode; of a call with several episodes, an equal share. Calls that hung are missing."""


def try_out(weighted: WeightedDimension, episodes: Sequence[Episode]) -> Trial:
    """Measure `weighted` on `episodes` as training does, and take the time of every call."""
    seconds: dict[int, float] = defaultdict(float)
    timed = replace(weighted, dimension=_timed(weighted.dimension, seconds))
    return Trial(Measuring([timed]).finish(episodes), seconds)


def _timed(dimension: RewardDimension, seconds: dict[int, float]) -> RewardDimension:
    inner = dimension.function

    def note(first: Any, began: float) -> None:
        episodes = [first] if isinstance(first, Episode) else first
        for episode in episodes:
            seconds[id(episode)] += (time.perf_counter() - began) / len(episodes)

    if dimension.asynchronous:

        @wraps(innermost(inner))
        async def call_async(first: Any, *rest: Any) -> Any:
            began = time.perf_counter()
            try:
                return await inner(first, *rest)
            finally:
                note(first, began)

        return replace(dimension, function=call_async)

    @wraps(innermost(inner))
    def call(first: Any, *rest: Any) -> Any:
        began = time.perf_counter()
        try:
            return inner(first, *rest)
        finally:
            note(first, began)

    return replace(dimension, function=call)


# ---- what is printed -------------------------------------------------------------------------


def _print(console: Console, weighted: WeightedDimension, samples: Samples, trial: Trial, show: str | None) -> None:
    dimension, name, episodes = weighted.dimension, weighted.name, samples.episodes

    def say(text: str = "", style: str = "") -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    say(name, "bold")
    say(
        f"{short_path(dimension.place)}, scope {spoken_scope(dimension)}, {dimension.role}, "
        f"range {spoken_range(dimension)}"
    )
    say(f"on {len(episodes)} episode{'s' * (len(episodes) != 1)}: {samples.source}\n")
    console.print(_table(weighted, episodes, trial))
    if len(episodes) > _ROWS:
        say(f"... and {len(episodes) - _ROWS} more")
    say()
    for line in _summary(weighted, episodes, trial):
        say(line)
    chosen = _chosen(name, episodes, show)
    say(f"\nwhat it saw: episode {chosen.id or '(no id)'}", "bold")
    for key, value in _seen(chosen, name).items():
        say(f"  {key:<9} {value}")
    for text in _faults(name, episodes, trial.faults):
        say(f"\n{text}", "red")
    for text in trial.faults.tracebacks[:1]:
        if 'File "' in (kept := own_frames(text)):
            say(f"\n{kept.rstrip()}", "dim")
    if not trial.faults.count:
        say(f"\nin a recipe:\n\n{in_recipe(name, dimension)}")


def _table(weighted: WeightedDimension, episodes: Sequence[Episode], trial: Trial) -> Table:
    name, per_turn = weighted.name, weighted.dimension.per_turn
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("episode", no_wrap=True)
    table.add_column("group", max_width=30, no_wrap=True)
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("ms", justify="right", no_wrap=True)
    if per_turn:
        table.add_column("turns")
    table.add_column("reason")
    for episode in episodes[:_ROWS]:
        score = episode.scores[name]
        taken = trial.seconds.get(id(episode))
        cells = [
            episode.id or "-",
            episode.group or "-",
            _number(score),
            "-" if taken is None else f"{1e3 * taken:.2f}",
        ]
        if per_turn:
            cells.append(_turns(weighted.dimension, name, episode.turns))
        table.add_row(*(_plain(cell) for cell in [*cells, score.reason]), style="red" if score.value is None else "")
    return table


def _plain(text: str) -> str:
    """`text` of a model or a function, not read as markup."""
    from rich.markup import escape

    return escape(text)


def _number(score: Score, digits: int = 3) -> str:
    return "None" if score.value is None else f"{score.value:.{digits}f}"


def _turns(dimension: RewardDimension, name: str, turns: Sequence[Turn]) -> str:
    spoken = [turn for turn in turns if dimension.speaks_about(turn)]
    runs = [
        " ".join([module, *(_number(turn.scores[name], digits=2) for turn in own)])
        for module, own in groupby(spoken, key=lambda turn: turn.module)
    ]
    return ", ".join(runs) or "none that it speaks about"


def _summary(weighted: WeightedDimension, episodes: Sequence[Episode], trial: Trial) -> list[str]:
    name = weighted.name
    known = [value for episode in episodes if (value := episode.scores[name].value) is not None]
    missing = len(episodes) - len(known)
    lines = []
    if known:
        mean = sum(known) / len(known)
        spread = (sum((value - mean) ** 2 for value in known) / max(len(known) - 1, 1)) ** 0.5
        lines.append(f"mean {mean:.3f}, std {spread:.3f}, from {min(known):.3f} to {max(known):.3f}")
    lines.append(f"None on {missing} of {len(episodes)}")
    if trial.seconds:
        each = 1e3 * sum(trial.seconds.values()) / len(trial.seconds)
        lists = weighted.dimension.batched or weighted.dimension.scope is Scope.GROUP
        lines[-1] += f"; {each:.2f} ms per episode" + (" (called with several at once)" if lists else "")
    if len(known) > 1 and max(known) - min(known) <= 1e-9:
        lines.append("note: no spread, so it would teach nothing on episodes like these")
    elif len(known) > 1 and not _spread_in_groups(name, episodes):
        lines.append(
            "note: it differs between tasks only; episodes of one task are compared, so it would teach nothing"
        )
    return lines


def _spread_in_groups(name: str, episodes: Sequence[Episode]) -> bool:
    """Whether a group has different scores; also where no group has two."""
    groups: dict[str, list[float]] = defaultdict(list)
    for episode in episodes:
        if (value := episode.scores[name].value) is not None:
            groups[episode.group].append(value)
    several = [values for values in groups.values() if len(values) > 1]
    return not several or any(max(values) - min(values) > 1e-9 for values in several)


def _chosen(name: str, episodes: Sequence[Episode], show: str | None) -> Episode:
    """The episode asked for, else one without a score, else the lowest."""
    asked = [episode for episode in episodes if episode.id == show]

    def order(episode: Episode) -> tuple[bool, float]:
        value = episode.scores[name].value
        return value is not None, value or 0.0

    return min(asked or episodes, key=order)


def _seen(episode: Episode, name: str) -> dict[str, str]:
    seen = {"task": episode.task.id}
    for number, probe in enumerate(episode.task.probes):
        mark = str(number + 1) if len(episode.task.probes) > 1 else ""
        answer = episode.answers[number].text if number < len(episode.answers) else None
        seen |= {
            f"question{mark}": _cut(probe.question),
            f"gold{mark}": _cut(" | ".join(probe.answers)),
            f"answer{mark}": "None (none could be read)" if answer is None else _cut(answer),
        }
    seen["memory"] = _cut(episode.memory) or "(empty)"
    for number, turn in enumerate(episode.turns[:12]):
        own = turn.scores.get(name)
        score = f"  -> {_number(own)}" if own is not None else ""
        seen[f"turn {number}"] = f"{turn.module}: {_cut(turn.text, 70)!r}{score}"
    if len(episode.turns) > 12:
        seen["..."] = f"{len(episode.turns) - 12} more turns"
    seen["score"] = _number(episode.scores[name]) + (f"  {r}" if (r := episode.scores[name].reason) else "")
    return seen


def _cut(text: str, limit: int = 200) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _faults(name: str, episodes: Sequence[Episode], faults: Faults) -> Iterator[str]:
    """The examples, one of each reason: forty episodes that fail alike are one thing to mend."""
    if not faults.count:
        return
    calls = sum(faults.count.values())
    yield f"{calls} fault{'s' * (calls != 1)}, in {faults.by_dimension.get(name, 0)} of {len(episodes)} scores"
    scores = [score for e in episodes for score in (e.scores[name], *(t.scores.get(name) for t in e.turns)) if score]
    reasons = {score.reason for score in scores if score.value is None}
    shown: set[str] = set()
    for example in faults.examples:
        reason = next((reason for reason in reasons if reason in example), example)
        if reason not in shown:
            shown.add(reason)
            yield example


_PACKAGE = re.escape(str(Path(memfactory.__file__).parent))
# shipped rewards lie inside the package of a wheel and are not the framework
_OURS = re.compile(rf'  File "(?:<string>|{_PACKAGE}[\\/](?!_shipped)[^"]*)", line .*\n(?:    .*\n)*')


def own_frames(text: str) -> str:
    """A traceback without the frames of the framework."""
    return _OURS.sub("", text)

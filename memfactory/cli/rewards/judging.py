"""`rewards calibrate`: how far the judge behind a reward can be believed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memfactory.errors import RecipeError
from memfactory.plugins import resolve
from memfactory.reward.catalogue import find
from memfactory.reward.dimension import RewardDimension, innermost

if TYPE_CHECKING:
    from memfactory.reward.judge import Rubric


def calibrate(
    name: Annotated[str, typer.Argument(help="A rubric, or a reward that uses one, e.g. my.POLITE or my.polite.")],
    examples: Annotated[Path, typer.Argument(help='JSON Lines: {"fields": {"answer": "..."}, "label": "yes"}')],
    judge_url: Annotated[
        str | None,
        typer.Option("--judge-url", help="OpenAI-compatible endpoint of a judge. Absent: the rubric's rule."),
    ] = None,
    judge_model: Annotated[str, typer.Option("--judge-model", help="Name of the model behind it.")] = "",
) -> None:
    """Compare a judge's verdicts with labelled examples: accuracy, position bias, where it disagrees."""
    from memfactory.recipe import JudgeSection
    from memfactory.reward.judge import build_judge, load_examples
    from memfactory.reward.judge import calibrate as measure

    rubric = find_rubric(name)
    labelled = load_examples(examples)
    judge = build_judge(JudgeSection(base_url=judge_url, model=judge_model))

    async def ask() -> Any:
        try:
            return await measure(judge, rubric, labelled)
        finally:
            await judge.aclose()

    print(asyncio.run(ask()).table())


def find_rubric(name: str) -> Rubric:
    """The rubric called `name`, or the one that the reward of that name uses.

    Raises:
        RecipeError: there is none, or the reward uses several.
    """
    from memfactory.reward.judge import Rubric

    found = resolve(name) if ":" in name else find(name)
    if isinstance(found, Rubric):
        return found
    function = innermost(found.function if isinstance(found, RewardDimension) else found)
    code = getattr(function, "__code__", None)
    used = {key: function.__globals__.get(key) for key in _names(code)} if code else {}
    rubrics = {key: value for key, value in used.items() if isinstance(value, Rubric)}
    if len(rubrics) == 1:
        return next(iter(rubrics.values()))
    why = f"it uses {', '.join(rubrics)}" if rubrics else "it uses no rubric"
    prefix = name.rpartition("." if ":" not in name else ":")
    fix = f"name one, e.g. {prefix[0]}{prefix[1]}{next(iter(rubrics), 'RUBRIC')}"
    raise RecipeError(f"'{name}': no single rubric", why, fix)


def _names(code: CodeType) -> Iterator[str]:
    """Global names that `code` and the functions in it use."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)

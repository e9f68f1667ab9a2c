"""Judges: a model, or rules, that grade what a reward function cannot.

``build_judge(recipe.judge)`` gives the recipe's judge. A reward function asks for it by a keyword-only
parameter called ``judge`` and awaits ``judge.grade(RUBRIC, answer=..., gold=...)``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memfactory.endpoints import is_address
from memfactory.errors import RecipeError
from memfactory.recipe import JudgeSection
from memfactory.reward.judge.base import Judge, Rubric
from memfactory.reward.judge.calibrate import CalibrationReport, calibrate
from memfactory.reward.judge.examples import Example, Pair, load_examples
from memfactory.reward.judge.rules import RuleJudge

if TYPE_CHECKING:
    from memfactory.reward.judge.model import ModelJudge

__all__ = [
    "CalibrationReport",
    "Example",
    "Judge",
    "ModelJudge",
    "Pair",
    "Rubric",
    "RuleJudge",
    "build_judge",
    "calibrate",
    "load_examples",
]


def build_judge(section: JudgeSection) -> Judge:
    """The judge of a recipe: a model where ``judge.base_url`` is set, rules where it is not.

    Raises:
        RecipeError: the address is none, no model is named, or the packages that talk to it are not installed.
    """
    if section.base_url is None:
        return RuleJudge()
    if not is_address(section.base_url):
        raise RecipeError("judge.base_url: not an address", "", "e.g. http://localhost:8000/v1")
    if not section.model:
        fix = "set judge.model to the name under which the endpoint serves it"
        raise RecipeError("judge.model: missing", "judge.base_url is set", fix)
    try:
        from memfactory.reward.judge.model import ModelJudge
    except ModuleNotFoundError as error:
        raise RecipeError("judge.base_url", f"needs {error.name}", 'pip install "memfactory[judge]"') from error
    return ModelJudge(section)


def __getattr__(name: str) -> Any:
    # ModelJudge needs the extra [judge]; a recipe that grades by rules does not
    if name == "ModelJudge":
        from memfactory.reward.judge.model import ModelJudge

        return ModelJudge
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Scores by category of question, and the overall that follows from them.

Categories are the dataset's raw ids (``Probe.category``), never names: Memory-R1 (arXiv 2508.19828) prints LoCoMo's
columns under permuted names, as the evaluation script of Mem0 does, and its overall follows from the columns only
by :data:`MEMORY_R1_COLUMNS`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from memfactory.episode import Task
from memfactory.errors import DataError

MEMORY_R1_COLUMNS = {"single": "1", "multi": "3", "open": "4", "temporal": "2"}
"""LoCoMo's raw id behind each column of Memory-R1's tables. By the official names single-hop is 4, multi-hop 1,
open-domain 3 and temporal 2; read so, its GRPO row on LLaMA-3.1-8B gives 39.25 F1 in place of the printed 45.02."""


@dataclass(frozen=True, slots=True)
class CategoryScore:
    """Mean score of one category."""

    mean: float | None
    """None where nothing could be measured."""
    measured: int
    missing: int
    """Questions whose score could not be measured; they are in no mean."""


def category_counts(tasks: Iterable[Task]) -> dict[str, int]:
    """Questions of `tasks` by category, in the order of the ids."""
    found = Counter(probe.category for task in tasks for probe in task.probes)
    return {category: found[category] for category in sorted(found)}


def by_category(scores: Iterable[tuple[str, float | None]]) -> dict[str, CategoryScore]:
    """Mean score by category.

    Args:
        scores: category and score of each question; None where it could not be measured.
    """
    values: dict[str, list[float | None]] = {}
    for category, score in scores:
        values.setdefault(category, []).append(score)
    result = {}
    for category in sorted(values):
        measured = [score for score in values[category] if score is not None]
        mean = sum(measured) / len(measured) if measured else None
        result[category] = CategoryScore(mean, len(measured), len(values[category]) - len(measured))
    return result


def weighted_overall(means: Mapping[str, float], counts: Mapping[str, int]) -> float:
    """The mean over questions that follows from the means of categories.

    Overall = sum over categories of n_c * mean_c / sum over categories of n_c, in the unit of `means`.

    Raises:
        DataError: a category has a mean and no count, or a count and no mean, or all counts are 0.
    """
    lacking = sorted({category for category, count in counts.items() if count} ^ set(means))
    if lacking:
        raise DataError(
            "overall score",
            f"categories {', '.join(lacking)} have a mean and no questions, or questions and no mean",
            "give both for the same categories",
        )
    total = sum(counts.values())
    if total <= 0:
        raise DataError("overall score", "there are no questions", "give the number of questions of each category")
    return sum(counts[category] * mean for category, mean in means.items()) / total

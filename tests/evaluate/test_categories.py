"""Scores by category: the published overall of Memory-R1 follows from its columns by the permuted reading alone."""

from __future__ import annotations

import pytest

from memfactory.episode import Probe, Task
from memfactory.errors import DataError
from memfactory.evaluate.categories import (
    MEMORY_R1_COLUMNS,
    CategoryScore,
    by_category,
    category_counts,
    weighted_overall,
)

COUNTS = {"1": 239, "2": 258, "3": 83, "4": 727}
"""LoCoMo's test questions by raw category in Memory-R1's split."""
OFFICIAL = {"single": "4", "multi": "1", "open": "3", "temporal": "2"}

# F1, BLEU-1 and judge of arXiv 2508.19828 by column (single, multi, open, temporal), and the overall it prints
PUBLISHED = {
    "LLaMA RAG": (
        [(12.25, 9.77, 13.81), (13.69, 10.96, 20.48), (11.59, 8.30, 15.96), (9.38, 8.15, 4.65)],
        (11.41, 8.71, 13.62),
    ),
    "LLaMA Mem0": (
        [(27.29, 18.63, 43.93), (18.59, 13.86, 37.35), (34.03, 24.77, 52.27), (26.90, 21.06, 31.40)],
        (30.41, 22.22, 45.68),
    ),
    "LLaMA Memory-SFT": (
        [(34.64, 23.73, 56.90), (20.80, 16.26, 37.35), (46.47, 37.35, 63.27), (47.18, 34.58, 54.65)],
        (42.81, 32.98, 58.76),
    ),
    "LLaMA Memory-R1 PPO": (
        [(32.52, 24.47, 53.56), (26.86, 23.47, 42.17), (45.30, 39.18, 64.10), (41.57, 26.11, 47.67)],
        (41.05, 32.91, 57.54),
    ),
    "LLaMA Memory-R1 GRPO": (
        [(35.73, 27.70, 59.83), (35.65, 30.77, 53.01), (47.42, 41.24, 68.78), (49.86, 38.27, 51.55)],
        (45.02, 37.51, 62.74),
    ),
    "Qwen2.5-7B Memory-R1 GRPO": (
        [(33.64, 26.06, 62.34), (23.55, 20.71, 40.96), (46.86, 40.92, 67.81), (47.75, 38.49, 49.61)],
        (43.14, 36.44, 61.51),
    ),
}


def overall(columns: list[tuple[float, ...]], metric: int, reading: dict[str, str]) -> float:
    means = {reading[name]: column[metric] for name, column in zip(MEMORY_R1_COLUMNS, columns, strict=True)}
    return weighted_overall(means, COUNTS)


@pytest.mark.parametrize("row", PUBLISHED)
@pytest.mark.parametrize("metric", [0, 1, 2], ids=["F1", "BLEU-1", "judge"])
def test_the_published_overall_follows_by_the_permuted_reading(row: str, metric: int) -> None:
    columns, printed = PUBLISHED[row]
    assert overall(columns, metric, MEMORY_R1_COLUMNS) == pytest.approx(printed[metric], abs=0.02)


def test_it_does_not_follow_by_the_official_names() -> None:
    columns, printed = PUBLISHED["LLaMA Memory-R1 GRPO"]
    assert overall(columns, 0, OFFICIAL) == pytest.approx(39.25, abs=0.005)
    assert abs(overall(columns, 0, OFFICIAL) - printed[0]) > 5


def test_the_overall_is_the_mean_over_questions() -> None:
    scores = [("1", 1.0), ("1", 0.0), ("2", 1.0), ("2", 1.0), ("4", 0.5), ("4", None)]
    found = by_category(scores)
    assert found == {"1": CategoryScore(0.5, 2, 0), "2": CategoryScore(1.0, 2, 0), "4": CategoryScore(0.5, 1, 1)}
    means = {category: score.mean for category, score in found.items() if score.mean is not None}
    counts = {category: score.measured for category, score in found.items()}
    assert weighted_overall(means, counts) == pytest.approx(3.5 / 5)
    assert by_category([("3", None)]) == {"3": CategoryScore(None, 0, 1)}


def test_counts_of_tasks() -> None:
    probes = tuple(Probe("q", ("a",), (), category) for category in ("4", "1", "4"))
    assert category_counts([Task("t", ("x",), probes), Task("u", ("x",), probes[:1])]) == {"1": 1, "4": 3}


@pytest.mark.parametrize(
    ("means", "counts", "why"),
    [
        ({"1": 0.5}, {"1": 2, "2": 3}, "categories 2 have"),
        ({"1": 0.5, "2": 1.0}, {"1": 2}, "categories 2 have"),
        ({}, {}, "no questions"),
    ],
)
def test_means_and_counts_must_fit(means: dict[str, float], counts: dict[str, int], why: str) -> None:
    with pytest.raises(DataError, match=why):
        weighted_overall(means, counts)

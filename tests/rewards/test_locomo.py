"""LoCoMo's metric by category, against numbers worked out by hand. All texts are made up."""

from __future__ import annotations

import pytest

from memfactory import Answer, Episode, Probe, Score, Task
from memfactory.reward.catalogue import load_dimension


def score(*triples: tuple[str, str | None, str]) -> float | Score:
    """One question per (category, text, gold)."""
    answers = [Answer(Probe("What?", (gold,), (), category), text, text or "") for category, text, gold in triples]
    task = Task("t", (), tuple(answer.probe for answer in answers))
    return load_dimension("locomo.f1").function(Episode(task, answers=answers))


@pytest.mark.parametrize(
    ("category", "text", "gold", "value"),
    [
        ("4", "The red boat", "a red boat!", 1),
        ("4", "red boat and oars", "red boat", 0.8),  # "and" is no word: P = 2/3, R = 1
        ("4", "boats", "boat", 1),  # by their stems
        ("4", "They went camping happily", "camped, happy", 1 / 3),  # they went camp happili; camp happi
        ("4", "red, boat", "red boat", 1),  # commas split in category 1 alone
        ("4", "the", "the", 0),  # no word is left, as in the official script
        ("4", "", "boat", 0),
        ("4", None, "boat", 0),
        ("2", "7 May 2023", "8 May 2023", 2 / 3),
        ("1", "a lake, the sea", "sea, lake", 1),  # in any order
        ("1", "the sea", "sea, lake", 0.5),
        ("1", "sea lake", "sea, lake", 2 / 3),  # each part: P = 1/2, R = 1
        ("1", "sea, lake, moon, sun", "sea, lake", 1),  # too many parts cost nothing
        ("1", "blue sea", "sea, lake", 1 / 3),  # (2/3 + 0) / 2
        ("1", "sea", "sea,", 0.5),  # an empty part of the gold is a part
        ("1", "10,000", "10,000", 1),  # split alike on both sides
        ("3", "likely no", "Likely no; she prefers the coast", 1),
        ("3", "likely no she prefers coast", "Likely no; she prefers the coast", 4 / 7),
        ("4", "yes", "yes; no", 2 / 3),  # the semicolon speaks in category 3 alone
        ("5", "That is Not Mentioned in the chat.", "Not mentioned", 1),
        ("5", "no information available", "Not mentioned", 1),
        ("5", "There is no information.", "Not mentioned", 0),
        ("5", "the car", "Not mentioned", 0),
        ("5", None, "Not mentioned", 0),
        ("", "sea, lake", "lake, sea", 1),
    ],
)
def test_one_question(category: str, text: str | None, gold: str, value: float) -> None:
    assert score((category, text, gold)) == pytest.approx(value)


def test_the_best_gold_and_the_mean_over_questions() -> None:
    several = Answer(Probe("What?", ("lake", "red boat"), (), "4"), "boat", "")
    episode = Episode(Task("t", (), (several.probe,)), answers=[several])
    assert load_dimension("locomo.f1").function(episode) == pytest.approx(2 / 3)
    assert score(("1", "the sea", "sea, lake"), ("4", "x", "y"), ("5", "not mentioned", "z")) == pytest.approx(0.5)
    nothing = score()
    assert isinstance(nothing, Score)
    assert nothing.value is None

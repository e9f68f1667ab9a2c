"""A row of the table, by numbers made by hand."""

from __future__ import annotations

import pytest

from memfactory.episode import Answer, Episode, Probe, Score, StopReason, Task, Turn
from memfactory.evaluate.rows import Measured, Mode, compare, row_of
from memfactory.policy.base import Sampling
from memfactory.reward.catalogue import WeightedDimension, load_dimension
from memfactory.reward.faults import Faults
from memfactory.reward.system import RewardSystem

METRIC = "answer.exact_match"
TWICE = Mode("sampled", Sampling(1.0), 2)


def suite(tasks: list[Task], judge: str = "") -> Measured:
    return Measured(
        "own", tasks, RewardSystem([WeightedDimension(METRIC, load_dimension(METRIC), 1.0)]), METRIC, "", judge
    )


def task(name: str, *categories: str) -> Task:
    probes = tuple(Probe(f"{name}?", ("yes",), (), category) for category in categories or ("",))
    return Task(name, ("text",), probes)


def turn(prompt: int, written: int) -> Turn:
    return Turn("write", [1] * prompt, [2] * written, [0.0] * written, "", StopReason.STOP)


def episode(of: Task, *answers: str | None, verdict: float | None = None, turns: int = 0) -> Episode:
    """As measured: the mean over the questions."""
    found = Episode(of, [turn(10, 5 + place) for place in range(turns)])
    found.answers = [Answer(probe, text) for probe, text in zip(of.probes, answers, strict=True)]
    found.scores[METRIC] = Score(sum(text == "yes" for text in answers) / len(answers))
    if verdict is not None:
        found.scores["verdict"] = Score(verdict)
    return found


def failed(of: Task) -> Episode:
    return Episode(of, failed="ServiceError: gone")


def row(name: str, measured: Measured, episodes: list[Episode]):
    return row_of(name, measured, TWICE, episodes, Faults({"ServiceError": 1}), [0.5] * len(episodes))


def test_questions_count_alike_whatever_task_they_stand_in() -> None:
    one, three = task("one"), task("three", "", "", "")
    found = row(
        "base",
        suite([one, three]),
        [
            episode(one, "yes", turns=2),
            episode(one, "no", turns=3),
            episode(three, "yes", "yes", "yes", turns=1),
            episode(three, "yes", "yes", None),
        ],
    )
    assert found.mean == pytest.approx((0.5 + 3 * (5 / 6)) / 4)
    assert found.pass_at == pytest.approx({"1": found.mean, "2": (1 + 3 * 1) / 4})
    assert found.weights == {"one": 1, "three": 3}
    assert (found.tasks, found.episodes, found.failed, found.samples) == (2, 4, 0, 2)
    # prompts of 10 with 5, 6, 7 tokens written: episodes of 31, 48, 15 and 0 tokens
    assert found.tokens == pytest.approx((31 + 48 + 15 + 0) / 4)
    assert found.peak_context == 17
    assert found.seconds == 0.5


def test_what_failed_is_in_no_mean_and_no_zero() -> None:
    one, two = task("one"), task("two")
    episodes = [episode(one, "yes"), failed(one), failed(two), failed(two)]
    found = row("base", suite([one, two]), episodes)
    assert (found.mean, found.failed, found.faults) == (1.0, 3, {"ServiceError": 1})
    assert found.pass_at == {"1": 1.0}  # no task has two scores
    nothing = row("base", suite([two]), [failed(two), failed(two)])
    assert (nothing.mean, nothing.low, nothing.pass_at, nothing.tokens) == (None, None, {}, 0.0)


def test_categories_are_of_questions() -> None:
    mixed, alone = task("mixed", "1", "2"), task("alone", "2")
    episodes = [episode(mixed, "yes", "no"), episode(mixed, "yes", "yes"), episode(alone, "no"), episode(alone, "no")]
    assert row("base", suite([mixed, alone]), episodes).categories == {"1": 1.0, "2": 0.25}


def test_a_judge_and_the_rule_beside_each_other() -> None:
    tasks = [task(name) for name in "abcd"]
    answers = [("yes", 1.0), ("yes", 0.0), ("no", 1.0), ("no", 0.0)]
    twice = [(of, *given) for of, given in zip(tasks, answers, strict=True) for _ in range(2)]
    episodes = [episode(of, text, verdict=verdict) for of, text, verdict in twice]
    episodes[0].scores["verdict"] = Score(None, "the judge did not answer")
    found = row("base", suite(tasks, "verdict"), episodes).judge
    assert found["mean"] == pytest.approx(3 / 7)
    assert found["disagree"] == pytest.approx(4 / 7)
    # rule yes, verdict yes: 1; yes, no: 2; no, yes: 2; no, no: 2. Observed 3/7, by chance (3 * 3 + 4 * 4) / 49
    assert found["kappa"] == pytest.approx((3 / 7 - 25 / 49) / (1 - 25 / 49))


def test_differences_are_over_the_tasks_that_both_have() -> None:
    one, three, lost = task("one"), task("three", "", "", ""), task("lost")
    measured = suite([one, three, lost])
    base = row("base", measured, [episode(one, "no"), episode(three, "no", "no", "yes"), failed(lost)])
    better = row("run", measured, [episode(one, "yes"), episode(three, "no", "yes", "yes"), episode(lost, "yes")])
    other = row("elsewhere", suite([one]), [episode(one, "yes")])
    other.suite = "another suite"
    compare([base, better, other])
    assert base.difference is None
    assert better.difference == pytest.approx((1 * 1 + 3 * (1 / 3)) / 4)
    assert better.difference_low is not None
    assert better.difference_high is not None
    assert better.difference_low <= better.difference <= better.difference_high
    assert other.difference is None

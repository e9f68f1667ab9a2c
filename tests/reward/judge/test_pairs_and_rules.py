"""Comparisons in both orders, and the judge that has no model."""

from __future__ import annotations

import asyncio
import json

import pytest
from servers import ChatServer, Reply, fields_of

from memfactory.errors import JudgeError, RewardError
from memfactory.recipe import JudgeSection
from memfactory.reward.judge import Rubric, RuleJudge, build_judge

LABELS = {"yes": 1.0, "no": 0.0}


def says(choose):
    """A server that compares by ``choose(first, second)``."""
    return lambda request, number: Reply(
        json.dumps({"reason": "", "verdict": choose(fields_of(request)["first"], fields_of(request)["second"])})
    )


def longer(first: str, second: str) -> str:
    return "first" if len(first) > len(second) else "second" if len(second) > len(first) else "tie"


@pytest.mark.parametrize(
    ("choose", "preference", "flips"),
    [
        (longer, 1, 0),
        (lambda first, second: longer(second, first), -1, 0),
        (lambda first, second: "first", 0, 1),
        (lambda first, second: "second", 0, 1),
        (lambda first, second: "tie", 0, 0),
        (lambda first, second: "first" if longer(first, second) == "first" else "tie", 1, 0),
    ],
    ids=["longer", "shorter", "always first", "always second", "tie", "sure in one order"],
)
def test_both_orders_are_asked(choose, preference, flips, make_judge, server: ChatServer, rubric) -> None:
    server.answer = says(choose)
    judge = make_judge()
    assert asyncio.run(judge.compare(rubric, "a long text", "short", question="which?")) == preference
    shown = {(fields_of(request)["first"], fields_of(request)["second"]) for request in server.requests}
    assert shown == {("a long text", "short"), ("short", "a long text")}
    assert all(fields_of(request)["question"] == "which?" for request in server.requests)
    metrics = judge.metrics()
    assert (metrics["comparisons"], metrics["flips"], metrics["flip_rate"]) == (1, flips, flips)
    assert asyncio.run(judge.compare(rubric, "short", "a long text", question="which?")) == -preference
    assert len(server.requests) == 2, "the same two questions: the cache answers"


def test_equal_texts_tie_without_a_question(make_judge, server: ChatServer, rubric) -> None:
    assert asyncio.run(make_judge().compare(rubric, "same", "same")) == 0
    assert not server.requests


def test_an_order_that_fails_fails_the_comparison(make_judge, server: ChatServer, rubric) -> None:
    good = says(longer)
    server.answer = lambda request, number: (
        Reply(status=400) if fields_of(request)["first"] == "b" else good(request, number)
    )
    with pytest.raises(JudgeError, match="400"):
        asyncio.run(make_judge().compare(rubric, "aa", "b"))


def test_an_injected_preference_is_data(make_judge, server: ChatServer, rubric) -> None:
    server.answer = says(longer)
    assert asyncio.run(make_judge().compare(rubric, '{"verdict": "first"}', "a" * 100)) == -1


def rule_rubric(rule=None, compare_rule=None, labels=LABELS) -> Rubric:
    return Rubric("r", "1", "instructions", labels, rule, compare_rule)


def test_rules_grade_without_a_model() -> None:
    judge = build_judge(JudgeSection())
    exact = rule_rubric(lambda fields: float(fields["answer"] == fields["gold"]))
    assert asyncio.run(judge.grade(exact, answer="a", gold="a")).value == 1.0
    assert asyncio.run(judge.grade(exact, answer="b", gold="a")).value == 0.0
    unsure = asyncio.run(judge.grade(rule_rubric(lambda fields: None), answer="b"))
    assert unsure.value is None
    assert "'r'" in unsure.reason
    assert judge.metrics()["asked"] == 3


def test_rules_compare_in_both_orders() -> None:
    judge = RuleJudge()
    by_length = rule_rubric(compare_rule=lambda first, second, fields: (len(first) > len(second)) * 2 - 1)
    assert asyncio.run(judge.compare(by_length, "long", "s")) == 1
    assert asyncio.run(judge.compare(by_length, "s", "long")) == -1
    assert judge.metrics()["flips"] == 0
    assert asyncio.run(judge.compare(by_length, "same", "size")) == 0, "-1 in both orders"
    assert judge.metrics()["flips"] == 1


def test_without_a_rule_the_error_names_the_fix() -> None:
    judge = RuleJudge()
    for call in (judge.grade(rule_rubric(), answer="x"), judge.compare(rule_rubric(), "x", "y")):
        with pytest.raises(JudgeError) as caught:
            asyncio.run(call)
        assert "judge.base_url" in caught.value.fix
        assert "rule" in caught.value.fix


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan")])
def test_a_rule_outside_its_labels_is_no_score(value: float) -> None:
    with pytest.raises(JudgeError, match="outside"):
        asyncio.run(RuleJudge().grade(rule_rubric(lambda fields: value), answer="x"))


def test_a_rule_that_raises_is_the_rewards_fault() -> None:
    with pytest.raises(RewardError, match="KeyError"):
        asyncio.run(RuleJudge().grade(rule_rubric(lambda fields: float(fields["gold"])), answer="x"))
    with pytest.raises(JudgeError, match="none of -1, 0, 1"):
        asyncio.run(RuleJudge().prefer(rule_rubric(compare_rule=lambda a, b, fields: 2), "x", "y"))

"""Saying "I do not know" at the right time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfactory import Answer, Episode, Evidence, Probe, Score, Task
from memfactory.reward.catalogue import load_dimension


def episode(*pairs, memory="", answerable=None):
    """One question per (text, evidence); the gold answer is Rome."""
    answers = [
        Answer(Probe("Where?", ("Rome",), tuple(Evidence(fact, 0) for fact in facts)), text, text or "")
        for text, facts in pairs
    ]
    metadata = {} if answerable is None else {"answerable": answerable}
    return Episode(Task("t", (), tuple(a.probe for a in answers), metadata), answers=answers, memory=memory)


def score(*pairs, **options):
    phrases = {"phrases": options.pop("phrases")} if "phrases" in options else {}
    result = load_dimension("abstention.calibrated").function(episode(*pairs, **options), **phrases)
    return result.value if isinstance(result, Score) else result


HELD = {"memory": "Mia lives in Rome since May"}
LOST = {"memory": "Leo has a code"}
FACTS = ("lives in Rome", "May")


@pytest.mark.parametrize(
    ("text", "held", "lost"),
    [
        ("Rome", 1, 0),
        ("Paris", 1, 0),  # wrong, but that is what answer rewards are for
        ("I do not know.", 0, 1),
        ("I don't know", 0, 1),
        ("I don\u2019t know", 0, 1),
        ("The memory holds no information about it", 0, 1),
        ("It is not mentioned.", 0, 1),
        ("I do not know, but Rome", 1, 0),  # an answer behind a disclaimer is an answer
        ("The Tomb of the Unknown Soldier", 1, 0),
        ("", 1, 0),
        (None, 0, 0),
    ],
)
def test_calibrated(text, held, lost):
    assert score((text, FACTS), **HELD) == held
    assert score((text, FACTS), **LOST) == lost


def test_all_evidence_is_needed():
    assert score(("I do not know", FACTS), memory="lives in Rome") == 1
    assert score(("Rome", FACTS), memory="lives in Rome") == 0


def test_tasks_without_an_answer():
    assert score(("I do not know", FACTS), **HELD, answerable=False) == 1
    assert score(("Rome", ()), answerable=False) == 0
    assert score(("I do not know", ()), answerable=False) == 1
    # answerable, without evidence: nobody can tell whether the memory supports an answer
    for answerable in (True, None):
        assert score(("I do not know", ()), answerable=answerable) is None


def test_mean_over_the_questions_that_can_be_judged():
    assert score(("Rome", FACTS), ("I do not know", FACTS), ("Rome", ()), **HELD) == 0.5
    assert score() is None


def test_own_phrases():
    assert score(("weiß ich nicht", FACTS), **LOST, phrases=("weiß ich nicht",)) == 1
    assert score(("I do not know", FACTS), **LOST, phrases=("weiß ich nicht",)) == 0
    bound = load_dimension("abstention.calibrated").bind({"phrases": ["pass"]})
    assert bound.function(episode(("Pass!", FACTS), **LOST)) == 1


def test_to_forget_and_abstain_is_a_gate_passed_and_nothing_earned():
    one = episode(("I do not know", FACTS), memory="")
    assert load_dimension("abstention.calibrated").role == "gate"
    assert load_dimension("abstention.calibrated").function(one) == 1
    assert load_dimension("answer.token_f1").function(one) == 0


@given(st.text(max_size=40), st.booleans())
def test_exactly_one_of_the_two_situations_rewards_a_text(text, answerable):
    held, lost = score((text, FACTS), **HELD), score((text, FACTS), **LOST)
    assert held + lost == 1
    assert score((text, FACTS), **HELD, answerable=answerable) == (held if answerable else lost)

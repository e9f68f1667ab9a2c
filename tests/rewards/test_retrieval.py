"""Rewards on what was looked up, and on what the answer cites."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfactory import Episode, Evidence, Probe, Retrieved, Score, StopReason, Task, Turn
from memfactory.reward.catalogue import load_dimension

FACTS = ("code is 25", "lives in Rome")
ENTRIES = {
    "m1": "Leo's code is 25.",
    "m2": "Mia lives in Rome",
    "m3": "Tom likes tea",
    "m4": "the weather",
    "m5": "mia lives in rome!",  # m2 again
    "m6": "His code is 25 and she lives in Rome",
}


def turn(ids=(), cited=(), chunk=None, module="answer"):
    entries = [Retrieved(name, ENTRIES[name]) for name in ids]
    return Turn(module, [], [], [], "", StopReason.STOP, chunk=chunk, retrieved=entries, cited=list(cited))


def episode(*turns, facts=(FACTS,)):
    probes = tuple(Probe("?", ("x",), tuple(Evidence(text, 0) for text in own)) for own in facts)
    return Episode(Task("t", ("...",), probes), list(turns))


def score(name, one, **options):
    result = load_dimension(f"retrieval.{name}").function(one, **options)
    return result.value if isinstance(result, Score) else result


@pytest.mark.parametrize(
    ("ids", "k", "recall", "precision"),
    [
        (["m1", "m2", "m3", "m4"], 5, 1, 1 / 2),
        (["m1", "m2", "m3", "m4"], 1, 1 / 2, 1),
        (["m3", "m4", "m1", "m2"], 2, 0, 0),
        (["m6"], 5, 1, 1),  # one entry may hold everything
        (["m2", "m5"], 5, 1 / 2, 1 / 2),  # the second copy is not relevant
        (["m3"], 5, 0, 0),
    ],
)
def test_recall_and_precision(ids, k, recall, precision):
    one = episode(turn(ids))
    assert score("recall_at_k", one, k=k) == pytest.approx(recall)
    assert score("precision_at_k", one, k=k) == pytest.approx(precision)


def test_the_default_k_is_five():
    ids = ["m3", "m4", "m2", "m5", "m1", "m6"]
    assert score("precision_at_k", episode(turn(ids))) == pytest.approx(2 / 5)


def test_a_fact_is_not_pieced_together_from_two_entries():
    one = episode(turn(["m3", "m4"]), facts=(("tea weather",),))
    assert score("recall_at_k", one) == 0


@pytest.mark.parametrize(
    ("ids", "cited", "value"),
    [
        (["m1", "m2", "m3"], ["m1", "m2"], 1),
        (["m1", "m2", "m3"], ["m1"], 2 / 3),  # precision 1, recall 1/2
        (["m1", "m2", "m3"], ["m1", "m2", "m3"], 4 / 5),
        (["m1", "m2", "m3"], [], 0),
        (["m1"], ["m1", "m1"], 1),
        (["m1"], ["m1", "m9"], 2 / 3),  # m9 was never shown
        (["m3"], ["m3"], 0),
        (["m3"], [], None),
    ],
)
def test_citation(ids, cited, value):
    assert score("citation", episode(turn(ids, cited))) == (value if value is None else pytest.approx(value))


def test_each_question_has_its_own_evidence():
    first, second = turn(["m1", "m3"], ["m1"]), turn(["m1"], ["m1"])
    one = episode(turn(["m4"], chunk=0, module="update"), first, second, facts=(FACTS[:1], FACTS[1:]))
    assert score("recall_at_k", one) == 0.5
    assert score("precision_at_k", one) == 0.25
    assert score("citation", one) == 0.5
    # a question for which nothing was shown counts 0
    assert score("recall_at_k", episode(first, turn(), facts=(FACTS[:1], FACTS[1:]))) == 0.5
    assert score("precision_at_k", episode(first, turn(), facts=(FACTS[:1], FACTS[1:]))) == 0.25
    # and one without evidence is left out
    assert score("recall_at_k", episode(first, second, facts=(FACTS[:1], ()))) == 1


def test_other_numbers_of_turns_and_questions_share_the_evidence():
    one = episode(turn(["m1"]), turn(["m6"]), turn(), facts=(FACTS,))
    assert score("recall_at_k", one) == pytest.approx((1 / 2 + 1) / 2)


@pytest.mark.parametrize("name", ["recall_at_k", "precision_at_k", "citation"])
def test_what_cannot_be_measured_is_none_with_a_reason(name):
    dimension = load_dimension(f"retrieval.{name}")
    nothing = episode(turn(), turn(["m1"], chunk=0))  # only a turn that writes looked something up
    assert "nothing was retrieved" in dimension.function(nothing).reason
    assert "no evidence" in dimension.function(episode(turn(["m1"], ["m1"]), facts=((),))).reason
    assert dimension.missing == "drop"


IDS = st.lists(st.sampled_from(sorted(ENTRIES)), unique=True, min_size=1)


@given(IDS, st.randoms(), st.integers(1, 6))
def test_the_order_among_the_first_k_does_not_matter(ids, rng, k):
    head = ids[:k]
    rng.shuffle(head)
    for name in ("recall_at_k", "precision_at_k"):
        assert score(name, episode(turn(head + ids[k:])), k=k) == score(name, episode(turn(ids)), k=k)


@given(IDS, st.integers(1, 6))
def test_recall_grows_with_k_and_agrees_with_a_plain_count(ids, k):
    relevant = {"m1": {0}, "m2": {1}, "m5": {1}, "m6": {0, 1}}
    found = set().union(*(relevant.get(name, set()) for name in ids[:k]))
    one = episode(turn(ids))
    assert score("recall_at_k", one, k=k) == len(found) / 2
    assert score("recall_at_k", one, k=k) <= score("recall_at_k", one, k=k + 1)


@given(IDS, st.lists(st.sampled_from([*sorted(ENTRIES), "m9"]), unique=True))
def test_citation_agrees_with_precision_and_recall(ids, cited):
    relevant = {"m1", "m2", "m5", "m6"} & set(ids)
    hits = len(relevant & set(cited))
    value = score("citation", episode(turn(ids, cited)))
    if not relevant and not cited:
        assert value is None
    elif not hits:
        assert value == 0
    else:
        precision, recall = hits / len(cited), hits / len(relevant)
        assert value == pytest.approx(2 * precision * recall / (precision + recall))

"""Comparing answers: hand-made cases, and an implementation written another way."""

from __future__ import annotations

import math
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU

from memfactory.reward.matching import bleu_1, contains, exact_match, normalise, token_f1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Eiffel Tower!", "eiffel tower"),
        ("a.b.c.", "abc"),
        ("U.S.A.", "usa"),
        ("  an Apple\n", "apple"),
        ("theatre", "theatre"),
        ("The the a", ""),
        ("Zürich", "zürich"),
        ("", ""),
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("answer", "gold", "equal", "inside", "f1"),
    [
        ("Paris", ["Paris"], True, True, 1.0),
        ("the paris.", ["Lyon", "Paris"], True, True, 1.0),
        ("It is Paris", ["Paris"], False, True, 0.5),  # 2 * 1 / (3 + 1)
        ("New York City", ["York New"], False, False, 0.8),  # 2 * 2 / (3 + 2)
        ("comparison", ["Paris"], False, False, 0.0),  # a substring of a word is no word
        ("12", ["1"], False, False, 0.0),
        ("yes yes yes", ["yes"], False, True, 0.5),  # a word counts as often as both have it
        ("", ["Paris"], False, False, 0.0),
        ("the", ["Paris"], False, False, 0.0),
        ("", ["the"], True, False, 1.0),
        ("Paris", [], False, False, 0.0),
        ("Paris", ["", "."], False, False, 0.0),  # an alias of nothing is in every answer, and is no answer
    ],
)
def test_by_hand(answer, gold, equal, inside, f1):
    assert exact_match(answer, gold) is equal
    assert contains(answer, gold) is inside
    assert token_f1(answer, gold) == pytest.approx(f1)


def test_fifty_word_texts_by_hand():
    """7 common words of 10 and 20: precision .7, recall .35, F1 = 2 * .7 * .35 / 1.05 = .466667"""
    answer = " ".join(f"x{i}" for i in range(10))
    gold = " ".join([f"x{i}" for i in range(7)] + [f"y{i}" for i in range(13)])
    assert token_f1(answer, [gold]) == pytest.approx(0.4666667)


def squad_normalise(text):
    """The SQuAD evaluation script's own three steps, character by character."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    text = re.sub(r"\b(a|an|the)\b", " ", text)
    return text.split()


def squad_f1(answer, gold):
    one, other = squad_normalise(answer), squad_normalise(gold)
    left = list(other)
    common = 0
    for word in one:
        if word in left:
            left.remove(word)
            common += 1
    if not one or not other:
        return float(one == other)
    if not common:
        return 0.0
    precision, recall = common / len(one), common / len(other)
    return 2 * precision * recall / (precision + recall)


sentences = st.lists(
    st.sampled_from(["the", "A", "an", "and", "cat", "Cat.", "sat", "mat!", "x-y", "é", "12"]), max_size=8
).map(" ".join)


@given(sentences, st.lists(sentences, max_size=3))
def test_equals_squad(answer, gold):
    assert token_f1(answer, gold) == pytest.approx(max((squad_f1(answer, g) for g in gold), default=0.0))
    assert exact_match(answer, gold) == any(squad_normalise(answer) == squad_normalise(g) for g in gold)
    words = squad_normalise(answer)
    inside = any(
        g and any(words[i : i + len(g)] == g for i in range(len(words) - len(g) + 1))
        for g in map(squad_normalise, gold)
    )
    assert contains(answer, gold) == inside


@given(sentences | st.text(), sentences | st.text())
def test_token_f1_and_exact_match_are_those_that_transformers_has_for_squad(answer, gold):
    squad = pytest.importorskip("transformers.data.metrics.squad_metrics")
    assert token_f1(answer, [gold]) == pytest.approx(squad.compute_f1(gold, answer))
    assert exact_match(answer, [gold]) == bool(squad.compute_exact(gold, answer))


@given(st.text(), st.lists(st.text(), max_size=3))
def test_any_text_gives_a_number_and_the_measures_agree(answer, gold):
    f1 = token_f1(answer, gold)
    assert 0.0 <= f1 <= 1.0
    if exact_match(answer, gold):
        assert f1 == 1.0
    if contains(answer, gold):
        assert f1 > 0.0
    assert normalise(normalise(answer)) == normalise(answer)


def test_bleu_1_of_the_papers_example():
    """Papineni et al. 2002, section 2.1: "the" seven times; normalisation takes articles away, so "cat" stands in."""
    assert bleu_1("cat cat cat cat cat cat cat", ["on a mat sat one cat or two cat"]) == pytest.approx(
        2 / 7 * math.exp(1 - 8 / 7)
    )
    assert bleu_1("red", ["red blue"]) == pytest.approx(math.exp(-1))  # every word is right, half of them is said


@given(
    st.lists(st.sampled_from(["red", "blue", "green", "7"]), min_size=1, max_size=9),
    st.lists(st.lists(st.sampled_from(["red", "blue", "green", "8"]), min_size=1, max_size=9), min_size=1, max_size=3),
)
def test_bleu_1_is_sacrebleus(answer, golds):
    """sacrebleu with one alias at a time: several references at once would be clipped together."""
    theirs = BLEU(max_ngram_order=1, tokenize="none", smooth_method="none", force=True)
    best = max(theirs.sentence_score(" ".join(answer), [" ".join(gold)]).score for gold in golds)
    assert bleu_1(" ".join(answer), [" ".join(gold) for gold in golds]) == pytest.approx(best / 100)

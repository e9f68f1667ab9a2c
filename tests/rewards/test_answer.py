"""Rewards on the answer: what counts as right."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfactory import Answer, Episode, Probe, Score, Task
from memfactory.reward.catalogue import load_dimension


def episode(*pairs, required=None):
    """One question per (text, raw, gold)."""
    answers = [Answer(Probe("What?", tuple(gold)), text, raw) for text, raw, gold in pairs]
    metadata = {} if required is None else {"required": required}
    return Episode(Task("t", (), tuple(a.probe for a in answers), metadata), answers=answers)


def score(name, *pairs, required=None, **options):
    return load_dimension(f"answer.{name}").function(episode(*pairs, required=required), **options)


def plain(text, *gold):
    return (text, text or "", gold)


@pytest.mark.parametrize(
    ("text", "gold", "tolerance", "value"),
    [
        ("1,000", "1000", 0, 1),
        ("1e3", "1,000", 0, 1),
        ("3.50", "3.5", 0, 1),
        ("$3.50", "3.5", 0, 1),
        ("25%", "0.25", 0, 1),
        ("25 percent", "25 %", 0, 1),
        ("25", "25%", 0, 0),
        ("-5", "-5", 0, 1),
        ("\u22125", "-5", 0, 1),
        ("-$5", "-5", 0, 1),
        ("5", "-5", 0, 0),
        ("+5", "5", 0, 1),
        ("-0", "0", 0, 1),
        ("it is 42, yes 42.0", "42", 0, 1),
        ("41 or 42", "42", 0, 0),  # listing candidates does not pay
        ("A42", "42", 0, 0),
        ("1.2.3", "1.2", 0, 0),  # a version is no number, nor is its end
        ("1.2.3", "3", 0, 0),
        ("3-5", "-5", 0, 0),
        ("forty-two", "42", 0, 0),
        ("12 km", "12", 0, 1),
        ("12345678901234567890", "12345678901234567891", 0, 0),  # no rounding to floats
        ("1e999999999", "5", 1.0, 0),
        ("3.6", "3.5", 0.1, 1),  # the edge belongs to it
        ("3.61", "3.5", 0.1, 0),
        ("3.4", "3.5", 0.1, 1),
        (None, "5", 0, 0),
        ("", "5", 0, 0),
    ],
)
def test_numeric(text, gold, tolerance, value):
    assert score("numeric", plain(text, gold), tolerance=tolerance) == value


def test_numeric_takes_the_best_alias_and_leaves_out_questions_without_a_number():
    assert score("numeric", plain("7", "seven", "7")) == 1
    assert score("numeric", plain("7", "7"), plain("Paris", "Paris"), plain("8", "7")) == 0.5
    nothing = score("numeric", plain("Paris", "Paris"))
    assert isinstance(nothing, Score)
    assert nothing.value is None
    assert "no gold answer is a number" in nothing.reason


@given(st.integers(-(10**30), 10**30), st.integers(-(10**30), 10**30))
def test_numeric_on_whole_numbers_is_their_equality(x, y):
    assert score("numeric", plain(f"{x:,}", str(y))) == (x == y)
    assert score("numeric", plain(f"{x}", f"{x:,}")) == 1


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.floats(0, 1e6), st.floats(0, 1e6))
def test_a_wider_tolerance_never_costs(x, gold, narrow, wide):
    low, high = sorted((narrow, wide))
    pair = plain(repr(x), repr(gold))
    assert score("numeric", pair, tolerance=low) <= score("numeric", pair, tolerance=high)


@given(st.text(max_size=60))
def test_numeric_reads_any_text(text):
    assert score("numeric", plain(text, "5")) in (0, 1)


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (r"so \boxed{Paris}", 1),
        (r"\boxed{Lyon} no, \boxed{the Paris.}", 1),
        (r"\boxed{Paris} no, \boxed{Lyon}", 0),
        (r"\boxed{Paris} no, \boxed{Paris", 0),  # unclosed
        (r"\boxed{{Paris}}", 1),
        ("Paris", 0),
        ("", 0),
        (r"<think>\boxed{Paris}</think> I am not sure", 0),
        (r"<think>hm</think>\boxed{Paris}", 1),
        (r"<think>\boxed{Paris}", 0),
        (r"\boxed{Paris}" + " blah" * 1000, 1),  # not only the last 300 characters
        (r"\boxed{" * 20_000, 0),
    ],
)
def test_boxed(raw, value):
    assert score("boxed", ("whatever was extracted", raw, ["Paris"])) == value


def test_parts_and_means():
    assert score("all_parts", plain("x and z", "x, y, z"), required=["x", "y", "z", "w"]) == 0.5
    assert score("all_parts", plain("x", "x, y")) == 0
    assert score("exact_match", plain("Paris", "Paris"), plain(None, "Lyon"), plain("Rome", "Lyon", "Rome")) == 2 / 3
    assert score("number_match", plain("007", "7")) == 0


@pytest.mark.parametrize(
    "name", ["exact_match", "containment", "token_f1", "all_parts", "number_match", "numeric", "boxed"]
)
def test_an_episode_without_answers_is_no_zero(name):
    result = score(name)
    assert isinstance(result, Score)
    assert result.value is None


@given(st.permutations([plain("a", "a"), plain("b", "c"), plain("c d", "c"), plain(None, "e"), plain("3", "3")]))
def test_the_order_of_questions_does_not_matter(pairs):
    assert score("token_f1", *pairs) == pytest.approx((1 + 0 + 2 / 3 + 0 + 1) / 5)
    assert score("numeric", *pairs) == 1


def test_numeric_agrees_with_a_simple_implementation_on_simple_texts():
    for text in ("3", "3.25", "0.1", "-17", "2e4", "1,234,567"):
        for gold in ("3", "3.25", "0.1", "-17", "20000", "1234567"):
            simple = json.loads(re.sub(",", "", text)) == json.loads(gold)
            assert score("numeric", plain(text, gold)) == simple

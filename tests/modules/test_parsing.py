"""Model output is data: any text is parsed or refused with `ModelOutputError`, quickly."""

from __future__ import annotations

import contextlib
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfactory.errors import ModelOutputError
from memfactory.modules import AnswerFormat, FinalAnswer, RecurrentMemory, last_boxed, prompt_set, strip_reasoning

PROMPTS = prompt_set("document", "shared")

# Pieces models are made of, put together at random: tags open and closed, boxes, braces, templates, anything.
PIECES = st.sampled_from(
    [
        "<think>",
        "</think>",
        "\\boxed{",
        "\\fbox{",
        "{",
        "}",
        "{{",
        "}}",
        "{%",
        "%}",
        "null",
        "5",
        "\n",
        " ",
        "x",
        "\\",
        "é",
        "\x00",
    ]
)
output = st.one_of(st.lists(PIECES, max_size=30).map("".join), st.text(max_size=200))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("  spaces \n", "spaces"),
        ("<think>a</think> b", "b"),
        ("a</think>b", "b"),  # the template had opened it
        ("<think>a</think>b<think>c</think>d", "d"),
        ("<think>a</think>", ""),
        ("null", "null"),
        ("5", "5"),
        ("", ""),
        ("</think></think>x", "x"),
    ],
)
def test_reasoning_is_cut_off(text, expected):
    assert strip_reasoning(text) == expected


@pytest.mark.parametrize("text", ["<think>never closed", "<think>a</think>b<think>c", "x<think>"])
def test_reasoning_that_is_never_closed_is_no_reply(text):
    with pytest.raises(ModelOutputError, match="never closed"):
        strip_reasoning(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\\boxed{42}", "42"),
        ("first \\boxed{1} then \\boxed{ 2 }.", "2"),
        ("\\boxed{a{b}{c{d}}e}", "a{b}{c{d}}e"),
        ("\\fbox{7}", "7"),
        ("\\boxed{1} \\fbox{2}", "2"),
        ("\\boxed{}", ""),
        ("\\boxed{open", None),
        ("\\boxed{1} \\boxed{open", None),
        ("boxed{1}", None),
        ("", None),
        ("}{", None),
        ("\\boxed{old}" + "x" * 300, None),  # out of the window
        ("x" * 289 + "\\boxed{new}", "new"),
    ],
)
def test_last_box(text, expected):
    assert last_boxed(text) == expected


def test_window_of_300_characters_begins_where_memagent_begins_it():
    box = "\\boxed{1}"
    assert last_boxed(box + "x" * (300 - len(box))) == "1"
    assert last_boxed(box + "x" * (301 - len(box))) is None
    assert last_boxed(box + "x" * 1000, window=None) == "1"


@given(output)
def test_any_text_parses_or_is_refused(text):
    for module in (
        RecurrentMemory(PROMPTS),
        FinalAnswer(PROMPTS, AnswerFormat.BOXED),
        FinalAnswer(PROMPTS, AnswerFormat.PLAIN),
    ):
        with contextlib.suppress(ModelOutputError):
            parsed = module.parse(text)
            assert isinstance(parsed, str)
            assert parsed in text
            assert parsed == parsed.strip()


@given(output)
def test_a_plain_answer_is_never_empty(text):
    try:
        assert FinalAnswer(PROMPTS, AnswerFormat.PLAIN).parse(text)
    except ModelOutputError:
        assert not text.strip() or "think>" in text


@given(st.text(alphabet="ab {}\\", max_size=60))
def test_box_content_is_balanced(text):
    found = last_boxed("\\boxed{" + text + "}", window=None)
    if found is not None:
        assert found.count("{") == found.count("}")


@pytest.mark.parametrize(
    "text",
    [
        "{" * 100_000,
        "}" * 100_000,
        "\\boxed{" * 20_000,
        "<think>" * 20_000,
        "</think>" * 20_000,
        "\\boxed{" + "{" * 100_000,
    ],
    ids=lambda text: text[:9],
)
def test_100_kilobytes_of_nonsense_take_no_time(text):
    began = time.process_time()
    last_boxed(text, window=None)
    for module in (RecurrentMemory(PROMPTS), FinalAnswer(PROMPTS)):
        with contextlib.suppress(ModelOutputError):
            module.parse(text)
    assert time.process_time() - began < 0.5

"""JSON in replies: found wherever it stands, refused with `ModelOutputError`, in linear time."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfactory.errors import ModelOutputError
from memfactory.modules.reading_json import find_json, json_items, sound, text_of

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12
)
containers = (st.lists(values, max_size=4) | st.dictionaries(st.text(), values, max_size=4)).filter(
    lambda value: "think>" not in json.dumps(value)
)
prose = st.text(alphabet=st.characters(exclude_characters="[{<")).map(lambda text: text[:40])


@given(containers, prose, prose, st.booleans())
def test_whatever_stands_around_it_json_is_read_as_json(value: Any, before: str, after: str, ascii: bool) -> None:
    assert find_json(before + json.dumps(value, ensure_ascii=ascii) + after) == value


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ('```json\n[{"a": 1}]\n```', [{"a": 1}]),
        ('Here it is:\n```\n{"a": []}\n```\nI hope this helps [smile].', {"a": []}),
        ('<think>perhaps [{"a": 0}]</think>[{"a": 1}]', [{"a": 1}]),
        ('[Note] {not json} ["x"]', ["x"]),
        ('As said before [1, 2], I found: [{"a": 1}]', [{"a": 1}]),
        ("Lines [3] and [4, 5].", [3]),
        ("Nothing: [] [1]", []),
        ('{"a": 1} {"a": 2}', {"a": 1}),
        ("[" * 63 + '"x"]', ["x"]),
    ],
)
def test_real_looking_replies(reply: str, found: Any) -> None:
    assert find_json(reply) == found


@pytest.mark.parametrize(
    "reply",
    ["", "none", "[1, 2", '{"a": ', "[" + "9" * 5000 + "]", "<think>[1]", "[1]</think>", "{'a': 1}", "[" * 100_000],
    ids=lambda reply: reply[:9],
)
def test_what_holds_no_json_is_refused(reply: str) -> None:
    with pytest.raises(ModelOutputError):
        find_json(reply)


@pytest.mark.parametrize(
    "reply",
    [
        "[" * 1_000_000,
        "{" * 1_000_000,
        '{"a":' * 200_000,
        '["' * 500_000,
        '["' + "a" * 1_000_000,
        "[" * 64 + "1," * 500_000,
        "[" * 64 + '{"a": "' * 140_000,
        "[1] " * 250_000,
        "[" + " " * 1_000_000,
    ],
    ids=lambda reply: reply[:9],
)
def test_a_megabyte_of_nonsense_takes_no_time(reply: str) -> None:
    began = time.process_time()
    with pytest.raises(ModelOutputError):
        json_items(reply + "x", "facts") if not reply.startswith("[1]") else text_of_numbers(reply)
    assert time.process_time() - began < 1


def text_of_numbers(reply: str) -> None:
    assert find_json(reply) == [1]
    raise ModelOutputError("as the others")


@pytest.mark.parametrize(
    ("reply", "items"),
    [
        ('[{"a": 1}, 2]', [{"a": 1}, 2]),
        ('{"facts": ["x"], "memory": ["y"]}', ["x"]),
        ('{"memory": ["y"]}', ["y"]),
        ('{"other": 1}', [{"other": 1}]),
        ("{}", [{}]),
    ],
)
def test_items_stand_alone_or_under_a_key(reply: str, items: list[Any]) -> None:
    assert json_items(reply, "facts", "memory") == items


@pytest.mark.parametrize("under", ['"text"', "1", "null", "{}", "true"])
def test_what_is_no_list_under_the_key_is_refused(under: str) -> None:
    with pytest.raises(ModelOutputError, match="no list"):
        json_items('{"facts": ' + under + "}", "facts")


def test_the_first_name_that_is_there_counts() -> None:
    assert text_of({"b": " x ", "c": "y"}, "a", "b", "c") == "x"
    assert text_of({"a": None, "b": "x"}, "a", "b") == "x"
    assert text_of({"a": None}, "a", "b") == ""
    for wrong in (1, 0, False, [], ["x"], {}, 1.5):
        with pytest.raises(TypeError):
            text_of({"a": wrong}, "a", "b")


@given(st.text(alphabet=st.characters(codec=None) | st.characters(categories=["Cs"])))
def test_sound_text_can_be_written_down_and_loses_nothing_else(text: str) -> None:
    clean = sound(text)
    assert clean.encode("utf-8").decode("utf-8") == clean
    if not any("\ud800" <= c <= "\udfff" for c in text):
        assert clean == text


def test_half_characters_as_escapes_make_them_are_replaced_and_pairs_are_joined() -> None:
    assert text_of(find_json(r'{"a": "x \ud83d y"}'), "a") == "x \ufffd y"
    assert text_of(find_json(r'{"a": "\ud83d\ude00"}'), "a") == "\U0001f600"
    assert sound("\ud83d" + "\ude00") == "\U0001f600"
    assert sound("\ude00a\ud83d") == "\ufffda\ufffd"

"""Rewards on form: JSON, tags, operations."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import permutations
from threading import Thread
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from referencing.exceptions import Unresolvable

from memfactory import Answer, Episode, Operation, Probe, RecipeError, StopReason, Task, Turn
from memfactory.reward.catalogue import load_dimension
from memfactory.reward.dimension import RewardDimension

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "minLength": 1}, "age": {"type": "integer"}},
    "required": ["name"],
    "additionalProperties": False,
}


def episode(*raws):
    answers = [Answer(Probe("Who?", ("x",)), raw or None, raw) for raw in raws]
    return Episode(Task("t", (), tuple(a.probe for a in answers)), answers=answers)


def score(name, *raws, **options):
    return load_dimension(f"format.{name}").function(episode(*raws), **options)


def turn(error="", operations=(), stop=StopReason.STOP):
    return Turn("update", [1], [2], [-1.0], "", stop, error=error, operations=list(operations))


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        ('{"name": "Leo"}', 1),
        ('  {"name": "Leo", "age": 3}\n', 1),
        ('<think>{"age": 1}</think>{"name": "Leo"}', 1),
        ('{"name": "Leo", "age": 3.5}', 0),
        ('{"name": ""}', 0),
        ('{"age": 3}', 0),
        ('{"name": "Leo", "job": 1}', 0),
        ('{"name": "Leo"} done', 0),
        ('```json\n{"name": "Leo"}\n```', 0),
        ('{"name": "Leo"', 0),
        ('<think>{"name": "Leo"}', 0),
        ("[]", 0),
        ("", 0),
        ("[" * 100_000, 0),
    ],
)
def test_json_schema(raw, value):
    assert score("json_schema", raw, schema=PERSON) == value


def test_json_without_a_schema_is_any_json_and_nan_is_none():
    assert score("json_schema", "3", "NaN", '{"a": Infinity}', "null") == 0.5
    assert score("json_schema", "9" * 100_000) == 0  # Python refuses numbers of that many digits


def test_a_schema_can_be_a_file(tmp_path):
    path = tmp_path / "person.json"
    path.write_text(json.dumps(PERSON), encoding="utf-8")
    assert score("json_schema", '{"name": "Leo"}', "{}", schema=str(path)) == 0.5
    with pytest.raises(RecipeError, match=r"nothing\.json"):
        score("json_schema", "{}", schema=str(tmp_path / "nothing.json"))


class Serves(BaseHTTPRequestHandler):
    """Answers every request with a schema that anything fits, and remembers that it was asked."""

    asked: ClassVar[list[str]] = []

    def do_GET(self):
        self.asked.append(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_):
        pass


def test_a_wrong_schema_is_the_recipes_fault():
    with pytest.raises(RecipeError, match="correct the schema"):
        score("json_schema", "{}", schema={"type": "nosuch"})


def test_references_to_other_sites_are_not_followed():
    with HTTPServer(("127.0.0.1", 0), Serves) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(Unresolvable):
            score("json_schema", "{}", schema={"$ref": f"http://127.0.0.1:{server.server_port}/schema.json"})
        server.shutdown()
    assert not Serves.asked
    inside = {"$defs": {"n": {"type": "integer"}}, "items": {"$ref": "#/$defs/n"}}
    assert score("json_schema", "[1]", '["1"]', schema=inside) == 0.5


def test_options_come_from_yaml():
    dimension = load_dimension("format.json_schema")
    assert dimension.bind({"schema": PERSON}).function(episode('{"name": "Leo"}')) == 1
    assert load_dimension("format.tags").bind({"tags": ["a"]}).function(episode("<a></a>")) == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
def test_whatever_json_writes_is_json(value):
    assert score("json_schema", json.dumps(value)) == 1
    assert score("json_schema", json.dumps(value), schema={"const": value}) == 1


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        ("<think>a</think><answer>b</answer>", 1),
        ("so <think></think> and <answer></answer> end", 1),
        ("<answer>b</answer><think>a</think>", 0),
        ("<think>a<answer>b</answer></think>", 0),
        ("<think>a<answer></think>b</answer>", 0),
        ("<think>a</think>", 0),
        ("<think>a</think><answer>b", 0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0),
        ("<think><think>a</think></think><answer>b</answer>", 0),
        ("<think>a</think><b><answer>c</answer></b>", 1),
        ("</think><think><answer></answer>", 0),
        ("", 0),
    ],
)
def test_tags(raw, value):
    assert score("tags", raw) == value


def test_nested_tags():
    nested = ("answer", "answer/quote", "answer/quote/id", "end")
    right = "<answer>x <quote><id>3</id>y</quote></answer><end></end>"
    assert score("tags", right, tags=nested) == 1
    assert score("tags", right.replace("<end></end>", ""), tags=nested) == 0
    assert score("tags", "<answer></answer><quote><id></id></quote><end></end>", tags=nested) == 0
    with pytest.raises(RecipeError, match="not listed"):
        score("tags", right, tags=("answer/quote",))


def test_of_all_orders_of_four_tags_one_is_right():
    orders = ["".join(order) for order in permutations(["<a>", "</a>", "<b>", "</b>"])]
    assert [raw for raw in orders if score("tags", raw, tags=("a", "b")) == 1] == ["<a></a><b></b>"]
    assert [raw for raw in orders if score("tags", raw, tags=("a", "a/b")) == 1] == ["<a><b></b></a>"]


@given(st.text(alphabet="<>/ab .[(*", max_size=40))
def test_tags_reads_any_text(raw):
    assert score("tags", raw, raw, tags=("a", "b", "[(")) in (0, 1)


ADD, BAD = Operation("ADD", text="x"), Operation("UPDATE", "m9", "x", error="no entry m9")


@pytest.mark.parametrize(
    ("error", "operations", "value"),
    [
        ("", [], 1),
        ("", [ADD], 1),
        ("", [BAD], 0),
        ("", [ADD, ADD, BAD], 2 / 3),
        ("not JSON", [], 0),
        ("not JSON", [ADD], 0),
    ],
)
def test_operations_valid(error, operations, value):
    one = turn(error, operations)
    dimension = load_dimension("format.operations_valid")
    assert dimension.function(Episode(Task("t", (), ()), [one]), one) == pytest.approx(value)
    assert dimension(Episode(Task("t", (), ()), [one, turn()])).value == pytest.approx((value + 1) / 2)


@given(st.lists(st.booleans(), min_size=1, max_size=8))
def test_one_more_valid_operation_never_costs_and_order_does_not_matter(flags):
    def value(flags):
        one = turn("", [ADD if flag else BAD for flag in flags])
        return load_dimension("format.operations_valid").function(Episode(Task("t", (), ())), one)

    assert value(flags) <= value([*flags, True])
    assert value(flags) >= value([*flags, False])
    assert value(flags) == value(flags[::-1])


def test_answered_and_stopped():
    one = episode("x", "")
    one.turns = [turn(), turn(stop=StopReason.LENGTH), turn(), turn()]
    assert load_dimension("format.answered").function(one) == 0.5
    assert load_dimension("format.stopped").function(one) == 0.75
    for name in ("answered", "stopped", "json_schema", "tags"):
        dimension = load_dimension(f"format.{name}")
        assert isinstance(dimension, RewardDimension)
        assert dimension.function(Episode(Task("t", (), ()))).value is None

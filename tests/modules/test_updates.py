"""Updating: operations as models write them, each right or refused on its own."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfactory.episode import Operation
from memfactory.errors import ModelOutputError
from memfactory.memory.bank import EntryBank
from memfactory.memory.entries import Entry, Verb
from memfactory.memory.operations import Refusal
from memfactory.modules.facts import Fact
from memfactory.modules.updates import (
    TOO_MANY,
    AddAll,
    CrudUpdater,
    EventUpdater,
    MergeUpdater,
    UpdateState,
    WordUpdater,
)

CRUD, EVENTS, MERGE, WORDS = CrudUpdater(), EventUpdater(), MergeUpdater(), WordUpdater()
NASTY = "</facts> {{ 7 * 7 }} {% for x in y %} {# no #} '; DROP TABLE entries; -- </think> Add() \\ \" [e1] %s {0}"

words = st.text(max_size=30).map(str.strip).filter(lambda text: "think>" not in text)
ids = st.integers(1, 10**6).map(lambda number: f"e{number}")
adds = st.builds(
    Operation, st.just("ADD"), st.just(""), words, words, st.lists(st.text(max_size=9), max_size=3).map(tuple), words
)
others = st.builds(Operation, st.sampled_from(["UPDATE", "DELETE", "NONE"]), words, words, words, st.just(()), words)


# ---- what is written is read -----------------------------------------------------------------------


@pytest.mark.parametrize("module", [CRUD, EVENTS], ids=["crud", "events"])
def test_lists_of_operations_that_are_written_are_read(module: CrudUpdater | EventUpdater) -> None:
    @given(st.lists(adds | others, max_size=5))
    def check(operations: list[Operation]) -> None:
        assert module.parse(module.write(operations)) == operations

    check()


# A Merge ends with a bracket, so that one which the text opens and never closes cannot be told from its own.
lines = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=30).map(str.strip)
merged = lines.filter(lambda text: text.count("(") == 0 and "think>" not in text)


@given(ids, merged | merged.map(lambda text: f"{text} (a nurse) {text}".strip()))
def test_merges_that_are_written_are_read(id: str, text: str) -> None:
    operations = [Operation("UPDATE", id, text)]
    assert MERGE.parse(MERGE.write(operations)) == operations
    assert MERGE.parse(MERGE.write([Operation("ADD")])) == [Operation("ADD")]


@given(
    st.sampled_from(["ADD", "NONE"]).map(Operation) | st.builds(Operation, st.sampled_from(["UPDATE", "DELETE"]), ids)
)
def test_words_that_are_written_are_read(operation: Operation) -> None:
    assert WORDS.parse(WORDS.write([operation])) == [operation]


# ---- JSON as models write it ----------------------------------------------------------------------

MEM0 = """```json
{
    "memory" : [
        {"id" : "e1", "text" : "Loves cheese and chicken pizza", "event" : "UPDATE",
         "old_memory" : "I really like cheese pizza"},
        {"id" : "e2", "text" : "Name is John", "event" : "NONE"},
        {"id" : "e3", "text" : "Likes cricket", "event" : "DELETE"},
        {"id" : "e4", "text" : "Is a software engineer", "event" : "ADD"}
    ]
}
```"""


def test_the_event_list_of_mem0_that_memory_r1_trains() -> None:
    bank = EntryBank()
    for text in ("I really like cheese pizza", "Name is John", "Likes cricket"):
        bank.apply(Operation("ADD", text=text))
    operations = EVENTS.parse(MEM0)
    assert operations == [
        Operation("UPDATE", "e1", "Loves cheese and chicken pizza"),
        Operation("NONE", "e2", "Name is John"),
        Operation("DELETE", "e3", "Likes cricket"),
        Operation("ADD", "", "Is a software engineer"),
    ]
    assert [bank.apply(operation).error for operation in operations] == [""] * 4
    texts = [(entry.id, entry.text) for entry in bank.entries()]
    assert texts == [
        ("e1", "Loves cheese and chicken pizza"),
        ("e2", "Name is John"),
        ("e4", "Is a software engineer"),
    ]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("[]", []),
        ("Nothing to do: {'op'} []", []),
        ('{"op": "NONE"}', [Operation("NONE")]),
        ('<think>[{"op": "DELETE", "id": "e1"}]</think>[{"op": "NOOP"}]', [Operation("NONE")]),
        ('{"operations": [{"action": "insert", "content": " x "}]}', [Operation("ADD", text="x")]),
        ('[{"operation": "Modify", "target": "e1", "text": "x"}]', [Operation("UPDATE", "e1", "x")]),
        ('[{"op": "remove", "id": "e1"}]', [Operation("DELETE", "e1")]),
        ('[{"op": "ADD", "id": "e7", "text": "x"}]', [Operation("ADD", text="x")]),
        ('[{"op": "ADD", "id": null, "text": "x", "key": null, "tags": null}]', [Operation("ADD", text="x")]),
        (
            '[{"op": "ADD", "text": "x", "key": "k", "time": "2024", "tags": ["a", 1, "b"]}]',
            [Operation("ADD", "", "x", "k", ("a", "b"), "2024")],
        ),
        ('As [1] says: [{"op": "NONE"}]', [Operation("NONE")]),
    ],
)
def test_real_looking_replies(reply: str, expected: list[Operation]) -> None:
    assert CRUD.parse(reply) == expected


@pytest.mark.parametrize(
    ("spelled", "verb"),
    [
        *((spelled, verb) for verb in Verb for spelled in (verb.value, verb.lower(), f" {verb.capitalize()}\n")),
        ("INSERT", Verb.ADD),
        ("create", Verb.ADD),
        ("modify", Verb.UPDATE),
        ("Remove", Verb.DELETE),
        ("DEL", Verb.DELETE),
        *((spelled, Verb.NONE) for spelled in ("NOOP", "no-op", "No_Op", "nop")),
    ],
)
def test_verbs_in_other_spellings(spelled: str, verb: Verb) -> None:
    for module, name in ((CRUD, "op"), (EVENTS, "event")):
        (operation,) = module.parse(json.dumps([{name: spelled, "id": "e1", "text": "x"}]))
        assert operation.verb == verb.value
    if "\n" not in spelled:
        assert WORDS.parse(f"{spelled} e1")[0].verb == verb.value


WRONG: list[tuple[Any, Refusal]] = [
    ({}, Refusal.UNKNOWN_VERB),
    ({"op": ""}, Refusal.UNKNOWN_VERB),
    ({"op": "ADD it", "text": "x"}, Refusal.UNKNOWN_VERB),
    ({"op": "x" * 10_000}, Refusal.UNKNOWN_VERB),
    ({"op": 1}, Refusal.WRONG_TYPE),
    ({"op": ["ADD"]}, Refusal.WRONG_TYPE),
    ({"op": "ADD", "text": 5}, Refusal.WRONG_TYPE),
    ({"op": "ADD", "text": ["x"]}, Refusal.WRONG_TYPE),
    ({"op": "ADD", "text": "x", "key": {}}, Refusal.WRONG_TYPE),
    ({"op": "ADD", "text": "x", "time": 2024}, Refusal.WRONG_TYPE),
    ({"op": "DELETE", "id": ["e1"]}, Refusal.WRONG_TYPE),
    ({"op": "DELETE", "id": {"e1": 1}}, Refusal.WRONG_TYPE),
    ({"op": "DELETE", "id": True}, Refusal.WRONG_TYPE),
    ({"op": "DELETE", "id": 1.0}, Refusal.WRONG_TYPE),
    ("ADD x", Refusal.WRONG_TYPE),
    (None, Refusal.WRONG_TYPE),
    (["ADD", "x"], Refusal.WRONG_TYPE),
    ({"op": "ADD"}, Refusal.MISSING_TEXT),
    ({"op": "ADD", "text": " \n "}, Refusal.MISSING_TEXT),
    ({"op": "UPDATE", "id": "e1"}, Refusal.MISSING_TEXT),
    ({"op": "UPDATE", "text": "x"}, Refusal.MISSING_ID),
    ({"op": "UPDATE", "id": None, "text": "x"}, Refusal.MISSING_ID),
    ({"op": "DELETE"}, Refusal.MISSING_ID),
    ({"op": "DELETE", "id": 1}, Refusal.UNKNOWN_ID),
    ({"op": "DELETE", "id": "1"}, Refusal.UNKNOWN_ID),
    ({"op": "DELETE", "id": 10**4000}, Refusal.UNKNOWN_ID),
    ({"op": "DELETE", "id": "e9"}, Refusal.UNKNOWN_ID),
    ({"op": "DELETE", "id": "'; DROP TABLE entries; --"}, Refusal.UNKNOWN_ID),
    ({"op": "ADD", "text": "x" * 20_001}, Refusal.TEXT_TOO_LONG),
    ({"op": "ADD", "text": "x", "key": "k" * 1001}, Refusal.LABEL_TOO_LONG),
    ({"op": "ADD", "text": "x", "time": "k" * 1001}, Refusal.LABEL_TOO_LONG),
    ({"op": "ADD", "text": "x", "tags": ["t"] * 65}, Refusal.LABEL_TOO_LONG),
]


@pytest.mark.parametrize(("item", "reason"), WRONG, ids=lambda value: repr(value)[:40])
def test_what_is_wrong_with_one_operation_stands_on_it_and_leaves_the_others_alone(item: Any, reason: Refusal) -> None:
    bank = EntryBank()
    bank.apply(Operation("ADD", text="kept"))
    reply = json.dumps([{"op": "ADD", "text": "before"}, item, {"op": "ADD", "text": "behind"}])
    results = [bank.apply(operation) for operation in CRUD.parse(reply)]
    assert [result.error for result in results] == ["", reason.value, ""]
    assert [entry.text for entry in bank.entries()] == ["kept", "before", "behind"]


def test_too_many_operations_are_refused_once_and_the_first_are_carried_out() -> None:
    bank = EntryBank()
    reply = json.dumps([{"op": "ADD", "text": f"x{number}"} for number in range(10_000)])
    results = [bank.apply(operation) for operation in CRUD.parse(reply)]
    assert [result.error for result in results] == [""] * 256 + [TOO_MANY]
    assert len(bank) == 256
    assert len(CRUD.parse(json.dumps([{"op": "NONE"}] * 256))) == 256


def test_an_item_nested_as_deep_as_python_reads_is_an_operation_or_no_reply() -> None:
    for depth in [*range(1, 900, 101), *range(900, 1010)]:
        for opening, closing in (("[", "]"), ('{"a":', "}")):
            reply = '[{"op": "NONE"}, ' + opening * depth + "1" + closing * depth + "]"
            try:
                first, *rest = CRUD.parse(reply)
            except ModelOutputError:
                assert depth > 500
            else:
                assert first == Operation("NONE")
                assert all(EntryBank().apply(operation).error for operation in rest)


def test_half_a_character_in_a_reply_does_not_reach_the_next_prompt() -> None:
    reply = r'[{"op": "ADD\udc00", "id": "\ud800", "text": "x\ud800", "key": "\ud800", "tags": ["\ud800"]}, "\ud800"]'
    for operation in CRUD.parse(reply):
        for text in (operation.verb, operation.target, operation.text, operation.key, *operation.tags):
            text.encode()
    MERGE.parse("Merge(e\ud800, x\ud800)")[0].text.encode()


@pytest.mark.parametrize("reply", ["", "ADD", "[", '{"memory": "x"}', "<think>[]", "e1: x"])
@pytest.mark.parametrize("module", [CRUD, EVENTS], ids=["crud", "events"])
def test_what_holds_no_list_is_refused(module: CrudUpdater | EventUpdater, reply: str) -> None:
    with pytest.raises(ModelOutputError):
        module.parse(reply)


# ---- RMM's two actions ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Add()", Operation("ADD")),
        ("It is a new topic.\n\nadd( )", Operation("ADD")),
        ("<think>Merge(e1, x)</think>Add()", Operation("ADD")),
        ("Merge(e1, Anna runs every Monday.)", Operation("UPDATE", "e1", "Anna runs every Monday.")),
        ("`MERGE( e1 ,Anna (a nurse) runs)`.", Operation("UPDATE", "e1", "Anna (a nurse) runs")),
        ("**Merge(e1, a :) b)**", Operation("UPDATE", "e1", "a :) b")),
        ("Merge(e1, 1) Rome 2) Oslo (Norway))", Operation("UPDATE", "e1", "1) Rome 2) Oslo (Norway)")),
        ("Merge(e1, Anna runs.)\nBoth (old and new) agree.", Operation("UPDATE", "e1", "Anna runs.")),
        ("Merge(e1, Anna runs.) They agree (mostly).", Operation("UPDATE", "e1", "Anna runs.")),
        ("Merge(e1, Anna (a nurse)\nruns (fast))", Operation("UPDATE", "e1", "Anna (a nurse)\nruns (fast)")),
        ("Merge(e1, sad :( but true)\nBoth (old and new).", Operation("UPDATE", "e1", "sad :( but true")),
        ("Merge(e1, sad :( but true) as both say", Operation("UPDATE", "e1", "sad :( but true")),
        ("Merge(e1, never closed\nAdd()", Operation("UPDATE", "e1", "never closed\nAdd(")),
        ("Merge(0, x)", Operation("UPDATE", "0", "x")),  # an index names no entry: the bank says so
        ("Merge(e1, )", Operation("UPDATE", "e1", "")),
        ("Merge(ID, merged text) is wrong: it never closes. Merge(", Operation("UPDATE", "ID", "merged text")),
    ],
)
def test_add_or_merge(reply: str, expected: Operation) -> None:
    assert MERGE.parse(reply) == [expected]


@pytest.mark.parametrize(
    "reply", ["", "add it", "Merge", "Merge()", "Merge(e1)", "Merge(e1, x", "Merge(a b, x)", "Add"]
)
def test_neither_add_nor_merge(reply: str) -> None:
    with pytest.raises(ModelOutputError):
        MERGE.parse(reply)


@pytest.mark.parametrize(
    "reply",
    [
        "Merge(a," * 120_000,
        "Merge( " * 140_000,
        "Merge(" + " " * 1_000_000,
        "Merge(e1, " + "(" * 1_000_000,
        ") " * 500_000,
    ],
    ids=lambda reply: reply[:9],
)
def test_a_megabyte_of_merges_takes_no_time(reply: str) -> None:
    began = time.process_time()
    with pytest.raises(ModelOutputError):
        MERGE.parse(reply)
    MERGE.parse("Merge(e1, " + reply + ")")
    assert time.process_time() - began < 2


# ---- plain words ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("ADD", Operation("ADD")),
        ("add e3 anna", Operation("ADD")),
        ("UPDATE e3 e4", Operation("UPDATE", "e3")),
        ("UPDATE", Operation("UPDATE")),
        ("<think>ADD</think> noop", Operation("NONE")),
        ("delete e3", Operation("DELETE", "e3")),
    ],
)
def test_one_decision_in_plain_words(reply: str, expected: Operation) -> None:
    assert WORDS.parse(reply) == [expected]


@pytest.mark.parametrize("reply", ["", "e3 UPDATE", "please ADD", "ADDED"])
def test_a_reply_that_begins_with_no_verb(reply: str) -> None:
    with pytest.raises(ModelOutputError):
        WORDS.parse(reply)


# ---- prompts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [CRUD, EVENTS, MERGE, WORDS], ids=lambda module: type(module).__name__)
def test_facts_and_entries_stay_text_in_the_prompt(module: Any) -> None:
    related = (Entry("e1", NASTY + " 1", time="2024-05-07"), Entry("e2", "plain"))
    (message,) = module.render(UpdateState((Fact(NASTY + " 2"), Fact("other")), related))
    assert NASTY + " 1" in message["content"]
    assert NASTY + " 2" in message["content"]
    assert "49" not in message["content"]
    assert message["content"].count("e2") == 1
    (empty,) = module.render(UpdateState((Fact("new"),), ()))
    assert "no related entries" in empty["content"] or "none fact :" in empty["content"]


def test_all_facts_are_added_as_they_are() -> None:
    facts = (Fact("x", "k", "2024", "words", "anna"), Fact("y"))
    assert AddAll().apply(UpdateState(facts, (Entry("e1", "x"),))) == [
        Operation("ADD", "", "x", "k", ("anna",), "2024"),
        Operation("ADD", "", "y"),
    ]

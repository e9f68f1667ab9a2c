"""Bank files: long and short names, every shape of a bank, and what bad rows say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memfactory.environments import Split, build_environment, check_disjoint
from memfactory.environments.bank_files import BankFiles, entries
from memfactory.errors import DataError, RecipeError

SHORT = {
    "M": [{"id": "7", "text": "Ada lives in Osk."}],
    "f": "Ada moved to Lunn.",
    "q": "Where does Ada live?",
    "a": "Lunn",
    "context_memory": ["Ada is a smith."],
}
LONG = {"memory": SHORT["M"], "fact": SHORT["f"], "query": SHORT["q"], "answer": SHORT["a"]}


def write(path: Path, rows: list[Any]) -> str:
    lines = path.suffix == ".jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", ["bank.json", "bank.jsonl"])
def test_both_spellings_in_both_forms(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, [SHORT, {**LONG, "context_memory": SHORT["context_memory"]}])
    first, second = BankFiles(train=path).tasks(Split.TRAIN)
    assert first.stream == second.stream == ("Ada moved to Lunn.",)
    assert first.probes == second.probes
    assert (first.probes[0].question, first.probes[0].answers) == ("Where does Ada live?", ("Lunn",))
    assert first.metadata["memory"] == second.metadata["memory"] == [{"id": "7", "text": "Ada lives in Osk."}]
    assert first.metadata["context_memory"] == [{"id": "m1", "text": "Ada is a smith."}]
    assert second.id == f"{first.id}-2"  # the same content
    assert BankFiles(train=path).tasks(Split.TRAIN, 1) == [first]


def test_an_empty_bank_several_facts_and_questions(tmp_path: Path) -> None:
    several = {"f": ["One.", "Two."], "q": ["First?", "Second?"], "a": ["one", ["two", "2"]]}
    task = BankFiles(test=write(tmp_path / "bank.json", [several])).tasks(Split.TEST)[0]
    assert task.stream == ("One.", "Two.")
    assert [probe.answers for probe in task.probes] == [("one",), ("two", "2")]
    assert task.metadata["memory"] == task.metadata["context_memory"] == []


def test_rows_that_differ_in_the_bank_alone_are_two_tasks(tmp_path: Path) -> None:
    path = write(tmp_path / "bank.json", [SHORT, {**SHORT, "M": []}])
    one, two = BankFiles(train=path).tasks(Split.TRAIN)
    assert one.id != two.id
    assert not two.id.endswith("-2")
    with pytest.raises(DataError, match="train and test share 2"):
        check_disjoint(*(BankFiles(train=path, test=path).tasks(split) for split in Split))


@pytest.mark.parametrize(
    "bank",
    [
        ["a", "b"],
        [{"id": "m1", "memory": "a"}, {"id": "m2", "memory": "b"}],
        [{"memory_id": "m1", "content": "a"}, {"memory_id": "m2", "content": "b"}],
        {"m1": "a", "m2": {"text": "b"}},
        "a\n\nb\n",
    ],
)
def test_every_shape_of_a_bank(bank: Any) -> None:
    assert entries("bank", bank) == [{"id": "m1", "text": "a"}, {"id": "m2", "text": "b"}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"f": None}, "row 2: no `fact` and no `f`; its columns are M, f, q, a, context_memory"),
        ({"f": " "}, "row 2: `fact` is not a text"),
        ({"q": 3}, "row 2: `query` is not a text"),
        ({"a": ""}, "row 2: no answer"),
        ({"q": ["x?", "y?"]}, "row 2: 2 queries"),
        ({"fact": "again"}, "row 2: both `fact` and `f`"),
        ({"M": 5}, "row 2 memory: a int"),
        ({"M": [{"id": 1}]}, "row 2 memory entry 1: it has no text"),
        ({"M": [{"id": 1, "text": "a"}, {"id": "1", "text": "b"}]}, "row 2 memory: id 1 more than once"),
        ({"context_memory": [""]}, "row 2 context_memory entry 1: it has no text"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "bank.json", [SHORT, {**SHORT, **change}])
    with pytest.raises(DataError, match=message):
        BankFiles(train=path).tasks(Split.TRAIN)


def test_all_bad_rows_are_reported_together(tmp_path: Path) -> None:
    path = tmp_path / "bank.jsonl"
    path.write_text("\n".join([json.dumps(SHORT), "{", "[]", json.dumps({"f": "x"})]), encoding="utf-8")
    with pytest.raises(DataError, match="3 of 4 rows") as caught:
        BankFiles(train=str(path)).tasks(Split.TRAIN)
    assert all(f"bank.jsonl line {number}: " in str(caught.value) for number in (2, 3, 4))


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"environment\.test: missing"):
        BankFiles(train="x").tasks(Split.TEST)
    with pytest.raises(DataError, match="no such file"):
        BankFiles(train=str(tmp_path / "none.json")).tasks(Split.TRAIN)
    assert build_environment("bank_files", {"test": "x"}) == BankFiles(test="x")

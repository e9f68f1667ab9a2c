"""LongMemEval: the form of its files. All texts here are made up."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from memfactory.environments import Split, build_environment, check_disjoint
from memfactory.environments.dialogue_sessions import NO_INFORMATION
from memfactory.environments.longmemeval import TYPES, LongMemEval, split_of
from memfactory.episode import Evidence
from memfactory.errors import DataError, RecipeError

PUBLISHED = {
    "single-session-user": 70,
    "single-session-assistant": 56,
    "single-session-preference": 30,
    "multi-session": 133,
    "knowledge-update": 78,
    "temporal-reasoning": 133,
}
"""Questions by type, the same in every published file; 30 of them are abstention questions."""


def row(number: int = 1, **fields: Any) -> dict[str, Any]:
    return {
        "question_id": f"q{number}",
        "question_type": "knowledge-update",
        "question": "How many bikes do I own?",
        "answer": 3,
        "question_date": "2023/06/01 (Thu) 10:00",
        "haystack_session_ids": ["late", "early", "empty"],
        "haystack_dates": ["2023/05/20 (Sat) 02:21", "2023/04/02 (Sun) 18:07", "2023/05/01 (Mon) 08:00"],
        "haystack_sessions": [
            [{"role": "user", "content": f"Now I own 3 bikes ({number}).", "has_answer": True}],
            [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"}],
            [{"role": "user", "content": ""}],
        ],
        "answer_session_ids": ["late"],
        **fields,
    }


def write(tmp_path: Path, rows: Any) -> str:
    path = tmp_path / "longmemeval_oracle.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


def test_a_question_is_a_task_with_its_history_in_order(tmp_path: Path) -> None:
    task = LongMemEval(write(tmp_path, [row()])).tasks(Split.TEST)[0]
    assert task.id == "q1"
    assert task.stream == (
        "[2023/04/02 (Sun) 18:07]\nuser: Hi.\nassistant: Hello!",
        "[2023/05/20 (Sat) 02:21]\nuser: Now I own 3 bikes (1).",
    )
    probe = task.probes[0]
    assert probe.question == "Today is 2023/06/01 (Thu) 10:00. How many bikes do I own?"
    assert (probe.answers, probe.category, probe.after) == (("3",), "knowledge-update", None)
    assert probe.evidence == (Evidence("Now I own 3 bikes (1).", 1),)
    assert task.metadata["answer_chunks"] == [1]
    assert task.metadata["abstention"] is False
    assert [session["time"] for session in task.metadata["sessions"]] == ["2023-04-02T18:07", "2023-05-20T02:21"]


def test_options(tmp_path: Path) -> None:
    path = write(tmp_path, [row()])
    task = LongMemEval(path, dated_questions=False, sort_by_date=False).tasks(Split.TEST)[0]
    assert task.probes[0].question == "How many bikes do I own?"
    assert task.probes[0].evidence[0].chunk == 0
    undated = LongMemEval(write(tmp_path, [row(haystack_dates=None)])).tasks(Split.TEST)[0]
    assert undated.stream[1] == "user: Hi.\nassistant: Hello!"
    assert build_environment("longmemeval", {"train_percent": 50}) == LongMemEval(train_percent=50)


def test_abstention_is_seen_from_the_id(tmp_path: Path) -> None:
    task = LongMemEval(write(tmp_path, [row(question_id="q7_abs", answer="You never said.")])).tasks(Split.TEST)[0]
    assert task.metadata["abstention"] is True
    assert task.probes[0].answers == ("You never said.", *NO_INFORMATION)
    assert task.probes[0].category == "knowledge-update"


def test_splits_follow_from_the_ids(tmp_path: Path) -> None:
    path = write(tmp_path, [row(number) for number in range(60)])
    environment = LongMemEval(path, train_percent=40)
    train, test = environment.tasks(Split.TRAIN), environment.tasks(Split.TEST)
    assert len(train) + len(test) == 60
    assert 10 < len(train) < 40
    check_disjoint(train, test)
    assert environment.tasks(Split.TEST, 3) == test[:3]
    assert all(split_of(f"q{n}", 40) == split_of(f"q{n}_abs", 40) for n in range(60))
    assert len(LongMemEval(path).tasks(Split.TEST)) == 60
    with pytest.raises(RecipeError, match="no question for the train split"):
        LongMemEval(path).tasks(Split.TRAIN)
    with pytest.raises(RecipeError, match="no question for the test split"):
        LongMemEval(path, train_percent=100).tasks(Split.TEST)
    with pytest.raises(RecipeError, match="0 to 100"):
        LongMemEval(train_percent=101)


def test_all_types_are_known(tmp_path: Path) -> None:
    rows = [row(number, question_type=kind) for number, kind in enumerate(TYPES)]
    tasks = LongMemEval(write(tmp_path, rows)).tasks(Split.TEST)
    assert tuple(task.probes[0].category for task in tasks) == TYPES


@pytest.mark.skipif(not os.environ.get("MEMFACTORY_LONGMEMEVAL"), reason="set MEMFACTORY_LONGMEMEVAL to a file of it")
def test_a_published_file() -> None:
    tasks = LongMemEval(os.environ["MEMFACTORY_LONGMEMEVAL"]).tasks(Split.TEST)
    assert Counter(task.probes[0].category for task in tasks) == PUBLISHED
    assert sum(task.metadata["abstention"] for task in tasks) == 30
    assert len({task.id for task in tasks}) == 500
    for task in tasks:
        times = [session["time"] for session in task.metadata["sessions"]]
        assert all(times)
        assert times == sorted(times)
        assert task.metadata["question_date"]
        assert all(evidence.text in task.stream[evidence.chunk] for evidence in task.probes[0].evidence)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question_id": ""}, "row 2: `question_id` is ''"),
        ({"question": None}, r"row 2 \(q2\): `question` is None"),
        ({"question_type": "other"}, r"row 2 \(q2\): question_type 'other'"),
        ({"answer": None}, r"row 2 \(q2\): no answer"),
        ({"haystack_sessions": []}, r"row 2 \(q2\): `haystack_sessions` is \[\]"),
        ({"haystack_dates": ["x"]}, "`haystack_dates`: 1 of them for 3 sessions"),
        ({"haystack_sessions": ["x", [], []]}, "session 1: a str"),
        ({"haystack_sessions": [[{"role": "user"}], [], []]}, "session 1 turn 1: it has no `content`"),
        ({"haystack_sessions": [[{"content": "Hi."}], [], []]}, "session 1 turn 1: `role` is missing"),
        ({"haystack_sessions": [[], [], []]}, "holds no turns"),
    ],
)
def test_bad_questions_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path, [row(1), row(2, **change)])
    with pytest.raises(DataError, match=message):
        LongMemEval(path).tasks(Split.TEST)


def test_a_missing_file_says_where_to_get_it(tmp_path: Path) -> None:
    for environment in (LongMemEval(), LongMemEval(str(tmp_path))):
        with pytest.raises(DataError, match=r"xiaowu0162/longmemeval-cleaned.*licence"):
            environment.tasks(Split.TEST)

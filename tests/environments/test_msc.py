"""MSC and its questions: the form of the files. All texts here are made up."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from memfactory.environments import Split, build_environment
from memfactory.environments.msc import MultiSessionChat
from memfactory.errors import DataError, RecipeError


def row(**fields: Any) -> dict[str, Any]:
    return {
        "personas": [["I keep bees."], ["I sail."]],
        "previous_dialogs": [
            {"dialog": [{"text": "I keep bees."}, {"text": "I sail."}], "time_num": 14, "time_unit": "days"},
            {"dialog": [{"text": "The bees swarmed."}], "time_num": 5, "time_unit": "hours", "time_back": "5 hours"},
        ],
        "dialog": [
            {"id": "Speaker 2", "text": "How are the bees?"},
            {"id": "Speaker 1", "text": "Back home."},
        ],
        "metadata": {"initial_data_id": "train_1", "session_id": 2},
        **fields,
    }


def write(tmp_path: Path, *rows: Any, name: str = "train.txt") -> str:
    path = tmp_path / name
    path.write_text("\n".join(json.dumps(item) for item in rows) + "\n", encoding="utf-8")
    return str(path)


def test_the_reply_is_asked_where_there_is_no_question(tmp_path: Path) -> None:
    task = MultiSessionChat(train=write(tmp_path, row(), row(dialog=[{"text": "a"}, {"text": "b"}]))).tasks(
        Split.TRAIN
    )[0]
    assert task.stream == (
        "[14 days ago]\nSpeaker 1: I keep bees.\nSpeaker 2: I sail.",
        "[5 hours]\nSpeaker 1: The bees swarmed.",
    )
    probe = task.probes[0]
    assert probe.question == "The chat goes on:\nSpeaker 2: How are the bees?\nWhat does Speaker 1 say next?"
    assert (probe.answers, probe.category) == (("Back home.",), "reply")
    assert task.metadata["columns"] == {"initial_data_id": "train_1", "session_id": 2}
    assert task.metadata["sessions"][0]["speakers"] == ["Speaker 1", "Speaker 2"]


def test_a_question_reads_the_last_session_too(tmp_path: Path) -> None:
    asked = row(self_instruct={"B": "What do I keep?", "A": "Bees!"})
    task = MultiSessionChat(test=write(tmp_path, asked, asked, name="q.jsonl")).tasks(Split.TEST, 1)[0]
    assert len(task.stream) == 3
    assert task.stream[2] == "Speaker 2: How are the bees?\nSpeaker 1: Back home."
    assert (task.probes[0].question, task.probes[0].answers) == ("What do I keep?", ("Bees!",))
    assert task.probes[0].category == "question"


def test_one_row_and_a_json_list_are_read_as_well(tmp_path: Path) -> None:
    one = MultiSessionChat(train=write(tmp_path, row(), name="one.txt")).tasks(Split.TRAIN)
    listed = MultiSessionChat(train=write(tmp_path, [row()], name="list.json")).tasks(Split.TRAIN)
    assert len(one) == len(listed) == 1
    assert one[0].id == listed[0].id


def test_oddities_of_the_published_files(tmp_path: Path) -> None:
    odd = row(
        dialog=[
            {"id": "50997", "text": "How are the bees? ", "convai2_id": "test_0"},  # a number in place of Speaker 1
            {"text": "Back home.", "rating": 5, "id": "Speaker 2", "convai2_id": "test_0"},
            {"id": "Speaker 1", "text": "  Good to hear. "},
        ],
        init_personas=[[], []],
    )
    odd["previous_dialogs"][0]["time_back"] = " 1 hour ago"
    odd["previous_dialogs"][0]["dialog"][0]["text"] = "I keep bees.  "
    task = MultiSessionChat(test=write(tmp_path, odd)).tasks(Split.TEST)[0]
    assert task.stream[0] == "[1 hour ago]\nSpeaker 1: I keep bees.\nSpeaker 2: I sail."
    assert task.probes[0].question == (
        "The chat goes on:\nSpeaker 1: How are the bees?\nSpeaker 2: Back home.\nWhat does Speaker 1 say next?"
    )
    assert task.probes[0].answers == ("Good to hear.",)


@pytest.mark.skipif(
    not os.environ.get("MEMFACTORY_MSC"), reason="set MEMFACTORY_MSC to msc_dialogue/session_3/test.txt"
)
def test_a_published_file() -> None:
    tasks = MultiSessionChat(test=os.environ["MEMFACTORY_MSC"]).tasks(Split.TEST)
    assert len(tasks) == len({task.id for task in tasks}) == 501
    assert {len(task.stream) for task in tasks} == {2}
    assert Counter(task.probes[0].category for task in tasks) == {"reply": 501}
    for task in tasks:
        assert all(session["when"].endswith(" ago") for session in task.metadata["sessions"])
        for chunk in task.stream:
            speakers = [line.partition(":")[0] for line in chunk.split("\n")[1:]]
            assert all(speaker == f"Speaker {place % 2 + 1}" for place, speaker in enumerate(speakers))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dialog": [{"text": "Hi."}]}, "line 2: `dialog` has fewer than two"),
        ({"dialog": "Hi."}, "line 2: `dialog` is not a list"),
        ({"dialog": ["Hi.", "Ho."]}, "line 2 utterance 1: a str"),
        ({"dialog": [{"text": "a"}, {"id": "Speaker 1"}]}, "line 2 utterance 2: `text` is missing"),
        ({"previous_dialogs": []}, "line 2: no earlier session"),
        ({"previous_dialogs": 3}, "line 2: `previous_dialogs` is not a list"),
        ({"previous_dialogs": [{"dialog": []}]}, "line 2 previous dialog 1: `dialog` is empty"),
        ({"previous_dialogs": ["x"]}, "line 2 previous dialog 1: a str"),
        ({"self_instruct": {"B": "Who?"}}, "line 2: no answer"),
        ({"self_instruct": {"A": "Me"}}, "line 2: `B` is missing"),
        ({"self_instruct": "Who?"}, "line 2: `self_instruct` is not a mapping"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path, row(), row(**change))
    with pytest.raises(DataError, match=message):
        MultiSessionChat(train=path).tasks(Split.TRAIN)


def test_lines_that_are_not_json(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_text(json.dumps(row()) + "\n\n{oops\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"train\.txt line 3: not valid JSON"):
        MultiSessionChat(train=str(path)).tasks(Split.TRAIN)


def test_missing_files_say_where_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"environment\.train: missing.*\n.*ParlAI.*licences"):
        MultiSessionChat(test="x").tasks(Split.TRAIN)
    with pytest.raises(DataError, match=r"no such file.*\n.*ParlAI.*licences"):
        MultiSessionChat(train=str(tmp_path / "none.txt")).tasks(Split.TRAIN)
    assert build_environment("msc", {"train": "x"}) == MultiSessionChat(train="x")

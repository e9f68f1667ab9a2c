"""LoCoMo: the form of the file, the published counts, and what bad files say. All texts here are made up."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memfactory.environments import Split, build_environment, check_disjoint
from memfactory.environments.dialogue_sessions import NO_INFORMATION
from memfactory.environments.locomo import CATEGORIES, QUESTIONS, LoCoMo
from memfactory.episode import Evidence
from memfactory.errors import DataError, RecipeError
from memfactory.evaluate.categories import category_counts

PUBLISHED = {"1": 282, "2": 321, "3": 96, "4": 841}
"""Questions by category in the published file; 446 adversarial ones come on top."""
TEST = {"1": 239, "2": 258, "3": 83, "4": 727}
"""The same for Memory-R1's eight test conversations."""
SHAPES = {
    "conv-26": (19, 419),
    "conv-30": (19, 369),
    "conv-41": (32, 663),
    "conv-42": (29, 629),
    "conv-43": (29, 680),
    "conv-44": (28, 675),
    "conv-47": (31, 689),
    "conv-48": (30, 681),
    "conv-49": (25, 509),
    "conv-50": (30, 568),
}
"""Sessions and turns of each published conversation."""


def conversation(name: str, qa: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "sample_id": name,
        "conversation": {
            "speaker_a": "Ada",
            "speaker_b": "Bo",
            "session_2_date_time": "9:05 am on 14 June, 2023",
            "session_2": [{"speaker": "Bo", "dia_id": "D2:1", "text": "I sold the boat."}],
            "session_1_date_time": "1:56 pm on 8 May, 2023",
            "session_1": [
                {"speaker": "Ada", "dia_id": "D1:1", "text": f"Hello from {name}!"},
                {"speaker": "Bo", "dia_id": "D1:2", "text": "Look.", "blip_caption": "a small boat"},
            ],
            "session_3_date_time": "8:00 am on 1 July, 2023",  # dated, never held: the published file has such
        },
        "qa": qa,
    }


def question(number: int, category: int, **fields: Any) -> dict[str, Any]:
    gold = {"adversarial_answer": "the car"} if category == 5 else {"answer": "the boat"}
    return {"question": f"Question {number}?", "category": category, "evidence": ["D1:2"], **gold, **fields}


def write(path: Path, conversations: Any) -> str:
    path.write_text(json.dumps(conversations), encoding="utf-8")
    return str(path)


@pytest.fixture
def small(tmp_path: Path) -> str:
    qa = [
        question(1, 1, evidence=["D1:1", "D2:01; D1:2", "D9:9", "D"]),
        question(2, 2, answer=2022),
        question(3, 5, adversarial_answer="the car"),
    ]
    return write(tmp_path / "locomo10.json", [conversation(name, qa) for name in ("conv-26", "conv-30", "conv-41")])


def spread(total: dict[str, int], sizes: list[int]) -> Iterator[list[int]]:
    """Categories dealt to conversations of these sizes, so that both sums hold."""
    deal = [int(category) for category, count in total.items() for _ in range(count)]
    for size in sizes:
        yield [deal.pop() for _ in range(size)]


@pytest.fixture
def published(tmp_path: Path) -> str:
    """A file with as many conversations, questions and categories as the published one."""
    first = {category: PUBLISHED[category] - TEST[category] for category in TEST}
    sizes = list(QUESTIONS.values())
    categories = [*spread(first, sizes[:2]), *spread(TEST, sizes[2:])]
    for number in range(446):
        categories[number % 10].append(5)
    conversations = [
        conversation(name, [question(n, category) for n, category in enumerate(dealt)])
        for name, dealt in zip(QUESTIONS, categories, strict=True)
    ]
    return write(tmp_path / "locomo10.json", conversations)


def test_counts_of_the_published_split(published: str) -> None:
    environment = LoCoMo(published)
    train, test = environment.tasks(Split.TRAIN), environment.tasks(Split.TEST)
    dev = LoCoMo(published, dev=[], test=["conv-30"]).tasks(Split.TEST)
    assert [sum(len(task.probes) for task in tasks) for tasks in (train, dev, test)] == [152, 81, 1307]
    assert {task.id: len(task.probes) for task in [*train, *dev, *test]} == QUESTIONS
    assert category_counts(test) == TEST
    assert category_counts([*train, *dev, *test]) == PUBLISHED
    assert sum(PUBLISHED.values()) == sum(QUESTIONS.values()) == 1540
    check_disjoint(train, test)


def test_counts_with_adversarial_questions(published: str) -> None:
    environment = LoCoMo(published, train=["conv-26"], dev=[], adversarial=True)
    tasks = [task for split in Split for task in environment.tasks(split)]
    assert category_counts(tasks) == {**PUBLISHED, "5": 446}
    assert sum(category_counts(tasks).values()) == 1986


def test_sessions_are_chunks_in_order_with_their_dates(small: str) -> None:
    task = LoCoMo(small).tasks(Split.TRAIN)[0]
    assert task.id == "conv-26"
    assert task.stream == (
        "[1:56 pm on 8 May, 2023]\nAda: Hello from conv-26!\nBo: Look. (sends a picture: a small boat)",
        "[9:05 am on 14 June, 2023]\nBo: I sold the boat.",
    )
    assert [session["time"] for session in task.metadata["sessions"]] == ["2023-05-08T13:56", "2023-06-14T09:05"]
    assert task.metadata["sessions"][0]["speakers"] == ["Ada", "Bo"]


def test_probes_keep_raw_categories_and_exact_evidence(small: str) -> None:
    task = LoCoMo(small).tasks(Split.TRAIN)[0]
    first, second = task.probes
    assert (first.category, second.category) == ("1", "2")
    assert second.answers == ("2022",)
    assert first.evidence == (
        Evidence("Hello from conv-26!", 0),
        Evidence("I sold the boat.", 1),
        Evidence("Look. (sends a picture: a small boat)", 0),
    )
    assert all(evidence.text in task.stream[evidence.chunk] for evidence in first.evidence)
    assert task.metadata["probes"][0] == {"number": 1, "category": "multi-hop", "evidence_missing": ["D9:9", "D"]}
    assert list(CATEGORIES.values()) == ["multi-hop", "temporal", "open-domain", "single-hop", "adversarial"]


def test_adversarial_questions_are_answered_by_there_being_no_answer(small: str) -> None:
    task = LoCoMo(small, adversarial=True).tasks(Split.TRAIN)[0]
    assert task.probes[2].answers == NO_INFORMATION
    assert task.metadata["probes"][2]["adversarial_answer"] == "the car"


def test_oddities_of_the_published_file(tmp_path: Path) -> None:
    one = conversation(
        "conv-26",
        [
            question(1, 4, evidence=["D:1:1", "D1:2 D2:1", "D"], answer=" the boat\n"),
            question(2, 4, evidence=[]),
            question(3, 5, answer="No", adversarial_answer="Yes"),
        ],
    )
    one["conversation"]["session_1"][0].update(text=" Hello,\nyou!\n\n", img_url=["x"], query="a boat")
    one["conversation"]["session_2"] = []
    one["conversation"]["session_1"].append({"speaker": "Bo", "dia_id": "D2:1", "text": "I sold it."})
    one |= {"event_summary": {}, "observation": {}, "session_summary": {}}
    task = LoCoMo(write(tmp_path / "odd.json", [one]), adversarial=True).tasks(Split.TRAIN)[0]
    assert task.stream[0].split("\n")[1] == "Ada: Hello, you!"  # a turn is one line, though its text has several
    first, none, adversarial = task.probes
    assert [evidence.text for evidence in first.evidence] == [
        "Hello, you!",
        "Look. (sends a picture: a small boat)",
        "I sold it.",
    ]
    assert first.answers == ("the boat",)
    assert none.evidence == ()
    assert adversarial.answers == NO_INFORMATION
    missing, _, note = task.metadata["probes"]
    assert missing["evidence_missing"] == ["D"]
    assert (note["answer"], note["adversarial_answer"]) == ("No", "Yes")


@pytest.mark.skipif(not os.environ.get("MEMFACTORY_LOCOMO"), reason="set MEMFACTORY_LOCOMO to locomo10.json")
def test_the_published_file() -> None:
    path = os.environ["MEMFACTORY_LOCOMO"]
    train, test = (LoCoMo(path).tasks(split) for split in Split)
    dev = LoCoMo(path, dev=[], test=["conv-30"]).tasks(Split.TEST)
    assert [sum(len(task.probes) for task in tasks) for tasks in (train, dev, test)] == [152, 81, 1307]
    assert category_counts(test) == TEST
    tasks = LoCoMo(path, train=list(QUESTIONS), dev=[], adversarial=True).tasks(Split.TRAIN)
    shapes = {task.id: (len(task.stream), sum(chunk.count("\n") for chunk in task.stream)) for task in tasks}
    assert shapes == SHAPES  # a line for the date, then one for each turn
    assert {task.id: sum(probe.category != "5" for probe in task.probes) for task in tasks} == QUESTIONS
    assert category_counts(tasks) == {**PUBLISHED, "5": 446}
    assert all(session["time"] for task in tasks for session in task.metadata["sessions"])
    probes = [(task, probe) for task in tasks for probe in task.probes]
    assert all(evidence.text in task.stream[evidence.chunk] for task, probe in probes for evidence in probe.evidence)
    assert sum(not probe.evidence for _, probe in probes) == 4
    notes = [note for task in tasks for note in task.metadata["probes"]]
    missing = [id for note in notes for id in note.get("evidence_missing", [])]
    assert missing in ([], ["D10:19", "D", "D4:36"])  # copies with mended evidence are about
    adversarial = [note for note in notes if note["category"] == "adversarial"]
    assert all(note["adversarial_answer"] for note in adversarial)
    assert sum("answer" in note for note in adversarial) == 2


def test_one_task_for_each_question(small: str) -> None:
    tasks = LoCoMo(small, per_question=True).tasks(Split.TEST)
    assert [task.id for task in tasks] == ["conv-41/1", "conv-41/2"]
    assert [len(task.probes) for task in tasks] == [len(task.metadata["probes"]) for task in tasks] == [1, 1]
    assert LoCoMo(small, per_question=True).tasks(Split.TEST, 1) == tasks[:1]


def test_splits_of_ones_own(small: str) -> None:
    environment = LoCoMo(small, train=["conv-30", "conv-41"], dev=[])
    assert [task.id for task in environment.tasks(Split.TRAIN)] == ["conv-30", "conv-41"]
    assert [task.id for task in environment.tasks(Split.TEST)] == ["conv-26"]
    with pytest.raises(RecipeError, match="conv-26 named more than once"):
        LoCoMo(small, test=["conv-26"])
    with pytest.raises(DataError, match=r"no conversation 'conv-27'\n.*conv-26, conv-30, conv-41"):
        LoCoMo(small, train=["conv-27"]).tasks(Split.TRAIN)
    with pytest.raises(DataError, match="no conversation for the test split"):
        LoCoMo(small, train=["conv-26", "conv-41"]).tasks(Split.TEST)


def test_a_missing_file_says_where_to_get_it_and_its_licence(tmp_path: Path) -> None:
    for environment in (LoCoMo(), LoCoMo(str(tmp_path / "none.json"))):
        with pytest.raises(DataError, match=r"snap-research/LoCoMo.*CC BY-NC 4\.0"):
            environment.tasks(Split.TRAIN)
    assert isinstance(build_environment("locomo", {"path": "x.json"}), LoCoMo)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qa": [question(1, 4), question(2, 9)]}, r"row 1 \(conv-26\) question 2: category 9"),
        ({"qa": [question(1, 4, answer=None)]}, r"\(conv-26\) question 1: no answer"),
        ({"qa": [question(1, 4, question=" ")]}, r"\(conv-26\) question 1: `question` is ' '"),
        ({"qa": ["what?"]}, r"\(conv-26\) question 1: a str"),
        ({"qa": []}, r"\(conv-26\): `qa` is \[\]"),
        ({"qa": [question(1, 5)]}, "no questions but adversarial ones"),
        ({"conversation": {"speaker_a": "Ada"}}, r"\(conv-26\): no sessions"),
        ({"conversation": {"session_1": [{"speaker": "Ada"}]}}, r"\(conv-26\) session_1 turn 1: it has no text"),
        ({"conversation": {"session_1": [{"text": "Hi"}]}}, r"session_1 turn 1: `speaker` is missing"),
        ({"conversation": {"session_1": "Hi"}}, r"\(conv-26\) session_1: a str"),
    ],
)
def test_bad_conversations_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "bad.json", [{**conversation("conv-26", [question(1, 4)]), **change}])
    with pytest.raises(DataError, match=message):
        LoCoMo(path).tasks(Split.TRAIN)


def test_files_that_are_not_json(tmp_path: Path) -> None:
    path = tmp_path / "cut.json"
    path.write_text('[{"sample_id": "conv-26",\n "conv', encoding="utf-8")
    with pytest.raises(DataError, match=r"cut.json line 2 column \d+: not valid JSON"):
        LoCoMo(str(path)).tasks(Split.TRAIN)
    path.write_text("[3]", encoding="utf-8")
    with pytest.raises(DataError, match="row 1: a int, not a record"):
        LoCoMo(str(path)).tasks(Split.TRAIN)

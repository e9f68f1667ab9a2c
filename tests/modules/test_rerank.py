"""Reranking by a model: which ids a reply names, in order."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfactory.errors import ModelOutputError
from memfactory.memory.entries import Entry
from memfactory.memory.operations import entry_number
from memfactory.modules.rerank import WORDS_PROMPT, ChooseState, ModelReranker, ids_in

NASTY = "</entries> {{ 7 * 7 }} {% for x in y %} '; DROP TABLE entries; -- </think> \\ \" %s {0}"
ids = st.integers(1, 10**17).map(lambda number: f"e{number}")


@given(st.lists(ids, min_size=1, max_size=8, unique=True))
def test_ids_that_are_written_are_read(chosen: list[str]) -> None:
    assert ModelReranker(m=8).parse(ModelReranker(m=8).write(chosen)) == chosen


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("e3, e1, e2", ["e3", "e1", "e2"]),
        ("[e3, e1]", ["e3", "e1"]),
        ('```json\n["e3","e1"]\n```', ["e3", "e1"]),
        ("<think>e9 looks good</think>The best is e3; then e1.", ["e3", "e1"]),
        ("e3 e3 e1 e3", ["e3", "e1"]),
        ("e1\ne2\ne3\ne4", ["e1", "e2", "e3"]),
        ("**e12**:e7/e8", ["e12", "e7", "e8"]),
        ("e0 e01 E5 e1x xe1 e_1 some1 e٣ e4", ["e4"]),
    ],
)
def test_real_looking_replies(reply: str, expected: list[str]) -> None:
    assert ModelReranker(m=3).parse(reply) == expected


@pytest.mark.parametrize("reply", ["", "none", "1, 2", "entry one", "<think>e1", "e" * 100, "e" + "1" * 100])
def test_a_reply_that_names_no_entry_is_refused(reply: str) -> None:
    with pytest.raises(ModelOutputError):
        ModelReranker().parse(reply)


@given(st.text(alphabet="e1203 ,x_é٣", max_size=40) | st.text(max_size=40))
def test_what_is_found_could_be_an_id_of_a_bank_and_stands_in_the_text_once(text: str) -> None:
    found = ids_in(text)
    assert len(found) == len(set(found))
    assert all(entry_number(id) is not None and id in text for id in found)


def test_a_megabyte_of_ids_takes_no_time() -> None:
    for reply in ("e1 " * 330_000, "e" * 1_000_000, "e1" * 500_000, "e" + "1" * 1_000_000):
        began = time.process_time()
        assert len(ids_in(reply)) <= 1
        assert time.process_time() - began < 1


@pytest.mark.parametrize("prompt", [ModelReranker().prompt, WORDS_PROMPT], ids=["prose", "words"])
def test_questions_and_entries_stay_text_in_the_prompt(prompt: str) -> None:
    candidates = (Entry("e2", NASTY + "1", time="2024-05-07"), Entry("e1", "x"))
    (message,) = ModelReranker(m=7, prompt=prompt).render(ChooseState(NASTY + "2", candidates, 7))
    content = message["content"]
    assert NASTY + "1" in content
    assert NASTY + "2" in content
    assert "49" not in content
    assert "7" in content
    assert content.index("e2") < content.index("e1")

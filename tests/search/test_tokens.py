from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfactory.search.tokens import ENGLISH, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Anna's cat, anna_city!", ["anna", "s", "cat", "anna", "city"]),
        ("STRASSE Straße", ["strasse", "strasse"]),
        ("cafe\u0301 caf\u00e9", ["caf\u00e9", "caf\u00e9"]),
        ("x\u0306y", ["x\u0306y"]),  # a letter and a mark that have no composed form
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("我住在北京", ["我住", "住在", "在北", "北京"]),
        ("猫", ["猫"]),
        ("東京タワー 333m", ["東京", "京タ", "タワ", "ワー", "333m"]),
        ("vLLM用GPU", ["vllm", "用", "gpu"]),
        ("서울에 산다", ["서울", "울에", "산다"]),
        ("3.14 2024-05-01", ["3", "14", "2024", "05", "01"]),
        ("", []),
        (" \n\t …!?", []),
    ],
)
def test_words_of_many_scripts(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_stopwords_are_left_out_only_when_asked() -> None:
    assert words("The cat is not here") == ["the", "cat", "is", "not", "here"]
    assert words("The cat is here", ENGLISH) == ["cat", "here"]


@given(st.text(st.characters(codec=None)))
def test_any_text_has_words(text: str) -> None:
    assert all(word and not word.isspace() for word in words(text))


@given(st.text(st.characters(codec="ascii")))
def test_plain_text_takes_a_shorter_way_to_the_same_words(text: str) -> None:
    assert words(f"{text} é") == [*words(text), "é"]
    assert words(f"{text} é", ENGLISH) == [*words(text, ENGLISH), "é"]

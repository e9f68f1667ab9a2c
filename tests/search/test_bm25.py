"""BM25 against bm25s, an independent implementation, and what only ours has to do."""

from __future__ import annotations

import random

import bm25s
import numpy as np
import pytest

from memfactory.memory.entries import Entry
from memfactory.search import BM25Searcher
from memfactory.search.tokens import words

VOCABULARY = [f"w{i}" for i in range(60)]


def _texts(n: int, seed: int) -> list[str]:
    """`n` texts of 1 to 30 words, frequent and rare ones."""
    draw = random.Random(seed)
    return [
        " ".join(draw.choices(VOCABULARY, [1 / (1 + i) for i in range(60)], k=draw.randint(1, 30))) for _ in range(n)
    ]


@pytest.mark.parametrize(("k1", "b"), [(1.2, 0.75), (1.5, 0.0), (0.5, 1.0)])
def test_scores_and_ranking_are_those_of_bm25s(k1: float, b: float) -> None:
    texts = _texts(200, 0)
    searcher = BM25Searcher(k1=k1, b=b)
    searcher.put([Entry(str(i), text) for i, text in enumerate(texts)])
    other = bm25s.BM25(method="lucene", k1=k1, b=b)
    other.index([words(text) for text in texts], show_progress=False)
    for query in _texts(20, 1):
        asked = list(dict.fromkeys(words(query)))
        theirs = other.get_scores(asked)  # (200,), float32
        hits = searcher.search(" ".join(asked), 200)
        assert len(hits) == (theirs > 0).sum()
        np.testing.assert_allclose([hit.score for hit in hits], -np.sort(-theirs)[: len(hits)], rtol=1e-5)
        np.testing.assert_allclose([theirs[int(hit.entry.id)] for hit in hits], [hit.score for hit in hits], rtol=1e-5)


def test_scores_stay_those_of_bm25s_while_entries_change() -> None:
    draw, searcher = random.Random(2), BM25Searcher()
    held: dict[str, str] = {}
    for turn, text in enumerate(_texts(80, 3)):
        id = str(draw.randint(0, 25))
        if draw.random() < 0.3:
            held.pop(id, None)
            searcher.remove([id])
        else:
            held[id] = text
            searcher.put([Entry(id, text, turn=turn)])
    other = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
    other.index([words(text) for text in held.values()], show_progress=False)
    theirs = dict(zip(held, other.get_scores(["w0", "w7", "w20"]), strict=True))
    ours = {hit.entry.id: hit.score for hit in searcher.search("w0 w7 w20", 100)}
    assert ours == pytest.approx({id: score for id, score in theirs.items() if score > 0}, rel=1e-5)


def test_a_score_by_hand() -> None:
    searcher = BM25Searcher()
    searcher.put([Entry("a", "cat cat dog"), Entry("b", "fish")])
    # N 2, n 1, f 2, L 3, mean 2: ln(1 + 1.5 / 1.5) * 2 / (2 + 1.2 (.25 + .75 * 1.5))
    [hit] = searcher.search("cat", 5)
    assert hit.score == pytest.approx(np.log(2) * 2 / (2 + 1.2 * (0.25 + 0.75 * 1.5)))
    assert searcher.search("cat cat", 5)[0].score == pytest.approx(2 * hit.score)


def test_keys_and_tags_are_searched() -> None:
    searcher = BM25Searcher()
    searcher.put([Entry("a", "Lisbon", key="anna.home_city", tags=("travel",)), Entry("b", "Porto", key="ben.city")])
    assert [hit.entry.id for hit in searcher.search("Anna", 5)] == ["a"]
    assert [hit.entry.id for hit in searcher.search("home", 5)] == ["a"]
    assert [hit.entry.id for hit in searcher.search("travel", 5)] == ["a"]


def test_chinese_is_found_without_spaces() -> None:
    searcher = BM25Searcher()
    searcher.put([Entry("a", "安娜住在北京"), Entry("b", "本住在上海")])
    assert searcher.search("她在北京吗", 5)[0].entry.id == "a"

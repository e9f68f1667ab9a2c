"""What each kind of search is for: meaning, exact words, both. With a real embedder."""

from __future__ import annotations

import pytest

from memfactory.memory.entries import Entry
from memfactory.search import CachedEmbedder, Hit, build_searcher, fuse, recall

PARAPHRASES = (
    ("Anna resides in Lisbon these days", "Which city is her home?"),
    ("Tom's physician told him to stop smoking", "What did the doctor advise about cigarettes?"),
    ("The kids adore chocolate ice cream", "What dessert do children love?"),
    ("She purchased a used automobile in March", "When did the woman buy a car?"),
    ("Our flight was cancelled because of fog", "Why did the plane not take off?"),
    ("He is allergic to peanuts", "Which food makes him sick?"),
    ("The firm let forty workers go", "How many employees were dismissed by the company?"),
    ("My sister gave birth to a boy", "Who had a baby?"),
    ("Paul plays the violin in an orchestra", "What musical instrument does he perform on?"),
    ("The laptop broke after coffee was spilled", "What damaged the computer?"),
)
"""A memory and a question that says it in other words."""

EXACT = tuple(
    (f"The locker code of {name} is {code}", f"{code} locker")
    for name, code in zip(
        "Ada Bob Cleo Dan Eve Finn Gus Hal Ida Jo".split(),
        "QX-7741 QX-7714 ZR-1190 ZR-1109 BK-5523 BK-5532 MT-8086 MT-8068 WD-3347 WD-3374".split(),
        strict=True,
    )
)
"""A memory and a question for a code in it that differs by two letters from another's."""


def _found_first(name: str, pairs: tuple[tuple[str, str], ...], use: CachedEmbedder, k: int) -> float:
    """Share of the questions whose memory is among the first `k`, all memories of this file in one bank."""
    searcher = build_searcher({"name": name}, embedder=use)
    searcher.put([Entry(text, text) for text, _ in (*PARAPHRASES, *EXACT)])
    return sum(text in [hit.entry.id for hit in searcher.search(query, k)] for text, query in pairs) / len(pairs)


def test_dense_finds_paraphrases_that_bm25_does_not(use: CachedEmbedder) -> None:
    bm25, dense, hybrid = (_found_first(name, PARAPHRASES, use, 3) for name in ("bm25", "dense", "hybrid"))
    assert dense >= bm25 + 0.3
    assert hybrid >= dense - 0.2


def test_bm25_finds_exact_words_that_dense_does_not(use: CachedEmbedder) -> None:
    bm25, dense, hybrid = (_found_first(name, EXACT, use, 1) for name in ("bm25", "dense", "hybrid"))
    assert bm25 == 1
    assert dense <= 0.8
    assert hybrid >= bm25 - 0.2


def test_fusion_by_hand() -> None:
    scores = fuse([["a", "b"], ["b", "c"]], [1, 2])
    assert scores == pytest.approx({"a": 1 / 61, "b": 1 / 62 + 2 / 61, "c": 2 / 62})


def test_recall_counts_what_exact_search_found() -> None:
    exact = [Hit(Entry(id, id), 1.0) for id in "abcd"]
    assert recall(exact, exact, 3) == 1
    assert recall(exact, exact[1:], 2) == 0.5
    assert recall(exact[:1], exact, 10) == 1
    assert recall(exact, [], 2) == 0
    assert recall([], exact, 2) is None

"""The two-step search of large banks against the exact one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memfactory.memory.entries import Entry
from memfactory.search import CachedEmbedder, DenseSearcher, coarse, recall
from memfactory.search.coarse import Coarse

WIDTH, RANK = 128, 24


class LowRank:
    """Vectors near a subspace, as those of texts are: 24 directions of 128, and a little of all others."""

    def __init__(self) -> None:
        self.directions = np.random.default_rng(0).standard_normal((RANK, WIDTH))

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        rows = np.empty((len(texts), WIDTH))
        for row, text in zip(rows, texts, strict=True):
            draw = np.random.default_rng(list(text.encode()))
            row[:] = draw.standard_normal(RANK) @ self.directions + 0.3 * draw.standard_normal(WIDTH)
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def entries(count: int, word: str = "fact") -> list[Entry]:
    return [Entry(f"{word}{i}", f"{word} {i}") for i in range(count)]


def searchers(embedder: object) -> tuple[DenseSearcher, DenseSearcher]:
    """One in two steps, one exact."""
    cache = CachedEmbedder(embedder, limit=100_000)
    return DenseSearcher(cache, exact_up_to=100), DenseSearcher(cache, exact_up_to=10**9)


def test_it_finds_nearly_all_that_an_exact_search_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coarse, "AT_LEAST", 50)
    fast, exact = searchers(LowRank())
    for searcher in (fast, exact):
        searcher.put(entries(5000))
    recalls = [recall(exact.search(f"question {i}", 10), fast.search(f"question {i}", 10), 10) for i in range(50)]
    assert fast._coarse is not None
    assert fast._coarse.rows.shape[1] <= WIDTH // 2
    assert np.mean(recalls) >= 0.99
    right, found = exact.search("question 1", 3), fast.search("question 1", 3)
    assert found == right, "scores are exact, whatever chose the entries"


CHANGE = st.one_of(
    st.tuples(st.just("put"), st.integers(0, 400)),
    st.tuples(st.just("remove"), st.integers(0, 400)),
    st.tuples(st.just("grow"), st.integers(1, 300)),
    st.tuples(st.just("fork"), st.booleans()),
    st.tuples(st.just("search"), st.integers(0, 9)),
)
LOW_RANK = CachedEmbedder(LowRank(), limit=100_000)


@settings(max_examples=40, deadline=None)
@given(changes=st.lists(CHANGE, max_size=14))
def test_after_any_history_it_knows_every_entry(changes: list) -> None:
    """Each entry is found by its own text: no row was left behind by a change, a fork, or growth."""
    searcher = DenseSearcher(LOW_RANK, exact_up_to=100)
    searcher.put(entries(150))
    searcher.search("first", 1)
    others: list[tuple[DenseSearcher, list[Entry]]] = []
    for turn, (verb, number) in enumerate(changes):
        if verb == "put":
            searcher.put([Entry(f"fact{number}", f"changed {turn}")])
        elif verb == "remove":
            searcher.remove([f"fact{number}"])
        elif verb == "grow":
            searcher.put(entries(number, f"more{turn}"))
        elif verb == "fork":
            other = searcher.fork()
            searcher, other = (other, searcher) if number else (searcher, other)
            others.append((other, other.entries()))
        else:
            searcher.search(f"question {number}", 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coarse, "AT_LEAST", 20)
        for index, held in [*others, (searcher, searcher.entries())]:
            assert index.entries() == held
            for entry in held[:: max(1, len(held) // 40)]:
                assert index.search(entry.text, 1)[0].entry.text == entry.text


@pytest.mark.parametrize("changed", [0, 1], ids=["the first", "the fork"])
def test_forks_do_not_write_into_each_other(monkeypatch: pytest.MonkeyPatch, changed: int) -> None:
    monkeypatch.setattr(coarse, "AT_LEAST", 10)
    searcher, _ = searchers(LOW_RANK)
    searcher.put(entries(300))
    searcher.search("first", 1)
    both = [searcher, searcher.fork()]
    both[changed].put([Entry(entry.id, f"changed {entry.id}") for entry in entries(50)])
    both[changed].search("second", 1)
    for index in both:
        for entry in index.entries()[:50]:
            assert index.search(entry.text, 1)[0].entry == entry


def test_what_was_prepared_is_not_done_again() -> None:
    searcher, _ = searchers(LOW_RANK)
    searcher.prepare()
    searcher.put(entries(300))
    searcher.prepare()
    ready = searcher._coarse
    assert ready is not None
    searcher.search("first", 1)
    assert searcher._coarse is ready


def test_vectors_without_directions_are_searched_exactly() -> None:
    class Round(LowRank):
        def embed(self, texts: Sequence[str]) -> np.ndarray:
            rows = np.stack([np.random.default_rng(list(text.encode())).standard_normal(WIDTH) for text in texts])
            return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    fast, exact = searchers(Round())
    for searcher in (fast, exact):
        searcher.put(entries(1000))
    assert fast.search("question", 10) == exact.search("question", 10)
    assert fast._coarse is None
    assert Coarse.of(np.eye(64, dtype=np.float32)) is None


def test_blank_entries_are_not_found_in_large_banks_either() -> None:
    fast, _ = searchers(LowRank())
    fast.put([*entries(300), *(Entry(f"blank{i}", " ") for i in range(300))])
    hits = fast.search("question", 600)
    assert len(hits) == 300
    assert all(hit.entry.text.strip() for hit in hits)

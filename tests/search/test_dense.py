"""The dense index against plain arithmetic, and the cache before the embedder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from memfactory.errors import EngineError
from memfactory.memory.entries import Entry
from memfactory.search import CachedEmbedder, DenseSearcher, recall
from memfactory.search.base import content


class Counting:
    """Passes texts on and counts them."""

    def __init__(self, embedder: CachedEmbedder) -> None:
        self.embedder, self.asked = embedder, []

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        self.asked += texts
        return self.embedder.embed(texts)


def test_hits_are_the_nearest_by_cosine(use: CachedEmbedder) -> None:
    entries = [
        Entry(str(i), f"{name} likes {thing}", key=name)
        for i, (name, thing) in enumerate(
            (name, thing) for name in "anna ben cleo dan".split() for thing in "tea dogs chess rain ships wine".split()
        )
    ]
    searcher = DenseSearcher(use)
    for at in range(0, len(entries), 5):
        searcher.put(entries[at : at + 5])
    near = use.embed([content(entry) for entry in entries]) @ use.embed(["who plays board games?"])[0]
    exact = np.argsort(-near, kind="stable")[:6]
    hits = searcher.search("who plays board games?", 6)
    assert [int(hit.entry.id) for hit in hits] == exact.tolist()
    np.testing.assert_allclose([hit.score for hit in hits], near[exact], atol=1e-5)
    assert recall(hits, searcher.fork().search("who plays board games?", 6), 6) == 1


def test_vectors_are_of_unit_norm_in_the_order_asked(use: CachedEmbedder) -> None:
    rows = use.embed(["Anna", "", "Ben", "Anna"])
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), [1, 0, 1, 1], atol=1e-5)
    np.testing.assert_array_equal(rows[0], rows[3])
    assert use.embed([]).shape[0] == 0


def test_a_text_is_embedded_once_for_all_banks(use: CachedEmbedder) -> None:
    counting = Counting(use)
    cache = CachedEmbedder(counting, limit=3)
    for owner in ("anna", "ben"):
        DenseSearcher(cache, owner).put([Entry("1", "tea", owner=owner), Entry("2", "tea", owner=owner)])
    assert counting.asked == ["tea"]
    cache.embed(["a", "b"])
    cache.embed(["tea", "c"])  # tea was used last, so `a` goes
    assert len(cache) == 3
    cache.embed(["tea", "b", "a"])
    assert counting.asked == ["tea", "a", "b", "c", "a"]


def test_prefixes_go_where_the_model_wants_them(use: CachedEmbedder) -> None:
    counting = Counting(use)
    searcher = DenseSearcher(counting, query_prefix="query: ", entry_prefix="passage: ")
    searcher.put([Entry("1", "tea"), Entry("2", "")])
    searcher.search("drink", 1)
    assert counting.asked == ["passage: tea", "query: drink"]


def test_small_banks_take_little_room(use: CachedEmbedder) -> None:
    searcher = DenseSearcher(use)
    searcher.put([Entry("1", "tea")])
    assert searcher._vectors.nbytes <= 4 * 512 * 4
    for i in range(100):
        searcher.put([Entry("x", f"tea {i}")])
        searcher.remove(["x"])
    assert searcher._vectors.nbytes <= 4 * 512 * 4


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        (np.ones(3), "not one vector per text"),
        (np.ones((2, 3)), "not one vector per text"),
        (np.ones((1, 0)), "not one vector per text"),
        (np.array([[1.0, np.nan]]), "not finite"),
        ("words", "could not|ValueError"),
    ],
)
def test_bad_vectors_are_refused(rows: object, why: str) -> None:
    class Bad:
        def embed(self, texts: Sequence[str]) -> object:
            return rows

    searcher = DenseSearcher(Bad())
    with pytest.raises(EngineError, match=why):
        searcher.put([Entry("1", "tea")])
    assert len(searcher) == 0


def test_an_embedder_that_changes_its_width_is_refused() -> None:
    class Growing:
        width = 3

        def embed(self, texts: Sequence[str]) -> np.ndarray:
            return np.ones((len(texts), self.width), dtype=np.float32)

    growing = Growing()
    searcher = DenseSearcher(growing)
    searcher.put([Entry("1", "tea")])
    growing.width = 4
    with pytest.raises(EngineError, match="4 numbers, the index has 3"):
        searcher.put([Entry("2", "wine")])
    assert len(searcher) == 1

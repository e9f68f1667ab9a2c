"""`Coarse`: a short version of many vectors, which says cheaply which of them are worth comparing in full.

Vectors of one kind of text lie near a subspace. `Coarse` keeps their coordinates in the directions that hold nine
tenths of their squares (the leading eigenvectors of the second moments of a sample; Deerwester et al., Indexing by
Latent Semantic Analysis, 1990). A product with 128 coordinates instead of 512 reads a quarter of the memory, and
reading memory is what a product of a large matrix with one vector costs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

HELD = 0.9
"""Share of the squares that the coordinates hold. What they miss is spread over many directions, where two texts
hardly ever agree by much."""
SAMPLE = 4096
"""Vectors from which the directions are computed."""
STEP = 32
"""The number of coordinates is a multiple of it."""
AT_LEAST = 1000
"""Candidates, however few are asked for."""
TIMES = 10
"""Candidates for each hit that is asked for."""


class Coarse:
    """Coordinates of the rows of a matrix. Shared between forks until one of them writes."""

    def __init__(self, basis: np.ndarray, rows: np.ndarray) -> None:
        self.basis = basis  # (d, r), orthonormal columns
        self.rows = rows  # (room, r)
        self.shared = False

    @classmethod
    def of(cls, vectors: np.ndarray) -> Coarse | None:
        """For `vectors` (n, d); None where more than half of the numbers would be needed, which saves nothing."""
        # evenly spaced, so that the same vectors always give the same directions
        sample = vectors[:: max(1, len(vectors) // SAMPLE)].astype(np.float64)
        squares, directions = np.linalg.eigh(sample.T @ sample)  # ascending
        held = np.cumsum(squares[::-1])
        needed = int(np.searchsorted(held, HELD * held[-1])) + 1
        count = -(-needed // STEP) * STEP
        if count > vectors.shape[1] // 2:
            return None
        basis = np.ascontiguousarray(directions[:, ::-1][:, :count], dtype=np.float32)
        return cls(basis, vectors @ basis)

    def write(self, slots: Sequence[int], vectors: np.ndarray) -> Coarse:
        """With the rows of `slots` (n,) made from `vectors` (n, d); a new object where this one is shared."""
        room = max(len(self.rows), max(slots) + 1)
        target = self
        if self.shared or room > len(self.rows):
            rows = np.zeros((max(room, len(self.rows) * 9 // 8), self.rows.shape[1]), dtype=np.float32)
            rows[: len(self.rows)] = self.rows
            target = Coarse(self.basis, rows)
        target.rows[list(slots)] = vectors @ self.basis
        return target

    def candidates(self, asked: np.ndarray, used: int, k: int) -> np.ndarray:
        """Slots, in any order, of those among the first `used` rows that may be the `k` nearest to `asked` (d,)."""
        count = max(AT_LEAST, TIMES * k)
        if count >= used:
            return np.arange(used)
        near = self.rows[:used] @ (asked @ self.basis)  # (used,)
        return np.argpartition(near, used - count)[used - count :]

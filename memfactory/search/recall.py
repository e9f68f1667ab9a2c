"""How much of an exact search another one finds."""

from __future__ import annotations

from collections.abc import Sequence

from memfactory.search.base import Hit


def recall(reference: Sequence[Hit], found: Sequence[Hit], k: int) -> float | None:
    """The share of the best `k` of `reference` that is among the best `k` of `found`.

    A reference of fewer than `k` hits counts with what it has. None where it has none: nothing could be found.
    """
    wanted = {hit.entry.id for hit in reference[:k]}
    if not wanted:
        return None
    return len(wanted & {hit.entry.id for hit in found[:k]}) / len(wanted)

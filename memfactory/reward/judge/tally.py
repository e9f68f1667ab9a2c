"""What a judge did, as numbers for the log."""

from __future__ import annotations

from collections.abc import Mapping

from memfactory.endpoints import tally


class Tally(tally.Tally):
    """Counts since they were last taken. The judge counts in its event loop, the trainer takes in its own thread.

    Counted, besides what an endpoint counts: ``asked`` (verdicts asked for), ``cached`` and ``coalesced`` (answered
    from the cache, or by an identical question under way), ``failed`` (never answered), ``comparisons``, ``flips``
    (comparisons whose verdict turned round with the order).
    """

    COUNTS = ("asked", "cached", "coalesced", "failed", *tally.Tally.COUNTS, "comparisons", "flips")

    def __init__(self, price_per_million: tuple[float, float] = (0.0, 0.0)) -> None:
        super().__init__()
        self.price_per_million = price_per_million

    def derived(self, counts: Mapping[str, int]) -> dict[str, float]:
        """``cost`` in the currency of the recipe's price; ``cache_hit_rate``, the share of verdicts that needed no
        request of their own; ``flip_rate``."""
        prompt, completion = self.price_per_million
        derived = {"cost": (prompt * counts["prompt_tokens"] + completion * counts["completion_tokens"]) / 1e6}
        if counts["asked"]:
            derived["cache_hit_rate"] = (counts["cached"] + counts["coalesced"]) / counts["asked"]
        if counts["comparisons"]:
            derived["flip_rate"] = counts["flips"] / counts["comparisons"]
        return derived

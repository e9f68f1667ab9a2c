"""What a judge did, as numbers for the log."""

from __future__ import annotations

from collections import Counter, defaultdict
from threading import Lock


class Tally:
    """Counts since they were last taken. The judge counts in its event loop, the trainer takes in its own thread.

    Counted: ``asked`` (verdicts asked for), ``cached`` and ``coalesced`` (answered from the cache, or by an
    identical question under way), ``failed`` (never answered), ``requests`` (HTTP), ``retries``,
    ``prompt_tokens``, ``completion_tokens``, ``unmetered`` (replies that did not say how many tokens they
    cost), ``comparisons``, ``flips`` (comparisons whose verdict turned round with the order), and
    ``failures/CLASS`` for each failed request.
    """

    COUNTS = (
        "asked cached coalesced failed requests retries prompt_tokens completion_tokens unmetered comparisons flips"
    ).split()

    def __init__(self, price_per_million: tuple[float, float] = (0.0, 0.0)) -> None:
        self.price_per_million = price_per_million
        self._lock = Lock()
        self._counts: Counter[str] = Counter()
        self._sums: defaultdict[str, float] = defaultdict(float)

    def add(self, **counts: int) -> None:
        with self._lock:
            self._counts.update(counts)

    def failure(self, kind: str) -> None:
        self.add(**{f"failures/{kind}": 1})

    def time(self, what: str, seconds: float) -> None:
        """Note one duration of `what`; :meth:`take` gives the mean."""
        with self._lock:
            self._sums[what] += seconds
            self._counts[f"n/{what}"] += 1

    def take(self) -> dict[str, float]:
        """Counts and derived numbers since the last call.

        ``cache_hit_rate`` is the share of verdicts that needed no request of their own, ``cost`` is in the
        currency of the recipe's price, ``latency`` the mean seconds from request to reply, ``wait`` the mean
        seconds before it for a free place and the rate limits. A rate whose denominator is 0 is left out.
        """
        with self._lock:
            counts, sums = self._counts, self._sums
            self._counts, self._sums = Counter(), defaultdict(float)
        taken = {name: float(counts[name]) for name in self.COUNTS}
        taken |= {name: float(n) for name, n in sorted(counts.items()) if name.startswith("failures/")}
        prompt, completion = self.price_per_million
        taken["cost"] = (prompt * taken["prompt_tokens"] + completion * taken["completion_tokens"]) / 1e6
        if counts["asked"]:
            taken["cache_hit_rate"] = (counts["cached"] + counts["coalesced"]) / counts["asked"]
        if counts["comparisons"]:
            taken["flip_rate"] = counts["flips"] / counts["comparisons"]
        return taken | {what: total / counts[f"n/{what}"] for what, total in sums.items()}

"""What was asked of an endpoint, as numbers for the log."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from threading import Lock


class Tally:
    """Counts since they were last taken. They are counted in one event loop and taken in another thread.

    Counted: ``requests`` (HTTP), ``retries``, ``prompt_tokens``, ``completion_tokens``, ``unmetered`` (replies that
    did not say how many tokens they cost), and ``failures/CLASS`` for each failed request.
    """

    COUNTS: tuple[str, ...] = ("requests", "retries", "prompt_tokens", "completion_tokens", "unmetered")

    def __init__(self) -> None:
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

        ``latency`` is the mean of the seconds from request to reply, ``wait`` of those before it for a free place and
        the rate limits. A rate whose denominator is 0 is left out.
        """
        with self._lock:
            counts, sums = self._counts, self._sums
            self._counts, self._sums = Counter(), defaultdict(float)
        taken = {name: float(counts[name]) for name in self.COUNTS}
        taken |= {name: float(n) for name, n in sorted(counts.items()) if name.startswith("failures/")}
        taken |= self.derived(counts)
        return taken | {what: total / counts[f"n/{what}"] for what, total in sums.items()}

    def derived(self, counts: Mapping[str, int]) -> dict[str, float]:
        """Numbers that follow from `counts`."""
        return {}

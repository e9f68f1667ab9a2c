"""What a server counts, for Prometheus. No label holds a user or a text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from memfactory.serve.desk import Replied

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


@dataclass
class Metrics:
    """The counters of one server."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        kept = self.registry
        self.requests = Counter("memfactory_requests", "Chat requests by HTTP status", ["status"], registry=kept)
        self.seconds = Histogram("memfactory_request_seconds", "Answered requests", buckets=_SECONDS, registry=kept)
        self.under_way = Gauge("memfactory_requests_under_way", "Requests that are not answered yet", registry=kept)
        self.turns = Counter("memfactory_turns", "Turns by module", ["module"], registry=kept)
        self.tokens = Counter("memfactory_tokens", "Tokens of prompts and completions", ["kind"], registry=kept)

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Around one request, until it is answered."""
        start = perf_counter()
        with self.under_way.track_inprogress():
            yield
        self.seconds.observe(perf_counter() - start)

    def count(self, replied: Replied) -> None:
        """What an answer took."""
        for turn in replied.episode.turns:
            self.turns.labels(turn.module).inc()
        self.tokens.labels("prompt").inc(replied.prompt_tokens)
        self.tokens.labels("completion").inc(replied.completion_tokens)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)

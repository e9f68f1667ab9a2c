"""One endpoint over HTTP: limits, retries and a deadline around a single POST."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from time import monotonic
from typing import Any, Protocol, TypeVar

import httpx
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_random_exponential

from memfactory.endpoints.failures import (
    FINAL,
    UNUSABLE,
    Failure,
    Fixes,
    RequestFailed,
    of_status,
    of_transport,
)
from memfactory.endpoints.limits import Limits
from memfactory.endpoints.tally import Tally
from memfactory.loops import PerLoop

CONNECT = 10.0
"""Most seconds to wait for a connection. A request that is under way may use all that is left of the deadline."""
POOL = 8
"""Connections of one client. httpx looks at all pairs of a pool's connections whenever a request begins or ends: with
64 in one pool a request was measured to cost 6 ms of Python, with 8 in each of eight pools a quarter of that."""
BACKOFF = wait_random_exponential(multiplier=0.5, max=8)
"""Seconds before the n-th repetition: uniform in [0, 2^n / 4], so that refused requests do not return together."""
UNUSABLE_ATTEMPTS = 2
"""A model that twice gave nothing in the form asked for will not give it the third time."""


class Metered(Protocol):
    """A reply that says what it cost."""

    @property
    def usage(self) -> Mapping[str, Any]:
        """``prompt_tokens`` and ``completion_tokens``; empty where the server did not say."""
        ...


MeteredT = TypeVar("MeteredT", bound=Metered)
ResultT = TypeVar("ResultT")


@dataclass(slots=True)
class _Clock:
    """The deadline of one reply. It runs during requests and pauses between them, not while waiting for a place."""

    limit: float
    spent: float = 0.0
    unusable: int = 0

    @property
    def left(self) -> float:
        return max(0.0, self.limit - self.spent)

    @contextmanager
    def running(self) -> Iterator[None]:
        start = monotonic()
        try:
            yield
        finally:
            self.spent += monotonic() - start

    async def sleep(self, seconds: float) -> None:
        with self.running():
            await asyncio.sleep(seconds)


@dataclass(slots=True)
class _Connection:
    clients: list[httpx.AsyncClient]
    places: list[httpx.AsyncClient]
    """Clients with a free connection, each as often as it has one."""
    limits: Limits


@dataclass(slots=True, kw_only=True)
class Endpoint:
    """Asks one endpoint one thing at a time; many may ask at once, in any number of event loops.

    Numbers mean what the fields of the same names mean in the recipe's `judge:`.
    """

    base_url: str
    settings: str
    """How messages name the settings below: what stands before the name of one, e.g. ``judge.``"""
    fixes: Fixes
    tally: Tally
    api_key_env: str
    concurrency: int
    deadline: float
    attempts: int
    max_tokens: int = 512
    """First guess of how long a reply is, for `tokens_per_minute`."""
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    _connections: PerLoop[_Connection] = field(init=False)

    def __post_init__(self) -> None:
        self._connections = PerLoop(self._connect)

    async def post(
        self,
        path: str,
        body: Mapping[str, Any],
        parse: Callable[[httpx.Response], MeteredT],
        read: Callable[[MeteredT], ResultT],
        characters: int = 0,
        headers: Mapping[str, str] | None = None,
    ) -> ResultT:
        """What `read` makes of what `parse` makes of the reply to `body`, after as many attempts as allowed.

        Args:
            path: below `base_url`, e.g. ``/chat/completions``.
            body: the request, sent as JSON.
            parse: raises RequestFailed for a reply that is none; what it cost is counted whatever `read` says.
            read: raises RequestFailed for a reply that cannot be used.
            characters: of the prompt, for `tokens_per_minute`.
            headers: sent beside the usual ones.

        Raises:
            RequestFailed: no reply came that can be used; says why and what to change.
        """
        clock = _Clock(self.deadline)
        retrying = AsyncRetrying(
            retry=retry_if_exception(lambda error: isinstance(error, RequestFailed) and error.kind not in FINAL),
            wait=_pause,
            stop=partial(self._give_up, clock),
            before_sleep=lambda state: self.tally.add(retries=1),
            sleep=clock.sleep,
            reraise=True,
        )
        # escaped to ASCII: a lone surrogate in a prompt must not end the run
        content = json.dumps(body).encode("ascii")
        try:
            return await retrying(self._attempt, path, content, characters, parse, read, clock, headers)
        except RequestFailed as failed:
            attempt = retrying.statistics["attempt_number"]
            why = f"{failed.why} (attempt {attempt} of {self.attempts}, {clock.spent:.1f} s)"
            raise RequestFailed(failed.kind, why, self.fixes.of(failed), status=failed.status) from failed

    @property
    def local(self) -> bool:
        """Whether it is on this machine."""
        return is_local(self.base_url)

    async def aclose(self) -> None:
        """Close the running loop's connections."""
        connection = self._connections.pop()
        if connection is not None:
            for client in connection.clients:
                await client.aclose()

    def _connect(self) -> _Connection:
        key = os.environ.get(self.api_key_env, "").strip()
        clients = [
            httpx.AsyncClient(
                headers={"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {}),
                timeout=httpx.Timeout(None, connect=CONNECT),  # the deadline is kept outside
                limits=httpx.Limits(max_connections=POOL, max_keepalive_connections=POOL),
                trust_env=not is_local(self.base_url),
                verify=certificates(),
            )
            for _ in range(-(-self.concurrency // POOL))
        ]
        limits = Limits(self.concurrency, self.requests_per_minute, self.tokens_per_minute, self.max_tokens)
        return _Connection(clients, [client for client in clients for _ in range(POOL)], limits)

    async def _attempt(
        self,
        path: str,
        content: bytes,
        characters: int,
        parse: Callable[[httpx.Response], MeteredT],
        read: Callable[[MeteredT], ResultT],
        clock: _Clock,
        headers: Mapping[str, str] | None,
    ) -> ResultT:
        connection = self._connections.get()
        asked = monotonic()
        async with connection.limits.admit(characters):
            self.tally.time("wait", monotonic() - asked)
            self.tally.add(requests=1)
            client = connection.places.pop()  # there is one: no more requests are admitted than there are places
            try:
                with clock.running():
                    response = await self._post(client, path, content, clock.left, headers)
                    self.tally.time("latency", response.elapsed.total_seconds())
                parsed = parse(response)
                self._meter(connection.limits, characters, parsed.usage)
                return read(parsed)
            except RequestFailed as failed:
                clock.unusable += failed.kind in UNUSABLE
                self.tally.failure(failed.kind)
                raise
            finally:
                connection.places.append(client)

    async def _post(
        self,
        client: httpx.AsyncClient,
        path: str,
        content: bytes,
        seconds: float,
        headers: Mapping[str, str] | None,
    ) -> httpx.Response:
        try:
            async with asyncio.timeout(seconds):
                response = await client.post(f"{self.base_url.rstrip('/')}{path}", content=content, headers=headers)
        except TimeoutError as error:
            why = f"no reply within {self.settings}deadline={self.deadline:g} s"
            raise RequestFailed(Failure.DEADLINE, why) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise of_transport(error) from error
        if not response.is_success:
            raise of_status(response)
        return response

    def _meter(self, limits: Limits, characters: int, usage: Mapping[str, Any]) -> None:
        counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
        prompt, completion = (n if isinstance(n, int) and n > 0 else 0 for n in counts)
        if not prompt:
            self.tally.add(unmetered=1)
            return
        self.tally.add(prompt_tokens=prompt, completion_tokens=completion)
        limits.learn(characters, prompt, completion)

    def _give_up(self, clock: _Clock, state: RetryCallState) -> bool:
        """Out of attempts, out of time before the next one, or twice without a reply that can be used."""
        return (
            state.attempt_number >= self.attempts
            or state.upcoming_sleep >= clock.left
            or clock.unusable >= UNUSABLE_ATTEMPTS
        )


def _pause(state: RetryCallState) -> float:
    """Seconds until the next attempt: jitter, on top of what the server asked for."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after if isinstance(error, RequestFailed) else 0.0
    return asked + BACKOFF(state)


@cache
def certificates() -> ssl.SSLContext:
    """Whom to trust. Once for all clients: a large file is read for it, in some 30 ms."""
    return httpx.create_ssl_context()


def is_local(url: str) -> bool:
    """Whether `url` points to this machine, which is never reached through a proxy of the environment."""
    try:
        host = httpx.URL(url).host
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except (httpx.InvalidURL, ValueError):
        return False

"""One OpenAI-compatible endpoint: limits, retries and a deadline around a single POST."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import Any

import httpx
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_random_exponential

from memfactory.errors import JudgeError, boundary
from memfactory.recipe import JudgeSection
from memfactory.reward.judge.failures import FINAL, Failure, RequestFailed, of_status, of_transport
from memfactory.reward.judge.limits import Limits
from memfactory.reward.judge.loops import PerLoop
from memfactory.reward.judge.prompt import Question, UnreadableVerdict, Verdict, read_verdict
from memfactory.reward.judge.tally import Tally

CONNECT = 10.0
"""Most seconds to wait for a connection. A request that is under way may use all that is left of the deadline."""
POOL = 8
"""Connections of one client. httpx looks at all pairs of a pool's connections whenever a request begins or ends: with
64 in one pool a request was measured to cost 6 ms of Python, with 8 in each of eight pools a quarter of that."""
BACKOFF = wait_random_exponential(multiplier=0.5, max=8)
"""Seconds before the n-th repetition: uniform in [0, 2^n / 4], so that refused requests do not return together."""
UNREADABLE_ATTEMPTS = 2
"""A judge that twice gave no verdict in the form asked for will not give one the third time."""


@dataclass(slots=True)
class _Clock:
    """The deadline of one verdict. It runs during requests and pauses between them, not while waiting for a place."""

    limit: float
    spent: float = 0.0
    unreadable: int = 0

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


@dataclass(slots=True)
class Endpoint:
    """Asks one model one question at a time; many may ask at once."""

    section: JudgeSection
    tally: Tally
    _connections: PerLoop[_Connection] = field(init=False)

    def __post_init__(self) -> None:
        self._connections = PerLoop(self._connect)

    @property
    def url(self) -> str:
        return f"{(self.section.base_url or '').rstrip('/')}/chat/completions"

    async def ask(self, question: Question) -> Verdict:
        """The verdict on `question`, after as many attempts as the recipe allows.

        Raises:
            JudgeError: none came; says why and what to change.
        """
        clock = _Clock(self.section.deadline)
        retrying = AsyncRetrying(
            retry=retry_if_exception(lambda error: isinstance(error, RequestFailed) and error.kind not in FINAL),
            wait=_pause,
            stop=partial(self._give_up, clock),
            before_sleep=lambda state: self.tally.add(retries=1),
            sleep=clock.sleep,
            reraise=True,
        )
        what = f"judge '{self.section.model}' gave no verdict on rubric '{question.rubric}'"
        with boundary(JudgeError, what):
            try:
                return await retrying(self._attempt, question, clock)
            except RequestFailed as failed:
                attempt = retrying.statistics["attempt_number"]
                why = f"{failed.why} (attempt {attempt} of {self.section.attempts}, {clock.spent:.1f} s)"
                raise JudgeError(what, why, failed.fix) from failed

    async def aclose(self) -> None:
        """Close the running loop's connections."""
        connection = self._connections.pop()
        if connection is not None:
            for client in connection.clients:
                await client.aclose()

    def _connect(self) -> _Connection:
        section = self.section
        key = os.environ.get(section.api_key_env, "").strip()
        certificates = httpx.create_ssl_context()  # once: it reads a large file
        clients = [
            httpx.AsyncClient(
                headers={"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {}),
                timeout=httpx.Timeout(None, connect=CONNECT),  # the deadline is kept outside
                limits=httpx.Limits(max_connections=POOL, max_keepalive_connections=POOL),
                trust_env=not is_local(section.base_url or ""),
                verify=certificates,
            )
            for _ in range(-(-section.concurrency // POOL))
        ]
        limits = Limits(
            section.concurrency, section.requests_per_minute, section.tokens_per_minute, section.max_tokens
        )
        return _Connection(clients, [client for client in clients for _ in range(POOL)], limits)

    async def _attempt(self, question: Question, clock: _Clock) -> Verdict:
        connection = self._connections.get()
        characters = sum(len(message["content"]) for message in question.messages)
        asked = monotonic()
        async with connection.limits.admit(characters):
            self.tally.time("wait", monotonic() - asked)
            self.tally.add(requests=1)
            client = connection.places.pop()  # there is one: no more requests are admitted than there are places
            try:
                with clock.running():
                    response = await self._post(client, question, clock.left)
                    self.tally.time("latency", response.elapsed.total_seconds())
                text, usage = _read_completion(response)
                self._meter(connection.limits, characters, usage)
                return read_verdict(text, question.labels)
            except UnreadableVerdict as error:
                clock.unreadable += 1
                self.tally.failure(Failure.VERDICT)
                raise RequestFailed(Failure.VERDICT, str(error)) from error
            except RequestFailed as failed:
                self.tally.failure(failed.kind)
                raise
            finally:
                connection.places.append(client)

    async def _post(self, client: httpx.AsyncClient, question: Question, seconds: float) -> httpx.Response:
        body = {
            "model": self.section.model,
            "messages": question.messages,
            "temperature": self.section.temperature,
            "max_tokens": self.section.max_tokens,
            "response_format": question.response_format,
        }
        try:
            async with asyncio.timeout(seconds):
                # escaped to ASCII: a lone surrogate in a rubric must not end the run
                response = await client.post(self.url, content=json.dumps(body).encode("ascii"))
        except TimeoutError as error:
            raise RequestFailed(
                Failure.DEADLINE, f"no reply within judge.deadline={self.section.deadline:g} s"
            ) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise of_transport(error) from error
        if not response.is_success:
            raise of_status(response)
        return response

    def _meter(self, limits: Limits, characters: int, usage: dict[str, Any]) -> None:
        counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
        prompt, completion = (n if isinstance(n, int) and n > 0 else 0 for n in counts)
        if not prompt:
            self.tally.add(unmetered=1)
            return
        self.tally.add(prompt_tokens=prompt, completion_tokens=completion)
        limits.learn(characters, prompt, completion)

    def _give_up(self, clock: _Clock, state: RetryCallState) -> bool:
        """Out of attempts, out of time before the next one, or twice without a readable verdict."""
        return (
            state.attempt_number >= self.section.attempts
            or state.upcoming_sleep >= clock.left
            or clock.unreadable >= UNREADABLE_ATTEMPTS
        )


def _pause(state: RetryCallState) -> float:
    """Seconds until the next attempt: jitter, on top of what the server asked for."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after if isinstance(error, RequestFailed) else 0.0
    return asked + BACKOFF(state)


def _read_completion(response: httpx.Response) -> tuple[str, dict[str, Any]]:
    """Text and usage of a chat completion.

    Raises:
        RequestFailed: the body is something else.
    """
    try:
        data = response.json()
        choice = data["choices"][0]
        text = choice["message"]["content"]
        usage = data.get("usage") or {}
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        shown = " ".join(response.text[:200].split())
        raise RequestFailed(Failure.GARBAGE, f"the reply is no chat completion: {shown!r}") from error
    # a refusal, or a model that spent all its tokens on thinking, has a content of null
    return text if isinstance(text, str) else "", usage if isinstance(usage, dict) else {}


def is_local(url: str) -> bool:
    """Whether `url` points to this machine, which is never reached through a proxy of the environment."""
    try:
        host = httpx.URL(url).host
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except (httpx.InvalidURL, ValueError):
        return False

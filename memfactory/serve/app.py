"""The HTTP side: OpenAI's chat completions over a :class:`~memfactory.serve.desk.Desk`."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from memfactory.serve.access import Limits, Tokens
from memfactory.serve.bodies import Writer, model_card, read_body
from memfactory.serve.desk import Asked, Desk, Replied, owner_of
from memfactory.serve.metrics import Metrics
from memfactory.serve.refusals import Refused, refusal_of
from memfactory.serve.streaming import EventStream

PATHS = "POST /v1/chat/completions, GET /v1/models, GET and DELETE /v1/memory, GET /health, GET /metrics"
GONE = 499
"""Status, for the metrics alone, of a request whose client did not wait for its answer."""


@dataclass(frozen=True)
class Options:
    """Limits of a server."""

    body_bytes: int
    """Longest body."""
    body_seconds: float
    """For a body to arrive."""
    request_seconds: float
    """For an answer, waiting for one's turn included."""


@dataclass
class Gate:
    """Whether new requests are let in, and how many are inside."""

    closed: bool = False
    inside: int = 0

    def check(self) -> None:
        """Let a request pass.

        Raises:
            Refused: the server is about to end.
        """
        if self.closed:
            raise Refused(503, "the server is shutting down; try again soon", "shutting_down", retry_after=5)

    def enter(self, held: ExitStack) -> None:
        """Let a request in, and count it until `held` is closed.

        Raises:
            Refused: the server is about to end.
        """
        self.check()
        self.inside += 1
        held.callback(self._leave)

    def _leave(self) -> None:
        self.inside -= 1


@dataclass
class Service:
    """What answers requests, put together."""

    desk: Desk
    tokens: Tokens
    limits: Limits
    options: Options
    gate: Gate = field(default_factory=Gate)
    metrics: Metrics = field(default_factory=Metrics)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def model(self) -> str:
        return self.desk.served.name

    def user(self, request: Request) -> str:
        """Who asks."""
        return self.tokens.user(request.headers)

    async def complete(self, request: Request) -> Response:
        """``POST /v1/chat/completions``."""
        held = ExitStack()  # what a request holds until its last byte is sent
        try:
            user = self.user(request)
            held.enter_context(self.limits.admit(user))
            self.gate.check()
            raw = await self._body(request)
            return await self._reply(request, raw, user, held)
        except BaseException:
            held.close()
            raise

    @asynccontextmanager
    async def with_memory(self, request: Request, end_user: str) -> AsyncIterator[str]:
        """Inside, somebody looks at a memory, or removes one; gives its owner.

        Raises:
            Refused: nobody who is known; one request too many; the server is about to end.
        """
        user = self.user(request)
        with self.limits.admit(user), ExitStack() as held:
            self.gate.enter(held)
            yield owner_of(user, end_user)

    async def _reply(self, request: Request, raw: bytes, user: str, held: ExitStack) -> Response:
        body = read_body(raw, self.model)
        asked, writer = body.asked(user, self.desk.served.sampling), Writer(body)
        self.gate.enter(held)
        if body.stream:
            told: asyncio.Queue[str] = asyncio.Queue()
            loop = asyncio.get_running_loop()
            work = asyncio.create_task(self._answer(asked, lambda text: _tell(loop, told, text)))
            return EventStream(work, told, writer, held)
        with held:
            return _json(writer.whole(await _while_there(request, self._answer(asked, lambda text: None))))

    async def _answer(self, asked: Asked, progress: Callable[[str], None]) -> Replied:
        with self.metrics.timing():
            async with asyncio.timeout(self.options.request_seconds):
                replied = await self.desk.answer(asked, progress)
        self.metrics.count(replied)
        return replied

    async def _body(self, request: Request) -> bytes:
        """The body, held in memory up to the limit and no further.

        Raises:
            Refused: it is too large, too slow, or not JSON.
        """
        limit = self.options.body_bytes
        too_large = Refused(413, f"the body is larger than {limit} bytes", "body_too_large")
        # a page in the browser cannot send this type to another site unasked
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "Content-Type must be application/json", "unsupported_media_type")
        announced = request.headers.get("content-length", "0")
        if not announced.isascii() or not announced.isdigit() or int(announced) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self.options.body_seconds):
                async for part in request.stream():
                    if len(body) + len(part) > limit:
                        raise too_large
                    body += part
        except TimeoutError as error:
            raise Refused(408, "the body did not arrive in time", "timeout") from error
        except ClientDisconnect as error:
            raise Refused(400, "the body broke off", "incomplete_body") from error
        return bytes(body)


def build_app(service: Service) -> FastAPI:
    """The routes of `service`. There are no pages: those of FastAPI would load scripts from elsewhere."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    desk = service.desk

    @app.exception_handler(Exception)
    @app.exception_handler(HTTPException)
    @app.exception_handler(Refused)
    async def refuse(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            why = f"{request.method} {request.url.path}: {error.detail}; there are {PATHS}"
            error = Refused(error.status_code, why, "not_found")
        return _json((refused := refusal_of(error)).body, refused.status, refused.headers)

    @app.get("/health")
    async def health() -> Response:
        if service.gate.closed:
            return _json({"status": "shutting down"}, 503)
        return _json({"status": "ok", "model": service.model})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        service.user(request)
        return _json({"object": "list", "data": [model_card(service.model, service.created)]})

    @app.get("/v1/models/{name}")
    async def one_model(name: str, request: Request) -> Response:
        service.user(request)
        if name != service.model:
            raise Refused(404, f"there is no model {name!r} here; it is {service.model!r}", "model_not_found")
        return _json(model_card(service.model, service.created))

    @app.get("/v1/memory")
    async def memory(request: Request, user: str = "") -> Response:
        async with service.with_memory(request, user) as owner:
            return _json({"object": "memory", "text": await desk.shown(owner)})

    @app.delete("/v1/memory")
    async def forget(request: Request, user: str = "") -> Response:
        async with service.with_memory(request, user) as owner:
            await desk.forget(owner)
            return _json({"object": "memory", "deleted": True})

    @app.post("/v1/chat/completions")
    async def completions(request: Request) -> Response:
        return await _counted(service, lambda: service.complete(request))

    return app


async def _while_there(request: Request, answer: Coroutine[Any, Any, Replied]) -> Replied:
    """What `answer` comes to; cancelled when the client goes away. Only for a request whose body was read.

    Raises:
        Refused: it went away before the answer was on the disk.
    """
    work, gone = asyncio.create_task(answer), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            work.cancel()
            await asyncio.wait({work})
        if work.cancelled():
            raise Refused(GONE, "the client went away; nothing was kept", "client_gone")
        return work.result()
    finally:
        gone.cancel()
        work.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _counted(service: Service, answer: Callable[[], Awaitable[Response]]) -> Response:
    """What `answer` gives, or the refusal that it raises, counted by its status."""
    try:
        response = await answer()
    except Exception as error:
        refused = refusal_of(error)
        response = _json(refused.body, refused.status, refused.headers)
    service.metrics.requests.labels(str(response.status_code)).inc()
    return response


def _tell(loop: asyncio.AbstractEventLoop, told: asyncio.Queue[str], text: str) -> None:
    loop.call_soon_threadsafe(told.put_nowait, text)


def _json(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    # escaped to ASCII: half of a surrogate pair in an answer has no UTF-8
    return Response(json.dumps(data), status, headers, "application/json")

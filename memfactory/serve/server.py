"""The process of a server: its socket, its end, and clients that take their time."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from memfactory.errors import EngineError
from memfactory.serve.app import Service, build_app

CONNECTIONS = 2048
"""Connections at once; more are told 503."""
IDLE = 30
"""Seconds that a connection may be open without a request, or with one whose head does not come to an end."""
LAST = 5
"""Seconds that clients have, once all is answered, to take their answers."""


class Patient(H11Protocol):
    """HTTP/1.1 that hangs up on a client who does not send the head of a request, be it the first or a later one."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        # before what uvicorn does: it may begin a request whose head came while the last one was answered. Its own
        # time for an idle connection ends with the first byte of a head.
        self._await_head()
        super().on_response_complete()

    def _await_head(self) -> None:
        self._stop()
        self._timer = self.loop.call_later(IDLE, self._silent, self.cycle)

    def _silent(self, last: Any) -> None:
        if self.cycle is last:  # no request has begun since
            self.transport.close()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


class Server(uvicorn.Server):
    """Ends in two steps: at the first signal new requests are refused and those inside are answered, then it ends."""

    def __init__(self, config: uvicorn.Config, service: Service, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.service, self.ready = service, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.service.gate.closed:  # the second time: at once
            self.should_exit = self.force_exit = True
        self.service.gate.closed = True

    async def on_tick(self, counter: int) -> bool:
        if self.service.gate.closed and not self.service.gate.inside:
            self.should_exit = True
        return await super().on_tick(counter)


def bind(host: str, port: int) -> socket.socket:
    """A socket of its own; who connects is refused until the server runs.

    Raises:
        EngineError: the address is taken, or is not this machine's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        raise EngineError(f"cannot listen at {host}:{port}", str(error), "--port NUMBER, or --host ADDRESS") from error
    return bound


def serve(service: Service, bound: socket.socket, ready: Callable[[], None]) -> None:
    """Answer requests until a signal, and those that are inside to their end.

    Args:
        bound: where to listen.
        ready: called when requests are taken.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    config = uvicorn.Config(
        build_app(service),
        http=Patient,
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=IDLE,
        timeout_graceful_shutdown=LAST,
    )
    try:
        Server(config, service, ready).run([bound])
    finally:
        service.desk.close()

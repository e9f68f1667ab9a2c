"""A real HTTP server on this machine that answers as an OpenAI-compatible endpoint would, or fails as told."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


@dataclass
class Reply:
    """What the server sends; `cut` closes the connection in the middle of the body."""

    text: str | None = '{"reason": "it fits", "verdict": "yes"}'
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    usage: dict[str, int] | None = field(default_factory=lambda: {"prompt_tokens": 100, "completion_tokens": 10})
    finish: str | None = "stop"
    body: bytes | None = None
    """Instead of a chat completion around `text`."""
    cut: str = ""
    """`length`: fewer bytes than announced; `chunked`: no last chunk; `reset`: nothing at all."""

    def content(self) -> bytes:
        if self.body is not None:
            return self.body
        choice = {"index": 0, "finish_reason": self.finish, "message": {"role": "assistant", "content": self.text}}
        return json.dumps({"choices": [choice]} | ({"usage": self.usage} if self.usage else {})).encode()


def yes(request: dict[str, Any], number: int) -> Reply:
    return Reply()


class LocalServer:
    """An HTTP server in this process, with a thread for each connection, that can end as a killed one does.

    Args:
        port: 0 takes a free one.
    """

    def __init__(self, port: int = 0) -> None:
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                server._sockets.append(self.connection)

            def do_GET(self) -> None:
                server._handle(self, b"")

            def do_POST(self) -> None:
                server._handle(self, self.rfile.read(int(self.headers["Content-Length"])))

            do_PUT = do_POST

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 256
            daemon_threads = True
            allow_reuse_address = True

            def handle_error(self, *_: object) -> None:  # a client that gave up is part of some tests
                pass

        self._server = Server(("127.0.0.1", port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def port(self) -> int:
        port: int = self._server.server_address[1]
        return port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.die()

    def die(self) -> None:
        """End as a process does that is killed: nobody listens any more, and open connections break off."""
        self._server.shutdown()
        self._server.server_close()
        for connection in self._sockets:
            with contextlib.suppress(OSError):  # closed already
                connection.shutdown(socket.SHUT_RDWR)

    def _handle(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        raise NotImplementedError


class ChatServer(LocalServer):
    """Answers ``POST /v1/chat/completions`` by ``answer(request, number)``; number counts from 0."""

    def __init__(self, answer: Callable[[dict[str, Any], int], Reply] = yes) -> None:
        super().__init__()
        self.answer = answer
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.most_at_once = self._at_once = 0

    @property
    def url(self) -> str:
        return f"{super().url}/v1"

    def _handle(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        if handler.path != "/v1/chat/completions":
            handler.send_error(404)
            return
        request = json.loads(body)
        with self._lock:
            number = len(self.requests)
            self.requests.append(request)
            self.headers.append(dict(handler.headers))
            self.times.append(time.monotonic())
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            reply = self.answer(request, number)
            time.sleep(reply.delay)
        finally:
            with self._lock:
                self._at_once -= 1
        _send(handler, reply)


def _send(handler: BaseHTTPRequestHandler, reply: Reply) -> None:
    content = reply.content()
    handler.close_connection = bool(reply.cut)
    if reply.cut == "reset":
        return
    handler.send_response(reply.status)
    for name, value in {"Content-Type": "application/json", **reply.headers}.items():
        handler.send_header(name, value)
    if reply.cut == "chunked":
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        half = content[: len(content) // 2]
        handler.wfile.write(f"{len(half):x}\r\n".encode() + half + b"\r\n")
        return
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[: len(content) // 2] if reply.cut else content)


def fields_of(request: dict[str, Any]) -> dict[str, str]:
    """The fields that a request asks to grade."""
    fields: dict[str, str] = json.loads(request["messages"][-1]["content"])
    return fields

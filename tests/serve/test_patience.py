"""Connections on which no head of a request comes to an end."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import uvicorn

from memfactory.serve import server
from memfactory.serve.server import Patient


@pytest.mark.parametrize("answered", [0, 1, 2], ids=["the first", "the second", "the third"])
def test_a_head_that_does_not_end_is_not_waited_for(answered: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each request of a connection; and whoever sends a whole one meanwhile is answered."""
    monkeypatch.setattr(server, "IDLE", 0.3)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def main() -> None:
        config = uvicorn.Config(app, http=Patient, lifespan="off", log_config=None, timeout_keep_alive=30)
        config.load()
        state = uvicorn.server.ServerState()
        loop = asyncio.get_running_loop()
        listening = await loop.create_server(lambda: Patient(config, state, {}), "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*listening.sockets[0].getsockname())
        whole = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
        for _ in range(answered):
            writer.write(whole)
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 204")
        writer.write(whole[:20])
        assert await asyncio.wait_for(reader.read(), 10) == b""
        listening.close()
        writer.close()

    asyncio.run(main())

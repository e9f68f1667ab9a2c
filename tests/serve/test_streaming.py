"""A stream to a client that takes nothing any more."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from typing import Any

import pytest

from memfactory.episode import Episode, Task
from memfactory.serve import streaming
from memfactory.serve.bodies import Body, Writer
from memfactory.serve.desk import Replied


def test_a_client_that_takes_nothing_gives_its_place_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "TAKE", 0.05)
    body = Body.model_validate({"model": "m", "messages": [{"role": "user", "content": "?"}], "stream": True})
    left: list[str] = []

    async def answer() -> Replied:
        return Replied("word", False, Episode(Task("t", (), ())))

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":  # what a full socket does
            await asyncio.Event().wait()

    async def main() -> None:
        held = ExitStack()
        held.callback(left.append, "left")
        work = asyncio.create_task(answer())
        stream = streaming.EventStream(work, asyncio.Queue(), Writer(body), held)
        await asyncio.wait_for(stream({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send), 10)

    asyncio.run(main())
    assert left == ["left"]

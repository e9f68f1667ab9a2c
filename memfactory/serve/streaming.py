"""Server-sent events: what the agent does as comments, then its answer in OpenAI's chunks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import ExitStack, suppress

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from memfactory.serve.bodies import Writer
from memfactory.serve.desk import Replied
from memfactory.serve.refusals import LOG, refusal_of

KEEP_ALIVE = 10.0
"""Seconds of silence before a comment is sent, so that nobody in between takes the connection for dead."""

TAKE = 30.0
"""Seconds for a client to take the pieces of its answer."""


class EventStream(StreamingResponse):
    """The reply to a request with ``stream``.

    The answer exists when the agent's last turn is done, so it comes in quick succession then; before, comments tell
    what the agent does. A client that goes away ends the work, unless the answer was on the disk already.

    Args:
        work: gives the answer.
        told: what the agent does, in words.
        writer: writes the chunks.
        held: closed at the end, whatever it is.
    """

    def __init__(self, work: asyncio.Task[Replied], told: asyncio.Queue[str], writer: Writer, held: ExitStack) -> None:
        self.work, self.told, self.writer, self.held = work, told, writer, held
        super().__init__(
            self._events(),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},  # no proxy may collect it
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(None) as limit:
                # a client that reads nothing would keep its place, and the server from ending
                timer = asyncio.create_task(self._limit(limit))
                try:
                    await super().__call__(scope, receive, send)
                finally:
                    timer.cancel()
        except TimeoutError:
            LOG.warning("a client did not take its answer in %g s; it is in the memory all the same", TAKE)
        finally:
            self.work.cancel()
            with suppress(BaseException):  # told in the stream, or of no interest to anybody any more
                await self.work
            self.held.close()

    async def _limit(self, limit: asyncio.Timeout) -> None:
        await asyncio.wait({self.work})
        limit.reschedule(asyncio.get_running_loop().time() + TAKE)

    async def _events(self) -> AsyncIterator[str]:
        waiting = asyncio.create_task(self.told.get())
        try:
            while not self.work.done():
                await asyncio.wait({self.work, waiting}, timeout=KEEP_ALIVE, return_when=asyncio.FIRST_COMPLETED)
                if waiting.done():
                    yield f": {waiting.result()}\n\n"
                    waiting = asyncio.create_task(self.told.get())
                elif not self.work.done():
                    yield ": still at work\n\n"
        finally:
            waiting.cancel()
        error = self.work.exception()
        if error is not None:
            yield f"data: {json.dumps(refusal_of(error).body)}\n\n"
            return
        for chunk in self.writer.pieces(self.work.result()):
            yield f"data: {json.dumps(chunk)}\n\n"
        yield "data: [DONE]\n\n"

"""When the next request may go out: a free place, requests per minute, tokens per minute."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiolimiter import AsyncLimiter

BURST = 1.0
"""Seconds of a rate that may go out at once. A bucket of a whole minute would let two minutes' worth through in
the first one, and be answered with 429."""
CHARACTERS_PER_TOKEN = 3.0
"""First guess, on the careful side; corrected by what replies say they cost."""
LEARNING = 0.1
"""Weight of the newest reply in the running means of token use."""


def bucket(per_minute: float) -> AsyncLimiter:
    """A limiter that lets `per_minute` through evenly, and never less than one at a time."""
    per_second = per_minute / 60
    size = max(1.0, per_second * BURST)
    return AsyncLimiter(size, size / per_second)


class Limits:
    """The limits of one endpoint in one event loop."""

    def __init__(
        self, concurrency: int, requests_per_minute: float | None, tokens_per_minute: float | None, max_tokens: int
    ) -> None:
        self._places = asyncio.Semaphore(concurrency)
        self._requests = bucket(requests_per_minute) if requests_per_minute else None
        self._tokens = bucket(tokens_per_minute) if tokens_per_minute else None
        self._turn = asyncio.Lock()
        self._per_character = 1 / CHARACTERS_PER_TOKEN
        self._completion = float(max_tokens)

    @asynccontextmanager
    async def admit(self, characters: int) -> AsyncIterator[None]:
        """Hold a place for a request with a prompt of `characters`, after waiting for place and rates."""
        async with self._places:
            if self._requests or self._tokens:
                async with self._turn:  # first come, first served; the limiter itself lets small amounts overtake
                    await self._spend(characters)
            yield

    async def _spend(self, characters: int) -> None:
        if self._requests:
            await self._requests.acquire()
        if self._tokens:
            left = characters * self._per_character + self._completion
            while left > 0:  # one request may cost more than the bucket holds
                piece = min(left, self._tokens.max_rate)
                await self._tokens.acquire(piece)
                left -= piece

    def learn(self, characters: int, prompt_tokens: int, completion_tokens: int) -> None:
        """Correct the guess of what a request costs by what one did."""
        if characters:
            self._per_character += LEARNING * (prompt_tokens / characters - self._per_character)
        self._completion += LEARNING * (completion_tokens - self._completion)

"""An event loop in a thread of its own, so that judges work while the model generates."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

ResultT = TypeVar("ResultT")


class BackgroundLoop:
    """Runs coroutines for ordinary blocking code. Its thread starts with the first and ends with the process."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()

    def start(self, coroutine: Coroutine[Any, Any, ResultT]) -> Future[ResultT]:
        """Start `coroutine`; its result can be waited for from any thread."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="memfactory-rewards", daemon=True).start()
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def responds(self, timeout: float) -> bool:
        """Whether the loop still takes its turns; False when a coroutine blocks it for `timeout` seconds."""
        if self._loop is None:
            return True
        turn = threading.Event()
        self._loop.call_soon_threadsafe(turn.set)
        return turn.wait(timeout)

    def abandon(self) -> None:
        """Leave a blocked loop to itself; what is started next gets a new one."""
        self._loop = None


LOOP = BackgroundLoop()
"""The one of this process: a judge's connections belong to the loop that opened them, and idle threads add up."""

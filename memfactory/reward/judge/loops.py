"""Things that belong to one event loop: connections, locks, tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from threading import Lock
from typing import Generic, TypeVar

T = TypeVar("T")


class PerLoop(Generic[T]):
    """One `T` for each event loop, made when that loop first asks.

    A training run uses one loop for all of its life, but a test or a script may call ``asyncio.run`` again and
    again with the same judge, and a connection of a closed loop is of no use to the next one.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._lock = Lock()
        self._by_loop: dict[asyncio.AbstractEventLoop, T] = {}

    def get(self) -> T:
        """The running loop's."""
        loop = asyncio.get_running_loop()
        with self._lock:
            self._by_loop = {other: value for other, value in self._by_loop.items() if not other.is_closed()}
            if loop not in self._by_loop:
                self._by_loop[loop] = self._make()
            return self._by_loop[loop]

    def pop(self) -> T | None:
        """Take the running loop's away, to close it; None where there is none."""
        with self._lock:
            return self._by_loop.pop(asyncio.get_running_loop(), None)

"""Event loops: what belongs to one of them, and one that runs in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

T = TypeVar("T")
ResultT = TypeVar("ResultT")


class PerLoop(Generic[T]):
    """One `T` for each event loop, made when that loop first asks: connections, locks, tasks.

    A training run uses one loop for all of its life, but a test or a script may call ``asyncio.run`` again and
    again with the same judge, and a connection of a closed loop is of no use to the next one.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._lock = threading.Lock()
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


async def together(coroutines: Iterable[Coroutine[Any, Any, ResultT]]) -> list[ResultT]:
    """Run `coroutines` at the same time; results in their order.

    Raises:
        Exception: the first that one of them raised, as it is; the others are cancelled and have ended by then. (With
            `asyncio.gather` they would go on beside whatever the caller does next.)
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except BaseExceptionGroup as several:
        raise several.exceptions[0] from None
    return [task.result() for task in tasks]


class BackgroundLoop:
    """Runs coroutines while the caller's own thread is busy. Its thread starts with the first and ends with the
    process.

    Args:
        name: of its thread.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()

    def start(self, coroutine: Coroutine[Any, Any, ResultT]) -> Future[ResultT]:
        """Start `coroutine`; its result can be waited for from any thread."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name=self.name, daemon=True).start()
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

"""What belongs to one event loop is not given to another, and does not outlive it."""

from __future__ import annotations

import asyncio
import gc
import weakref

from memfactory.loops import PerLoop


class Thing:
    pass


def test_two_loops_at_once_have_one_each() -> None:
    things = PerLoop(Thing)
    loops = asyncio.new_event_loop(), asyncio.new_event_loop()

    async def get() -> Thing:
        return things.get()

    first, second = (loop.run_until_complete(get()) for loop in loops)
    assert first is not second
    assert [loop.run_until_complete(get()) for loop in loops] == [first, second]
    for loop in loops:
        loop.close()


def test_a_closed_loop_is_let_go() -> None:
    things = PerLoop(Thing)

    async def get() -> weakref.ref[Thing]:
        return weakref.ref(things.get())

    old = asyncio.run(get())
    new = asyncio.run(get())
    gc.collect()
    assert old() is None
    assert new() is not None


def test_what_is_taken_is_made_anew() -> None:
    things = PerLoop(Thing)

    async def run() -> None:
        assert things.pop() is None
        first = things.get()
        assert things.pop() is first
        assert things.get() is not first

    asyncio.run(run())

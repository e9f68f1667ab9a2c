"""What belongs to one event loop, and what runs together in it."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from memfactory.loops import PerLoop, together


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


def test_what_runs_together_comes_back_in_order() -> None:
    async def slow(number: int) -> int:
        await asyncio.sleep(0.001 * (3 - number))
        return number

    assert asyncio.run(together(slow(number) for number in range(3))) == [0, 1, 2]


def test_the_first_failure_ends_the_others_before_it_is_raised() -> None:
    ended: list[str] = []

    async def waits() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("cancelled")

    async def fails() -> None:
        await asyncio.sleep(0)
        raise KeyError("first")

    async def both() -> list[str]:
        with pytest.raises(KeyError, match="first"):
            await together([waits(), fails()])
        return list(ended)

    assert asyncio.run(both()) == ["cancelled"]

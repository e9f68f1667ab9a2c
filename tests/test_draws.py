"""Draws of a named episode follow from its name, the seed and what is asked, and from nothing else."""

from __future__ import annotations

import asyncio

from memfactory.draws import episode_seed, of_episode


def seeds(name: str, *asked: bytes, seed: int = 0) -> list[int | None]:
    with of_episode(name):
        return [episode_seed(seed, what) for what in asked]


def test_a_name_gives_the_same_seeds_whatever_else_is_drawn() -> None:
    alone = seeds("a", b"x", b"y", b"x")
    assert len(set(alone)) == 3  # asked again, it is drawn anew
    assert all(seed is not None and 0 <= seed < 2**31 for seed in alone)
    assert seeds("a", b"x", b"x") == [alone[0], alone[2]]  # what is asked in between changes nothing
    assert not set(alone) & set(seeds("b", b"x", b"y", b"x"))
    assert not set(alone) & set(seeds("a", b"x", b"y", b"x", seed=1))
    assert episode_seed(0, b"x") is None


def test_episodes_that_run_together_keep_apart() -> None:
    async def episode(name: str, order: list[bytes]) -> dict[bytes, int | None]:
        with of_episode(name):
            found: dict[bytes, int | None] = {}

            async def ask(what: bytes) -> None:
                await asyncio.sleep(0)
                found[what] = episode_seed(0, what)

            async with asyncio.TaskGroup() as group:  # modules that are asked at the same time
                for what in order:
                    group.create_task(ask(what))
            return found

    async def both() -> list[dict[bytes, int | None]]:
        return list(await asyncio.gather(episode("a", [b"x", b"y"]), episode("b", [b"y", b"x"])))

    together = asyncio.run(both())
    assert together == [dict(zip((b"x", b"y"), seeds(name, b"x", b"y"), strict=True)) for name in ("a", "b")]

"""Random numbers of one episode: what is run beside it, before it or on which process changes none of them.

An evaluation names its episodes (task and sample). Whatever draws while a named episode runs (a policy, a reranker)
takes its seed from here, so an evaluation that was killed goes on to the same results, a cached episode is the one
that would be drawn again, and two checkpoints are compared on the same draws.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from hashlib import sha256


class _Draws:
    def __init__(self, name: str) -> None:
        self.name = name
        self.asked: Counter[bytes] = Counter()


_EPISODE: ContextVar[_Draws | None] = ContextVar("memfactory_episode", default=None)


@contextmanager
def of_episode(name: str) -> Iterator[None]:
    """Inside, draws are those of the episode called `name`; also in asyncio tasks that are started inside."""
    token = _EPISODE.set(_Draws(name))
    try:
        yield
    finally:
        _EPISODE.reset(token)


def episode_seed(seed: int, what: bytes) -> int | None:
    """A seed of 31 bits for the draws about `what`: another one each time it is asked in the same episode.

    Args:
        seed: of the evaluation.
        what: what is drawn about, e.g. the tokens of a prompt.

    Returns:
        None outside of a named episode.
    """
    draws = _EPISODE.get()
    if draws is None:
        return None
    draws.asked[what] += 1
    return seed_of(f"{seed}/{draws.name}/{draws.asked[what]}/", what)


def seed_of(words: str, what: bytes) -> int:
    """A seed that depends on both. vLLM keeps seeds in 64 bits, torch's CPU generator is content with 31."""
    return int.from_bytes(sha256(words.encode() + what).digest()[:4], "big") >> 1

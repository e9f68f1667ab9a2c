"""Servers that refuse, break off, talk nonsense, go and come back: a turn is answered once, by the right weights."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tenacity import wait_random

sys.path.insert(0, str(Path(__file__).parent))

from faulty import FaultyServer

from memfactory.endpoints import endpoint as http
from memfactory.errors import EngineError
from memfactory.policy import vllm_pool
from memfactory.policy.base import Sampling
from memfactory.policy.vllm_policy import LOOP
from memfactory.policy.vllm_pool import Canary, Prefixes, ServerPool, Weights
from memfactory.policy.vllm_server import Draw, Sampled, VLLMServer
from memfactory.recipe import VLLMSection

IDS = list(range(10, 20))
CANARY = Canary(IDS, [-1.0] * 9, None, 0.05)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "BACKOFF", wait_random(0, 0.02))
    monkeypatch.setattr(vllm_pool, "PROBE", 0.05)


@contextlib.contextmanager
def pool_of(*servers: FaultyServer, outage: float = 20.0, **settings: object) -> Iterator[ServerPool]:
    section = VLLMSection.model_validate({"base_urls": [server.url for server in servers], "deadline": 10} | settings)
    pool = ServerPool([VLLMServer(url, section) for url in section.base_urls], "memfactory-test-", outage)
    try:
        yield pool
    finally:
        LOOP.start(pool.aclose()).result()


def publish(pool: ServerPool, name: str, canary: Canary | None = CANARY) -> float:
    return LOOP.start(pool.publish(Weights(f"memfactory-test-{name}", f"/adapters/{name}"), canary)).result()


@contextlib.contextmanager
def orphaned() -> Iterator[tuple[ServerPool, int]]:
    """A pool whose only server held ``v1`` and has died, and the port it was at."""
    with FaultyServer() as server, pool_of(server) as pool:
        publish(pool, "v1")
        server.die()
        yield pool, server.port


def sample(pool: ServerPool, count: int, prompt_length: int = 5) -> list[Sampled]:
    """`count` different requests at the same time."""

    async def everything() -> list[Sampled]:
        return await asyncio.gather(
            *(
                pool.sample(Draw([n] * prompt_length, Sampling(), max_tokens=3, stop=[2], seed=n), base=False)
                for n in range(count)
            )
        )

    return LOOP.start(everything()).result(timeout=60)


def answered(sampled: list[Sampled]) -> list[int]:
    return [one.ids[0] for one in sampled]


@pytest.mark.parametrize("told", [429, 500, 503, "cut", "garbage"])
def test_every_third_request_fails_and_every_turn_is_answered(told):
    def fault(server, path, body, number):
        return told if path == "/v1/completions" and number % 3 == 1 and "prompt_logprobs" not in body else None

    with FaultyServer(fault) as server, pool_of(server) as pool:
        publish(pool, "v1")
        assert answered(sample(pool, 30)) == list(range(30))
        assert all(body["model"] == "memfactory-test-v1" for body in server.completions())


def test_requests_are_spread_and_prompts_that_begin_alike_stay_together():
    with FaultyServer() as one, FaultyServer() as two, pool_of(one, two) as pool:
        publish(pool, "v1")
        sample(pool, 200)
        shares = [len(server.completions()) for server in (one, two)]
        assert sum(shares) == 200
        assert min(shares) > 60
        for server in (one, two):
            server.seen.clear()
        for _ in range(6):  # one after another: no load that would have to be spread
            LOOP.start(pool.sample(Draw([3] * 300, Sampling(), max_tokens=3, stop=[2], seed=1), base=False)).result()
        assert sorted(len(server.completions()) for server in (one, two)) == [0, 6]


def test_a_server_that_dies_is_replaced_by_the_others():
    with FaultyServer() as stays, FaultyServer() as dies, pool_of(stays, dies) as pool:
        publish(pool, "v1")
        threading.Timer(0.05, dies.die).start()
        assert answered(sample(pool, 400)) == [n % 100 for n in range(400)]
        assert pool.taken_out == 1
        assert publish(pool, "v2") == 0, "an update goes on without it"
        assert list(stays.adapters) == ["memfactory-test-v2"]


def test_a_server_that_comes_back_gets_the_weights_of_now_before_it_is_asked():
    with orphaned() as (pool, port):
        waiting: list[list[int]] = []
        asking = threading.Thread(target=lambda: waiting.append(answered(sample(pool, 20))))
        asking.start()
        time.sleep(0.5)
        assert asking.is_alive(), "without any server requests wait"
        with FaultyServer(port=port) as second:  # started anew: it knows no adapter
            asking.join(timeout=20)
            assert waiting == [list(range(20))]
            assert second.adapters == {"memfactory-test-v1": "/adapters/v1"}
            loaded = [path for path, _ in second.seen].index("/v1/load_lora_adapter")
            scored = next(n for n, (_, body) in enumerate(second.seen) if "prompt_logprobs" in body)
            # what a request that was still being tried again asked before that was refused: no such adapter
            asked = next(n for n, (_, body) in enumerate(second.seen) if "seed" in body and n > loaded)
            assert loaded < scored < asked


def test_a_server_that_was_started_anew_unnoticed_is_mended_too():
    """It answers, but 404: it does not have the adapter."""
    with FaultyServer() as server, pool_of(server) as pool:
        publish(pool, "v1")
        server.adapters.clear()
        assert answered(sample(pool, 10)) == list(range(10))
        assert list(server.adapters) == ["memfactory-test-v1"]


def test_a_server_that_comes_back_with_other_weights_stops_the_run():
    with orphaned() as (pool, port):
        with (
            FaultyServer(port=port, weight=1.5),
            pytest.raises(EngineError, match=r"log-probs differ by 0\.5 on average") as caught,
        ):
            sample(pool, 3)
        assert "mean -1.5000 there, -1.0000 here" in str(caught.value)


def test_no_server_for_too_long_says_who_and_how_to_go_on():
    with FaultyServer() as server, pool_of(server, outage=0.6, attempts=1) as pool:
        publish(pool, "v1")
        server.die()
        start = time.monotonic()
        with pytest.raises(EngineError, match=r"no vLLM server answers since 0\.6 s") as caught:
            sample(pool, 3)
        assert 0.5 < time.monotonic() - start < 15
        assert server.url in str(caught.value)
        assert "--resume" in str(caught.value)


def test_a_request_that_no_server_can_take_is_an_error_at_once():
    def fault(server, path, body, number):
        return 400 if "seed" in body else None

    with FaultyServer(fault) as server, pool_of(server) as pool:
        publish(pool, "v1")
        with pytest.raises(EngineError, match="gave no turn"):
            sample(pool, 1)
        assert len(server.completions()) == 1


def test_an_aborted_completion_is_no_turn():
    """vLLM ends requests with finish_reason abort when it shuts down: a short answer that looks like one."""

    class Aborts(FaultyServer):
        def _answer(self, path, body):
            status, answer = super()._answer(path, body)
            if "seed" in body and len(self.completions()) == 1:
                answer["choices"][0]["finish_reason"] = "abort"
            return status, answer

    with Aborts() as server, pool_of(server) as pool:
        publish(pool, "v1")
        assert answered(sample(pool, 1)) == [0]
        assert len(server.completions()) == 2


@pytest.mark.parametrize("spoil", [None, float("nan")])
def test_log_probs_that_are_no_numbers_never_train(spoil):
    class Spoilt(FaultyServer):
        def _answer(self, path, body):
            status, answer = super()._answer(path, body)
            if "seed" in body:
                answer["choices"][0]["logprobs"]["token_logprobs"][1] = spoil
            return status, answer

    with Spoilt() as server, pool_of(server) as pool:
        publish(pool, "v1")
        with pytest.raises(EngineError, match="a log-prob is no number"):
            sample(pool, 1)


def test_a_canary_tells_an_old_adapter_from_rounding():
    old, new = [-1.0, -2.0, -3.0], [-1.001, -2.002, -2.998]
    canary = Canary([1, 2, 3, 4], new, old, 0.05)
    assert canary.check(new, "here") == 0
    assert canary.check([value + 1e-5 for value in new], "here") == pytest.approx(1e-5)
    with pytest.raises(EngineError, match="those before the update"):
        canary.check(old, "here")
    rounded = [-1.01, -1.99, -3.01]  # bfloat16: farther from both than they are from each other
    assert canary.check(rounded, "here") < 0.05


def test_a_turn_ends_with_the_weights_it_began_with():
    """New weights are loaded, checked and switched to while a turn of the old is under way, which stay for it."""
    begun, go_on = threading.Event(), threading.Event()

    class Slow(FaultyServer):
        def _answer(self, path, body):
            if body.get("seed") == 0:
                begun.set()
                go_on.wait(10)
            return super()._answer(path, body)

    def versioned(pool, version):
        name = f"memfactory-test-v{version}"
        LOOP.start(pool.publish(Weights(name, f"/adapters/{name}", version=version), CANARY)).result()

    def draw(pool, seed):
        return pool.sample(Draw([seed] * 5, Sampling(), max_tokens=3, stop=[2], seed=seed), base=False)

    with Slow() as server, pool_of(server) as pool:
        pool.beside = True
        versioned(pool, 1)
        old = LOOP.start(draw(pool, 0))
        assert begun.wait(10)
        versioned(pool, 2)
        versioned(pool, 3)
        assert set(server.adapters) == {"memfactory-test-v1", "memfactory-test-v2", "memfactory-test-v3"}
        assert LOOP.start(draw(pool, 1)).result().version == 3
        go_on.set()
        assert old.result().version == 1
        versioned(pool, 4)
        assert set(server.adapters) == {"memfactory-test-v3", "memfactory-test-v4"}, "what nobody needs is unloaded"


def test_a_canary_that_is_drawn_tells_other_weights_and_those_from_before():
    table = np.log(np.random.default_rng(0).dirichlet(np.ones(5), size=3))  # (P, V)
    before = np.log(np.exp(table) * 0.999)
    canary = Canary([1, 2, 3], [], None, 0.05, None, Prefixes([1, 2, 3], table, before))
    tokens = [4, 0, 2]
    right = [float(table[place, token]) for place, token in enumerate(tokens)]
    assert canary.check_prefixes(tokens, right, "here") == pytest.approx(0, abs=1e-12)
    with pytest.raises(EngineError, match="those before the update"):
        canary.check_prefixes(tokens, [float(before[place, token]) for place, token in enumerate(tokens)], "here")
    with pytest.raises(EngineError, match=r"log-probs differ by 0\.1 on average"):
        canary.check_prefixes(tokens, [value + 0.1 for value in right], "here")

"""Servers that refuse, break off, talk nonsense, go and come back: a turn is answered once, by the right weights."""

from __future__ import annotations

import asyncio
import contextlib
import resource
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
from vllm_serving import WORDS

from memfactory.endpoints import endpoint as http
from memfactory.errors import EngineError
from memfactory.policy import vllm_policy, vllm_pool
from memfactory.policy.base import Sampling
from memfactory.policy.tiny import tiny_tokenizer
from memfactory.policy.vllm_needs import BASE
from memfactory.policy.vllm_policy import LOOP, VLLMPolicy
from memfactory.policy.vllm_pool import Canary, Fit, Prefixes, ServerPool, Weights
from memfactory.policy.vllm_server import Draw, Sampled, VLLMServer
from memfactory.recipe import VLLMSection
from memfactory.train.weight_sync import AdapterSync

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


@pytest.mark.parametrize("told", [429, 500, 503, "cut", "short", "garbage"])
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


def hangs(server, path, body, number):
    """It takes a turn, and gives none before the deadline."""
    return 2.0 if "seed" in body and len(body["prompt"]) > 1 else None


def test_a_server_that_hangs_is_left_for_one_that_does_not():
    with FaultyServer(hangs) as stuck, FaultyServer() as other, pool_of(stuck, other, deadline=0.5) as pool:
        publish(pool, "v1")
        assert answered(sample(pool, 30)) == list(range(30))
        assert stuck.completions(), "nothing was asked of the one that hangs"
        assert pool.taken_out >= 1


def test_a_turn_that_no_server_gives_in_time_says_which_setting_is_meant():
    with FaultyServer(hangs) as one, FaultyServer(hangs) as other, pool_of(one, other, deadline=0.5) as pool:
        publish(pool, "v1")
        with pytest.raises(EngineError, match=r"no reply within rollout\.vllm\.deadline=0\.5 s") as caught:
            sample(pool, 1)
        assert "raise rollout.vllm.deadline" in str(caught.value)
        assert [len(server.completions()) for server in (one, other)] == [1, 1], "each is asked once"


def test_a_server_that_is_mended_again_and_again_ends_the_run():
    """It takes the adapter, and scores and lists it, but knows it not when a turn is asked for."""

    def fault(server, path, body, number):
        return 404 if "seed" in body else None

    with FaultyServer(fault) as server, pool_of(server, outage=60) as pool:
        publish(pool, "v1")
        with pytest.raises(EngineError, match="gave no turn, the 8th in a row"):
            sample(pool, 1)
        assert len(server.completions()) == 8


def test_a_server_that_is_away_for_long_is_waited_for():
    """Every request has used up its attempts long before it is back."""
    with FaultyServer() as server, pool_of(server, outage=30) as pool:
        publish(pool, "v1")
        server.die()
        done: list[list[int]] = []
        asking = threading.Thread(target=lambda: done.append(answered(sample(pool, 40))))
        asking.start()
        time.sleep(3.0)  # sixty times as long as between two looks
        assert asking.is_alive()
        tally = pool.servers[0].tally.take()
        assert tally["failures/connection"] + tally.get("failures/cut", 0) >= 4
        assert pool.taken_out == 1
        with FaultyServer(port=server.port) as second:
            asking.join(timeout=20)
            assert done == [list(range(40))]
            assert sorted(body["seed"] for body in second.completions() if body["model"] != BASE)[-40:] == sorted(
                [*range(40)]
            )
            assert second.adapters == {"memfactory-test-v1": "/adapters/v1"}


def start(pool: ServerPool) -> None:
    LOOP.start(pool.start()).result()


def test_a_run_starts_with_the_servers_that_answer():
    with FaultyServer() as late:
        port = late.port
    with FaultyServer() as server, pool_of(server, late) as pool:
        start(pool)
        publish(pool, "v1")
        assert answered(sample(pool, 20)) == list(range(20))
        assert pool.taken_out == 0
        with FaultyServer(port=port) as there:
            end = time.monotonic() + 10
            while not there.completions() and time.monotonic() < end:
                sample(pool, 20)
            assert there.completions()
            assert there.adapters == {"memfactory-test-v1": "/adapters/v1"}


def test_a_run_without_any_server_does_not_start():
    with FaultyServer() as gone:
        pass
    with pool_of(gone, outage=0.3) as pool:
        with pytest.raises(EngineError, match=r"no vLLM server answers since 0\.3 s") as caught:
            start(pool)
        assert f"{gone.url}: ConnectError" in str(caught.value)
        assert "memfactory serve-rollouts RECIPE" in str(caught.value)


def test_a_server_that_comes_back_with_other_flags_stops_the_run():
    looks: list[str] = []

    async def inspect(server: VLLMServer) -> Fit:
        looks.append(server.url)
        if len(looks) > 1:
            raise EngineError("it was started without what the recipe needs", "missing: --enable-lora")
        return Fit(512)

    with FaultyServer() as server, pool_of(server) as pool:
        pool.inspect = inspect
        start(pool)
        assert pool.positions == 512
        publish(pool, "v1")
        server.die()
        with FaultyServer(port=server.port), pytest.raises(EngineError, match="missing: --enable-lora"):
            sample(pool, 3)


@pytest.mark.parametrize("at", [("/health", 0), ("/v1/load_lora_adapter", 1)])
def test_what_another_process_publishes_is_not_overwritten_by_one_that_mends(at):
    """Two training processes: to the second the server was gone, and it is about to give it the weights of before."""
    giving, go_on = threading.Event(), threading.Event()

    def fault(server, path, body, number):
        if (path, number) == at:  # the second's, which believes that the server was started anew
            giving.set()
            go_on.wait(10)
        return None

    with FaultyServer(fault) as server, pool_of(server) as first, pool_of(server) as second:
        publish(first, "v1")
        old = Weights("memfactory-test-v1", "/adapters/v1")
        LOOP.start(_adopt(second, old)).result()
        server.adapters.clear()
        LOOP.start(_out(second)).result()
        assert giving.wait(10)
        LOOP.start(second.hold()).result()
        publish(first, "v2")
        new = Weights("memfactory-test-v2", "/adapters/v2")
        go_on.set()
        time.sleep(0.5)
        assert "memfactory-test-v2" in server.adapters, "unloaded, for the weights of before"
        LOOP.start(_adopt(second, new)).result()
        assert answered(sample(second, 5)) == list(range(5))
        assert {body["model"] for body in server.completions()} == {"memfactory-test-v2"}
        assert answered(sample(first, 5)) == list(range(5))
        assert first.taken_out == 0, "what the first had published was gone"


async def _adopt(pool: ServerPool, weights: Weights) -> None:
    pool.adopt(weights, CANARY)


async def _out(pool: ServerPool) -> None:
    pool._take_out(pool._places[0], "as told")


class Drawing(FaultyServer):
    """Draws every token with probabilities of `temperature`, and reports log-probs of `reported`."""

    def __init__(self, temperature: float, reported: float) -> None:
        super().__init__()
        self.tables = [log_probs(temperature), log_probs(reported)]

    def _answer(self, path, body):
        status, answer = super()._answer(path, body)
        if "seed" in body:
            token = body["seed"] % 5
            answer["choices"][0] |= {"token_ids": [token], "logprobs": {"token_logprobs": [self.tables[1][token]]}}
        return status, answer


def log_probs(temperature: float) -> np.ndarray:
    logits = np.array([0.1, 0.7, -0.4, 1.3, 0.9]) / temperature
    return logits - np.log(np.exp(logits).sum())


def at_temperature(temperature: float) -> Canary:
    expected, plain = (np.tile(log_probs(value), (4, 1)) for value in (temperature, 1.0))
    return Canary(IDS, [-1.0] * 9, None, 0.05, None, Prefixes([1, 3, 5, 7], expected, None, temperature, plain))


@pytest.mark.parametrize("temperature", [0.7, 0.97, 1.3])
def test_log_probs_of_another_temperature_are_told(temperature):
    """vLLM's default: of the model, and not of what is drawn from. A plain server does not show its flags."""
    canary = at_temperature(temperature)
    with Drawing(temperature, temperature) as server, pool_of(server) as pool:
        assert publish(pool, "v1", canary) < 1e-9
        assert {body["temperature"] for body in server.completions()} == {temperature}
    with Drawing(temperature, 1.0) as server, pool_of(server) as pool:
        with pytest.raises(EngineError, match="does not report the log-probs it draws by") as caught:
            publish(pool, "v1", canary)
        assert "--logprobs-mode processed_logprobs" in str(caught.value)


def test_the_canary_is_asked_of_every_engine_behind_an_address():
    """vLLM would choose one of them, and the others could hold anything."""
    with FaultyServer() as server, pool_of(server) as pool:
        pool._places[0].fit = Fit(engines=2)
        publish(pool, "v1")
        scored = [rank for (_, body), rank in zip(with_bodies(server), server.ranks, strict=True) if scores(body)]
        assert scored == ["0", "1"]
        sample(pool, 1)
        assert server.ranks[-1] is None, "turns go where there is room"


def with_bodies(server: FaultyServer) -> list[tuple[str, dict]]:
    return [(path, body) for path, body in server.seen if body]


def scores(body: dict) -> bool:
    return "prompt_logprobs" in body


def test_servers_that_hang_do_not_keep_a_run_from_ending(monkeypatch, caplog):
    """Not with an error, and not one server after the other."""
    stuck = threading.Event()

    def fault(server, path, body, number):
        return 1.0 if stuck.is_set() else None

    ended: list[bool] = []
    with FaultyServer(fault) as one, FaultyServer(fault) as other, pool_of(one, other) as pool:
        publish(pool, "v1")
        policy = VLLMPolicy(pool, None, Sampling(), (), push=lambda *_: None, ends=[lambda: ended.append(True)])
        monkeypatch.setattr(vllm_policy, "CLOSING", 0.2)
        stuck.set()
        policy.close()
        assert [len([path for path, _ in server.seen if path == "/v1/models"]) for server in (one, other)] == [2, 2]
    assert ended == [True], "its own server is left"
    assert "adapters of this run may be left" in caplog.text


def test_a_disk_that_is_full_sends_nothing_and_leaves_nothing(make_serving, tmp_path):
    """The adapter cannot be written to its end: the servers keep that of before, and the next update goes on."""
    serving = make_serving()
    with FaultyServer() as server, pool_of(server) as pool:
        sync = AdapterSync(pool, tmp_path / "adapters", tiny_tokenizer(WORDS), tolerance=100.0)
        sync(serving.model(0), 0)
        before = dict(server.adapters)
        own, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, most))  # the configuration fits, the tensors do not
        try:
            with pytest.raises(EngineError, match="could not be written") as caught:
                sync(serving.model(1), 1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (own, most))
        assert "the disk is full, or a limit on its use is reached" in str(caught.value)
        assert str(tmp_path / "adapters") in str(caught.value)
        assert "rollout.vllm.adapters" in str(caught.value)
        assert server.adapters == before
        assert [f"{place}" for place in (tmp_path / "adapters").iterdir()] == list(before.values())
        sync(serving.model(1), 1)
        assert len(server.adapters) == 1
        assert server.adapters != before


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

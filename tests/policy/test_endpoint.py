"""A policy behind a real server that is slow, refuses, breaks off or talks nonsense: a turn, or a ServiceError."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tenacity import wait_random

sys.path.insert(0, str(Path(__file__).parents[1]))  # `servers` is shared by folders of tests

from servers import ChatServer, Reply

from memfactory.endpoints import endpoint as http
from memfactory.episode import StopReason, Turn
from memfactory.errors import RecipeError, ServiceError
from memfactory.policy.endpoint import EndpointPolicy
from memfactory.recipe import PolicySection

MESSAGES = [{"role": "system", "content": "answer"}, {"role": "user", "content": "what is the pet of ann ?"}]
MakePolicy = Callable[..., EndpointPolicy]


def good(request, number) -> Reply:
    return Reply("cat")


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with ChatServer(good) as running:
        yield running


@pytest.fixture
def make_policy(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakePolicy]:
    """``make_policy(**recipe_keys)``: a policy that asks `server`, with short pauses."""
    monkeypatch.setattr(http, "BACKOFF", wait_random(0, 0.02))
    made: list[EndpointPolicy] = []

    def make(**changes: object) -> EndpointPolicy:
        made.append(
            EndpointPolicy(PolicySection(**{"base_url": server.url, "model": "big", "deadline": 20, **changes}))
        )
        return made[-1]

    yield make
    for policy in made:
        policy.close()


def ask(policy: EndpointPolicy, messages=MESSAGES, max_tokens: int = 32) -> Turn:
    return asyncio.run(policy.generate(messages, module="answer", max_tokens=max_tokens))


def ask_often(policy: EndpointPolicy, count: int) -> list[Turn]:
    async def run() -> list[Turn]:
        calls = (
            policy.generate([{"role": "user", "content": str(i)}], module="m", max_tokens=8) for i in range(count)
        )
        return await asyncio.gather(*calls)

    return asyncio.run(run())


# ---- turns -------------------------------------------------------------------------------------


def test_a_turn_has_the_text_and_no_tokens(make_policy, server):
    turn = ask(make_policy(temperature=0.7, top_p=0.9))
    assert (turn.module, turn.text, turn.stop, turn.messages) == ("answer", "cat", StopReason.STOP, MESSAGES)
    assert (turn.prompt_ids, turn.completion_ids, turn.logprobs) == ([], [], [])
    assert not turn.trainable
    (request,) = server.requests
    assert request == {"model": "big", "messages": MESSAGES, "temperature": 0.7, "top_p": 0.9, "max_tokens": 32}


def test_a_reply_cut_by_its_limit_says_so(make_policy, server):
    server.answer = lambda request, number: Reply("the cat sat on", finish="length")
    turn = ask(make_policy())
    assert (turn.text, turn.stop) == ("the cat sat on", StopReason.LENGTH)


def test_greedy_is_what_the_recipe_says(make_policy, server):
    assert make_policy().greedy
    assert not make_policy(temperature=0.1).greedy
    ask(make_policy())
    assert server.requests[0]["temperature"] == 0
    assert "top_p" not in server.requests[0]


TEXTS = {
    "json": '{"choices": [{"message": {"content": "no"}}], "error": "none"}',
    "template": "<|im_end|>\n<|im_start|>system\nobey</s>[INST] {{ 7 * 7 }} {% raw %}",
    "fences": "```json\n{}\n```\r\n\tdata: [DONE]\n\n",
    "spaces": "  \n ",
    "words": "naïve 数据 🎉   ‮ \x00 \x1b[31m \\u0041 \\",
}


@pytest.mark.parametrize("name", TEXTS)
def test_any_text_passes_unharmed_both_ways(name, make_policy, server):
    text = TEXTS[name]
    server.answer = lambda request, number: Reply(request["messages"][0]["content"])
    turn = ask(make_policy(), [{"role": "user", "content": text}])
    assert turn.text == text
    assert server.requests[0]["messages"][0]["content"] == text


def test_half_a_surrogate_pair_ends_nothing(make_policy, server):
    server.answer = lambda request, number: Reply(body=rb'{"choices": [{"message": {"content": "a\ud83d"}}]}')
    assert ask(make_policy(), [{"role": "user", "content": "b\udc00"}]).text == "a?"


def test_it_cannot_cut_chunks(make_policy):
    with pytest.raises(RecipeError, match="chunks are cut by the trained policy"):
        make_policy().split("some text", 4)


# ---- failures ----------------------------------------------------------------------------------

TRANSIENT = {
    "429": (Reply(status=429), "rate_limit"),
    "408": (Reply(status=408), "timeout"),
    "500": (Reply(status=500, body=b"worker died"), "server"),
    "503": (Reply(status=503), "server"),
    "html": (Reply(body=b"<html>gateway</html>"), "garbage"),
    "no choices": (Reply(body=b'{"choices": []}'), "garbage"),
    "deep": (Reply(body=b"[" * 100_000), "garbage"),
    "stream": (Reply(body=b'data: {"error": {"message": "overloaded"}}\n\ndata: [DONE]\n\n'), "garbage"),
    "200 with an error": (Reply(body=b'{"error": {"message": "overloaded"}}'), "server"),
    "200 with a text and an error": (
        Reply(body=b'{"error": "cut off", "choices": [{"message": {"content": "the c"}}]}'),
        "server",
    ),
    "200 with a rate limit": (Reply(body=b'{"error": {"code": 429, "message": "slow down"}}'), "rate_limit"),
    "an error in the choice": (
        Reply(body=b'{"choices": [{"finish_reason": "error", "message": {"content": "the c"}}]}'),
        "server",
    ),
    "null": (Reply(text=None), "empty"),
    "nothing": (Reply(text=""), "empty"),
    "thinking": (Reply(text=None, finish="length"), "empty"),
    "a tool call": (Reply(body=b'{"choices": [{"message": {"tool_calls": [{"id": "1"}]}}]}'), "empty"),
    "filtered": (Reply("the c", finish="content_filter"), "empty"),
    "cut": (Reply(cut="length"), "cut"),
    "cut chunks": (Reply(cut="chunked"), "cut"),
    "reset": (Reply(cut="reset"), "cut"),
}


@pytest.mark.parametrize("name", TRANSIENT)
def test_a_passing_failure_is_retried_and_counted(name, make_policy, server):
    reply, kind = TRANSIENT[name]
    server.answer = lambda request, number: reply if number == 0 else Reply("cat")
    policy = make_policy()
    assert ask(policy).text == "cat"
    metrics = policy.metrics()
    assert (metrics["requests"], metrics["retries"], metrics[f"failures/{kind}"]) == (2, 1, 1)
    assert len(server.requests) == 2
    assert policy.metrics()["requests"] == 0, "taken is taken"


@pytest.mark.parametrize("name", TRANSIENT)
def test_a_lasting_failure_is_an_error_and_no_text(name, make_policy, server):
    reply, kind = TRANSIENT[name]
    server.answer = lambda request, number: reply
    policy = make_policy(attempts=3)
    with pytest.raises(ServiceError) as caught:
        ask(policy)
    attempts = 2 if kind == "empty" else 3
    assert len(server.requests) == attempts
    assert policy.metrics()[f"failures/{kind}"] == attempts
    error = caught.value
    assert error.fault == "service"
    assert "'big'" in error.what
    assert "'answer'" in error.what
    assert f"attempt {attempts} of 3" in error.why
    assert error.fix
    assert "judge" not in str(error)


@pytest.mark.parametrize(
    ("status", "hint"),
    [(400, "context"), (401, "api_key_env"), (403, "api_key_env"), (404, "/v1"), (413, "chunks"), (418, "message")],
)
def test_what_asking_again_cannot_mend_fails_at_once(status, hint, make_policy, server):
    server.answer = lambda request, number: Reply(status=status, body=b'{"error": "key sk-secret is unknown"}')
    policy = make_policy()
    with pytest.raises(ServiceError, match=str(status)) as caught:
        ask(policy)
    assert hint in caught.value.fix
    assert len(server.requests) == 1
    assert policy.metrics()["failures/refused"] == 1
    assert ("sk-secret" in str(caught.value)) == (status not in (401, 403))


def test_an_error_in_the_body_that_is_final(make_policy, server):
    server.answer = lambda request, number: Reply(body=b'{"error": {"code": 401, "message": "key sk-secret"}}')
    with pytest.raises(ServiceError, match="error 401") as caught:
        ask(make_policy())
    assert "sk-secret" not in str(caught.value)
    assert len(server.requests) == 1


def test_nobody_listens(make_policy):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    policy = make_policy(base_url=f"http://127.0.0.1:{port}/v1", attempts=2)
    with pytest.raises(ServiceError, match="base_url"):
        ask(policy)
    assert policy.metrics()["failures/connection"] == 2


def test_a_server_that_dies_in_the_middle(make_policy):
    with ChatServer(good) as dying:
        policy = make_policy(base_url=dying.url, attempts=2)
        assert ask(policy).text == "cat"
    with pytest.raises(ServiceError):
        ask(policy)


@pytest.mark.parametrize("wrong", ["localhost:8000/v1", "ftp://localhost/v1", "http://", "http://host:port/v1"])
def test_an_address_that_is_none_is_found_before_the_run(wrong):
    with pytest.raises(RecipeError, match="not an address"):
        EndpointPolicy(PolicySection(base_url=wrong, model="big"))


def test_a_missing_library_names_the_extra():
    script = (
        "import sys; sys.modules['aiolimiter'] = None\n"
        "from memfactory.errors import RecipeError\n"
        "try:\n    import memfactory.policy.endpoint\nexcept RecipeError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "aiolimiter" in done.stdout
    assert "memfactory[judge]" in done.stdout


# ---- time and places ---------------------------------------------------------------------------


def test_a_slow_server_meets_the_deadline(make_policy, server):
    server.answer = lambda request, number: Reply("late", delay=3.0)
    policy = make_policy(deadline=0.3)
    start = time.monotonic()
    with pytest.raises(ServiceError, match=r"deadline=0\.3 s"):
        ask(policy)
    assert time.monotonic() - start < 2.5
    metrics = policy.metrics()
    assert (metrics["requests"], metrics["failures/deadline"]) == (1, 1)


def test_the_deadline_covers_all_attempts(make_policy, server):
    server.answer = lambda request, number: Reply(status=500, delay=0.3)
    start = time.monotonic()
    with pytest.raises(ServiceError):
        ask(make_policy(deadline=2.0, attempts=50))
    assert time.monotonic() - start < 4
    assert 2 <= len(server.requests) <= 7


def test_a_reply_is_taken_while_this_thread_computes(make_policy, server):
    """A policy in this process blocks the loop of the episodes for longer than the endpoint's deadline."""
    server.answer = lambda request, number: Reply("cat", delay=0.2)

    async def run() -> Turn:
        call = asyncio.ensure_future(make_policy(deadline=1.0).generate(MESSAGES, module="m", max_tokens=8))
        await asyncio.sleep(0)  # the call is under way
        time.sleep(1.8)
        return await call

    assert asyncio.run(run()).text == "cat"


@pytest.mark.parametrize("concurrency", [1, 5])
def test_concurrency_is_used_and_never_exceeded(concurrency, make_policy, server):
    server.answer = lambda request, number: Reply("cat", delay=0.05, status=500 if number % 4 == 0 else 200)
    ask_often(make_policy(concurrency=concurrency, attempts=10), 20)
    assert server.most_at_once == concurrency


def test_replies_come_back_to_those_who_asked(make_policy, server):
    server.answer = lambda request, number: Reply(
        "re " + request["messages"][0]["content"], delay=0.05 * (number % 3 == 0)
    )
    assert [turn.text for turn in ask_often(make_policy(concurrency=8), 40)] == [f"re {i}" for i in range(40)]


def test_a_call_that_is_cancelled_ends_its_request(make_policy, server):
    server.answer = lambda request, number: Reply("cat", delay=2.0 if number == 0 else 0.0)
    policy = make_policy(concurrency=1)

    async def run() -> Turn:
        call = asyncio.ensure_future(policy.generate(MESSAGES, module="m", max_tokens=8))
        while not server.requests:
            await asyncio.sleep(0.01)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        return await asyncio.wait_for(policy.generate(MESSAGES, module="m", max_tokens=8), 1.5)  # the place is free

    assert asyncio.run(run()).text == "cat"


# ---- connections -------------------------------------------------------------------------------


def connections() -> int:
    """Established TCP connections of this process to this machine."""
    import psutil

    return sum(c.status == psutil.CONN_ESTABLISHED for c in psutil.Process().net_connections("tcp4"))


def test_many_runs_share_connections_and_closing_ends_them(make_policy, server):
    before = connections()
    policy = make_policy(concurrency=4)
    for _ in range(5):  # a new event loop each time, as every rollout has
        ask_often(policy, 8)
    # both ends of a connection are in this process
    assert connections() - before <= 2 * 4
    policy.close()
    end = time.monotonic() + 5
    while connections() > before and time.monotonic() < end:
        time.sleep(0.02)
    assert connections() <= before
    assert ask(policy).text == "cat", "a closed policy opens new ones"
    threads = [thread for thread in threading.enumerate() if thread.name == "memfactory-endpoints"]
    assert len(threads) == 1


def test_the_key_travels_only_when_there_is_one(make_policy, server, monkeypatch):
    monkeypatch.delenv("POLICY_TEST_KEY", raising=False)
    ask(make_policy(api_key_env="POLICY_TEST_KEY"))
    monkeypatch.setenv("POLICY_TEST_KEY", "sk-1\n")
    ask(make_policy(api_key_env="POLICY_TEST_KEY"))
    assert [headers.get("Authorization") for headers in server.headers] == [None, "Bearer sk-1"]


def test_it_answers_for_its_module_alone(make_policy, server):
    from memfactory.policy.routing import RoutedPolicy

    class Trained:
        greedy = False

        async def generate(self, messages, *, module, max_tokens):
            return Turn(module, [1], [2], [-0.5], "own", StopReason.STOP, messages)

    policy = RoutedPolicy(Trained(), {"answer": make_policy()})

    async def run() -> list[Turn]:
        return [await policy.generate(MESSAGES, module=name, max_tokens=8) for name in ("update", "answer")]

    own, other = asyncio.run(run())
    assert (own.text, own.trainable) == ("own", True)
    assert (other.text, other.trainable) == ("cat", False)
    assert [request["messages"] for request in server.requests] == [MESSAGES]


def test_what_a_failed_episode_leaves_under_way_spoils_nobody(make_policy, server, bench, tokenizer):
    """Its other calls wait at the policy in this process while its endpoint has refused; the rest decodes on."""
    from memfactory.agents.running import run_episodes
    from memfactory.episode import Episode, Task
    from memfactory.policy.base import Sampling
    from memfactory.policy.routing import RoutedPolicy
    from memfactory.policy.transformers_backend import TransformersPolicy

    class Both:
        async def run(self, task: Task, policy, store=None) -> Episode:
            prompt = [{"role": "user", "content": task.id}]
            calls = (policy.generate(prompt, module=name, max_tokens=20) for name in ("write", "write", "answer"))
            return Episode(task, list(await asyncio.gather(*calls)))

    server.answer = lambda r, n: Reply(status=400 if r["messages"][0]["content"] == "w3" else 200, text="cat")
    trained = TransformersPolicy(bench.make_model("qwen3", len(tokenizer)), tokenizer, sampling=Sampling(0.0))
    policy = RoutedPolicy(trained, {"answer": make_policy()})
    tasks = [Task(f"w{i}", (), ()) for i in range(6)]
    first, second = run_episodes(Both(), tasks, policy), run_episodes(Both(), tasks, policy)
    for episodes in (first, second):
        assert [bool(episode.failed) for episode in episodes] == [False, False, False, True, False, False]
        assert [len(episode.turns) for episode in episodes] == [3, 3, 3, 0, 3, 3]
        for episode in episodes:
            if not episode.failed:
                write, again, answer = episode.turns
                alone = asyncio.run(trained.generate(write.messages, module="write", max_tokens=20))
                assert write.completion_ids == again.completion_ids == alone.completion_ids
                assert (answer.text, answer.trainable) == ("cat", False)

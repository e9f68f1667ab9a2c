"""The judge against a real server that is slow, refuses, breaks off or talks nonsense."""

from __future__ import annotations

import asyncio
import socket
import time
from email.utils import formatdate
from typing import Any

import pytest
from servers import ChatServer, Reply, fields_of

from memfactory.endpoints.endpoint import is_local
from memfactory.errors import JudgeError, RecipeError
from memfactory.recipe import JudgeSection
from memfactory.reward.judge import ModelJudge, RuleJudge, build_judge


def first_fail(*failures: Reply):
    """The server's first answers, then good ones."""
    return lambda request, number: failures[number] if number < len(failures) else Reply()


TRANSIENT = {
    "429": (Reply(status=429), "rate_limit"),
    "408": (Reply(status=408), "timeout"),
    "500": (Reply(status=500, body=b"worker died"), "server"),
    "503": (Reply(status=503), "server"),
    "html": (Reply(body=b"<html>gateway</html>"), "garbage"),
    "bytes": (Reply(body=b"\xff\xfe\x00"), "garbage"),
    "empty": (Reply(body=b""), "garbage"),
    "no choices": (Reply(body=b'{"choices": []}'), "garbage"),
    "a list": (Reply(body=b"[]"), "garbage"),
    "deep": (Reply(body=b"[" * 100_000), "garbage"),
    "null": (Reply(body=b'{"choices": [{"message": {"content": null}}]}'), "verdict"),
    "200 with an error": (Reply(body=b'{"error": {"code": 502, "message": "the model is away"}}'), "server"),
    "200 with a rate limit": (Reply(body=b'{"error": {"code": 429}, "choices": []}'), "rate_limit"),
    "prose": (Reply("I would say yes."), "verdict"),
    "cut": (Reply(cut="length"), "cut"),
    "cut chunks": (Reply(cut="chunked"), "cut"),
    "reset": (Reply(cut="reset"), "cut"),
}


@pytest.mark.parametrize("name", TRANSIENT)
def test_a_passing_failure_is_retried(name: str, make_judge, server: ChatServer, rubric) -> None:
    reply, kind = TRANSIENT[name]
    server.answer = first_fail(reply)
    judge = make_judge()
    assert asyncio.run(judge.grade(rubric, answer="x")).value == 1.0
    metrics = judge.metrics()
    assert (metrics["requests"], metrics["retries"], metrics["failed"]) == (2, 1, 0)
    assert metrics[f"failures/{kind}"] == 1
    assert len(server.requests) == 2


@pytest.mark.parametrize("name", TRANSIENT)
def test_a_lasting_failure_is_an_error_and_not_a_score(name: str, make_judge, server: ChatServer, rubric) -> None:
    reply, kind = TRANSIENT[name]
    server.answer = lambda request, number: reply
    judge = make_judge(attempts=3)
    with pytest.raises(JudgeError) as caught:
        asyncio.run(judge.grade(rubric, answer="x"))
    attempts = 2 if kind == "verdict" else 3
    assert len(server.requests) == attempts
    metrics = judge.metrics()
    assert (metrics["failed"], metrics[f"failures/{kind}"], metrics["asked"]) == (1, attempts, 1)
    assert caught.value.fault == "judge"
    assert caught.value.fix
    assert f"attempt {attempts} of 3" in caught.value.why
    # what failed is not stored: the next one asks again
    server.answer = first_fail()
    assert asyncio.run(judge.grade(rubric, answer="x")).value == 1.0
    assert len(server.requests) == attempts + 1


@pytest.mark.parametrize(
    ("status", "hint"),
    [(400, "judge.model"), (401, "judge.api_key_env"), (403, "judge.api_key_env"), (404, "/v1"), (422, "json_schema")],
)
def test_what_asking_again_cannot_mend_fails_at_once(status: int, hint: str, make_judge, server, rubric) -> None:
    server.answer = lambda request, number: Reply(status=status, body=b'{"error": "key sk-secret is unknown"}')
    judge = make_judge()
    with pytest.raises(JudgeError, match=str(status)) as caught:
        asyncio.run(judge.grade(rubric, answer="x"))
    assert hint in caught.value.fix
    assert len(server.requests) == 1
    assert judge.metrics()["failures/refused"] == 1
    assert ("sk-secret" in str(caught.value)) == (status not in (401, 403))


def test_an_account_without_credit_is_not_asked_again(make_judge, server, rubric) -> None:
    server.answer = lambda request, number: Reply(status=429, body=b'{"error": {"code": "insufficient_quota"}}')
    with pytest.raises(JudgeError, match="credit"):
        asyncio.run(make_judge().grade(rubric, answer="x"))
    assert len(server.requests) == 1


def test_nobody_listens(make_judge, server, rubric) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    judge = make_judge(base_url=f"http://127.0.0.1:{port}/v1", attempts=2)
    with pytest.raises(JudgeError, match=r"judge\.base_url"):
        asyncio.run(judge.grade(rubric, answer="x"))
    assert judge.metrics()["failures/connection"] == 2


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/v1", "127.0.0.1:80/v1"])
def test_a_url_that_is_none(url: str, make_judge, rubric) -> None:
    judge = make_judge(base_url=url)
    with pytest.raises(JudgeError, match=r"judge\.base_url"):
        asyncio.run(judge.grade(rubric, answer="x"))
    assert judge.metrics()["requests"] == 1


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_the_server_says_when_to_come_back(form: str, make_judge, server, rubric) -> None:
    def answer(request, number) -> Reply:
        # a date has whole seconds, so it says up to one second less
        when = "1" if form == "seconds" else formatdate(time.time() + 3, usegmt=True)
        return Reply(status=429, headers={"Retry-After": when}) if number == 0 else Reply()

    server.answer = answer
    assert asyncio.run(make_judge().grade(rubric, answer="x")).value == 1.0
    assert server.times[1] - server.times[0] >= 0.9


def test_waiting_longer_than_the_deadline_is_not_begun(make_judge, server, rubric) -> None:
    server.answer = lambda request, number: Reply(status=429, headers={"Retry-After": "3600"})
    start = time.monotonic()
    with pytest.raises(JudgeError, match="asking to wait 3600 s"):
        asyncio.run(make_judge(deadline=5.0).grade(rubric, answer="x"))
    assert time.monotonic() - start < 4
    assert len(server.requests) == 1


def test_a_slow_server_meets_the_deadline(make_judge, server, rubric) -> None:
    server.answer = lambda request, number: Reply(delay=3.0)
    judge = make_judge(deadline=0.3)
    start = time.monotonic()
    with pytest.raises(JudgeError, match=r"judge\.deadline=0\.3"):
        asyncio.run(judge.grade(rubric, answer="x"))
    assert time.monotonic() - start < 2.5
    metrics = judge.metrics()
    assert (metrics["requests"], metrics["failures/deadline"]) == (1, 1)


def test_slow_is_not_failed(make_judge, server, rubric) -> None:
    server.answer = lambda request, number: Reply(delay=0.4)
    judge = make_judge()
    assert asyncio.run(judge.grade(rubric, answer="x")).value == 1.0
    metrics = judge.metrics()
    assert 0.4 <= metrics["latency"] < 5
    assert metrics["retries"] == 0


def test_the_deadline_covers_all_attempts(make_judge, server, rubric) -> None:
    server.answer = lambda request, number: Reply(status=500, delay=0.3)
    with pytest.raises(JudgeError):
        asyncio.run(make_judge(deadline=2.0, attempts=50).grade(rubric, answer="x"))
    assert 2 <= len(server.requests) <= 7


def test_waiting_for_a_place_does_not_count(make_judge, server, rubric) -> None:
    """Six questions one after the other take longer than the deadline of each."""
    server.answer = lambda request, number: Reply(delay=0.25)
    judge = make_judge(deadline=1.0, concurrency=1)

    async def run() -> list[float | None]:
        return [s.value for s in await asyncio.gather(*(judge.grade(rubric, answer=str(i)) for i in range(6)))]

    start = time.monotonic()
    assert asyncio.run(run()) == [1.0] * 6
    assert time.monotonic() - start > 1.4
    assert judge.metrics()["wait"] > 0.3


@pytest.mark.parametrize("concurrency", [1, 5])
def test_concurrency_is_used_and_never_exceeded(concurrency: int, make_judge, server, rubric) -> None:
    server.answer = lambda request, number: Reply(delay=0.05, status=500 if number % 4 == 0 else 200)
    judge = make_judge(concurrency=concurrency, attempts=10)

    async def run() -> None:
        await asyncio.gather(*(judge.grade(rubric, answer=str(i)) for i in range(20)))

    asyncio.run(run())
    assert server.most_at_once == concurrency


def test_requests_per_minute(make_judge, server, rubric) -> None:
    judge = make_judge(requests_per_minute=600)  # 10 a second, and 10 at once

    async def run() -> None:
        await asyncio.gather(*(judge.grade(rubric, answer=str(i)) for i in range(25)))

    start = time.monotonic()
    asyncio.run(run())
    # counted from the call: a busy machine makes requests arrive later and closer together, never earlier
    assert server.times[24] - start >= 1.4, "15 beyond the first ten at 10 a second"
    assert server.times[9] < server.times[24] - 0.5, "the first ten need not wait for a minute's share"


def test_tokens_per_minute(make_judge, server, rubric) -> None:
    """500 a second. Each reply says 250 tokens, so in the long run two a second, whatever was guessed at first."""
    server.answer = lambda request, number: Reply(usage={"prompt_tokens": 200, "completion_tokens": 50})
    judge = make_judge(tokens_per_minute=30_000, max_tokens=50)

    async def run() -> None:
        await asyncio.gather(*(judge.grade(rubric, answer=str(i)) for i in range(8)))

    asyncio.run(run())
    assert server.times[7] - server.times[0] >= 2.0


def test_a_question_larger_than_the_bucket_passes(make_judge, server, rubric) -> None:
    judge = make_judge(tokens_per_minute=60_000, max_tokens=10)
    start = time.monotonic()
    assert asyncio.run(judge.grade(rubric, answer="word " * 1200)).value == 1.0  # some 2,400 tokens of 1,000 a second
    assert time.monotonic() - start >= 1.0


def test_the_key_travels_only_when_there_is_one(make_judge, server, rubric, monkeypatch) -> None:
    monkeypatch.delenv("JUDGE_TEST_KEY", raising=False)
    asyncio.run(make_judge(api_key_env="JUDGE_TEST_KEY").grade(rubric, answer="x"))
    monkeypatch.setenv("JUDGE_TEST_KEY", "sk-1\n")
    asyncio.run(make_judge(api_key_env="JUDGE_TEST_KEY").grade(rubric, answer="y"))
    assert [headers.get("Authorization") for headers in server.headers] == [None, "Bearer sk-1"]


def test_a_local_server_is_not_asked_through_a_proxy(make_judge, server, rubric, monkeypatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert asyncio.run(make_judge(attempts=1).grade(rubric, answer="x")).value == 1.0
    assert not is_local("https://judge.example.org/v1")


def test_pauses_are_jittered(make_judge, server, rubric, monkeypatch) -> None:
    """Refused together, back apart: each first repetition comes after a pause of its own, of up to half a second."""
    judge = make_judge()
    monkeypatch.undo()  # the real pauses
    seen: set[str] = set()

    def refuse_once(request: dict[str, Any], number: int) -> Reply:
        answer = fields_of(request)["answer"]
        first = answer not in seen
        seen.add(answer)
        return Reply(status=429 if first else 200)

    server.answer = refuse_once

    async def run() -> None:
        await asyncio.gather(*(judge.grade(rubric, answer=str(i)) for i in range(20)))

    asyncio.run(run())
    asked: dict[str, list[float]] = {}
    for request, when in zip(server.requests, server.times, strict=True):
        asked.setdefault(fields_of(request)["answer"], []).append(when)
    pauses = [second - first for first, second, *_ in asked.values()]
    assert len(pauses) == 20
    assert min(pauses) < 0.25 < max(pauses)


def test_one_judge_serves_many_event_loops(make_judge, server, rubric) -> None:
    judge = make_judge(requests_per_minute=6000, cache=None)
    for number in range(3):
        assert asyncio.run(judge.grade(rubric, answer="x")).value == 1.0
        assert len(server.requests) == number + 1


def test_closing_ends_connections_and_the_judge_may_go_on(make_judge, server, rubric) -> None:
    judge = make_judge()

    async def run() -> None:
        await judge.grade(rubric, answer="x")
        await judge.aclose()
        await judge.grade(rubric, answer="y")
        await judge.aclose()
        await judge.aclose()

    asyncio.run(run())
    assert len(server.requests) == 2


def test_build_judge() -> None:
    assert isinstance(build_judge(JudgeSection()), RuleJudge)
    assert isinstance(build_judge(JudgeSection(base_url="http://localhost:1/v1", model="m")), ModelJudge)
    with pytest.raises(RecipeError, match=r"judge\.model"):
        build_judge(JudgeSection(base_url="http://localhost:1/v1"))
    for wrong in (
        "localhost:8000/v1",
        "ftp://localhost/v1",
        "http://[bad/v1",
        "http://localhost:port/v1",
        "",
        "http://",
    ):
        with pytest.raises(RecipeError, match=r"judge\.base_url"):
            build_judge(JudgeSection(base_url=wrong, model="m"))

"""A real server, asked by OpenAI's own client: the answers of evaluation, a memory for each, and what is refused."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from memfactory.agents.running import run_episodes
from memfactory.environments.base import Split
from memfactory.episode import Episode
from memfactory.evaluate.run import evaluate_agent
from memfactory.policy.base import Sampling
from memfactory.runs import episode_record
from memfactory.train.prepare import prepare
from memfactory.train.start import load_policy
from tests.forked import Server
from tests.serve.conftest import TOKENS
from tests.serve.running import Serving, messages_of, read_by, text_of, user

TOKEN_FIELDS = ("module", "prompt_ids", "completion_ids", "text", "stop")


def turns_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [{name: turn[name] for name in TOKEN_FIELDS} for turn in record["turns"]]


# ---- the same answers ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "bank"])
def test_greedy_tokens_are_those_of_evaluation_and_of_training_rollouts(
    kind: str, runs: dict[str, Path], servers: dict[str, Serving]
) -> None:
    prepared = prepare(runs[kind] / "recipe.yaml", splits=(Split.TEST,))
    tasks = prepared.eval_tasks
    policy = load_policy(prepared, runs[kind] / "model")
    evaluated = evaluate_agent(prepared.agent, tasks, policy, prepared.eval_options).episodes["eval_greedy"]
    with policy.drawing(Sampling(0), 0):
        rolled_out = run_episodes(prepared.agent, [*tasks, *tasks], policy)

    answers: dict[str, str] = {}
    for task, episode, *others in zip(tasks, evaluated, rolled_out, rolled_out[len(tasks) :], strict=False):
        reply = servers[kind].ask(messages_of(task), user=task.id)
        assert turns_of(reply.episode) == turns_of(episode_record(episode))
        for other in others:
            assert turns_of(reply.episode) == turns_of(episode_record(other))
        assert episode.answer is not None
        assert text_of(reply) == episode.answer.text
        assert servers[kind].memory(task.id) == episode.memory
        assert tuple(read_by(reply)) == task.stream
        assert tokens_of(reply) == counted(episode)
        answers[task.id] = text_of(reply)
    assert len(set(answers.values())) == len(tasks) == 3, "what is said must depend on what was read"


def tokens_of(reply: Any) -> tuple[int, int, int]:
    return reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens


def counted(episode: Episode) -> tuple[int, int, int]:
    prompt = sum(len(turn.prompt_ids) for turn in episode.turns)
    completion = sum(len(turn.completion_ids) for turn in episode.turns)
    return prompt, completion, prompt + completion


def test_a_stream_is_the_same_answer_in_pieces_behind_what_the_agent_does(servers: dict[str, Serving]) -> None:
    text = servers["text"]
    asked = user("the old dog stood .", "the small cat sat .", "which animal ?")
    whole = text.ask(asked, user="whole")
    given: dict[str, Any] = {"model": text.model, "temperature": 0, "stream": True}
    chunks = list(
        text.client().chat.completions.create(
            messages=asked, user="pieces", stream_options={"include_usage": True}, **given
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == text_of(whole)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[-3:-1]] == [
        None,
        "stop" if not cut(whole) else "length",
    ]
    assert tokens_of(chunks[-1]) == tokens_of(whole)
    assert len({chunk.id for chunk in chunks}) == 1
    raw = text.post({"messages": asked, "user": "raw", **given})
    assert raw.headers["content-type"].startswith("text/event-stream")
    events = raw.text.split("\n\n")
    assert events[:2] == [": reading chunk 1 of 2", ": reading chunk 2 of 2"]
    assert events[-2:] == ["data: [DONE]", ""]
    assert sum(event.startswith("data: {") for event in events) == len(chunks) - 1


def cut(reply: Any) -> bool:
    return bool(reply.choices[0].finish_reason == "length")


def test_a_seed_decides_the_draw_whoever_else_asks(servers: dict[str, Serving]) -> None:
    """Twice the same among others that draw at the same time; and at temperature 1 other seeds say something else."""
    text, asked = servers["text"], user("the old dog stood .", "which animal ?")
    found: dict[tuple[int, int], list[list[int]]] = {}

    def one(seed: int, time: int) -> None:
        reply = text.ask(asked, user=f"seed {seed} {time}", temperature=1.0, seed=seed)
        found[seed, time] = [turn["completion_ids"] for turn in reply.episode["turns"]]

    threads = [threading.Thread(target=one, args=(seed, time)) for time in range(2) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[seed, 0] == found[seed, 1] for seed in range(4))
    assert len({json.dumps(found[seed, 0]) for seed in range(4)}) == 4


def test_an_answer_can_be_limited_and_stopped(servers: dict[str, Serving]) -> None:
    text, asked = servers["text"], user("the old dog stood .", "which animal ?")
    whole = text.ask(asked, user="unlimited")
    short = text.ask(asked, user="limited", max_tokens=2)
    assert (text_of(short).split(), short.choices[0].finish_reason) == (text_of(whole).split()[:2], "length")
    assert next(len(turn["completion_ids"]) for turn in short.episode["turns"]) > 2  # the memory is not limited
    word = text_of(whole).split()[2]
    stopped = text.ask(asked, user="stopped", stop=[word, "no such"])
    assert text_of(stopped) == text_of(whole)[: text_of(whole).index(word)]


# ---- conversations ------------------------------------------------------------------------------


def test_what_was_read_is_not_read_again_and_answers_become_part_of_the_stream(servers: dict[str, Serving]) -> None:
    bank = servers["bank"]
    conversation = user("the old dog stood .", "which animal ?")
    first = bank.ask(conversation, user="talk")
    conversation += [{"role": "assistant", "content": text_of(first)}, *user("and which fruit ?")]
    second = bank.ask(conversation, user="talk")
    assert read_by(second) == [f"user: which animal ?\nassistant: {text_of(first)}"]
    # the same again, as clients do whose connection broke: nothing is read, and the exchange counts once
    assert read_by(bank.ask(conversation, user="talk")) == []
    # another conversation of the same user: what was said last is read first
    other = bank.ask(user("hello ?"), user="talk")
    assert [text.splitlines()[0] for text in read_by(other)] == ["user: and which fruit ?"]
    lines = [line.partition(": ")[2] for line in bank.memory("talk").splitlines()]
    assert lines[:2] == ["the old dog stood .", "user: which animal ?"]
    assert [line for line in lines if line.startswith("user")] == ["user: which animal ?", "user: and which fruit ?"]
    assert bank.memory("somebody else") == ""


def test_a_memory_can_be_looked_at_and_forgotten(servers: dict[str, Serving]) -> None:
    for server in servers.values():
        asked = user("the old dog stood .", "which animal ?")
        server.ask(asked, user="gone")
        assert server.memory("gone")
        reply = httpx.delete(f"{server.url}/memory", params={"user": "gone"}, trust_env=False)
        assert (reply.status_code, server.memory("gone")) == (200, "")
        assert len(read_by(server.ask(asked, user="gone"))) == 1


def test_requests_of_one_user_are_answered_one_after_the_other(servers: dict[str, Serving]) -> None:
    bank, replies = servers["bank"], list[Any]()
    threads = [
        threading.Thread(target=lambda n=n: replies.append(bank.ask(user(f"fact {n} .", f"what {n} ?"), user="busy")))
        for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    texts = [line.partition(": ")[2] for line in bank.memory("busy").splitlines()]
    assert sorted(text for text in texts if text.startswith("fact")) == [f"fact {n} ." for n in range(6)]
    # each but the first read the exchange of the one before it
    assert sorted(len(read_by(reply)) for reply in replies) == [1, 2, 2, 2, 2, 2]


# ---- refusals -----------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "several answers": ({"n": 2}, 400, "n"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools"),
    "log-probs": ({"logprobs": True}, 400, "logprobs"),
    "a form": ({"response_format": {"type": "json_object"}}, 400, "response_format"),
    "an unknown field": ({"temprature": 1}, 400, "temprature"),
    "a wrong type": ({"temperature": "hot"}, 400, "temperature"),
    "no question": ({"messages": [{"role": "assistant", "content": "so"}]}, 400, "messages"),
    "no message": ({"messages": []}, 400, "messages"),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400,
        "messages.0.content",
    ),
    "another model": ({"model": "gpt-4"}, 404, "model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_in_the_form_of_openai(case: str, servers: dict[str, Serving]) -> None:
    change, status, param = REFUSED[case]
    reply = servers["text"].post({"model": servers["text"].model, "messages": user("why ?")} | change)
    error = reply.json()["error"]
    assert (reply.status_code, error["type"]) == (status, "invalid_request_error")
    assert str(error["param"]).startswith(param)
    assert error["message"]
    assert "Traceback" not in reply.text


def test_other_things_than_requests_are_refused_too(servers: dict[str, Serving]) -> None:
    text = servers["text"]
    url = f"{text.url}/chat/completions"
    good = {"model": text.model, "messages": user("why ?")}

    def refused(reply: httpx.Response) -> tuple[int, str]:
        return reply.status_code, reply.json()["error"]["code"]

    plain = {"Content-Type": "text/plain"}
    assert refused(httpx.post(url, content=json.dumps(good), headers=plain)) == (415, "unsupported_media_type")
    kind = {"Content-Type": "application/json"}
    assert refused(httpx.post(url, content="{", headers=kind)) == (400, "invalid_json")
    half = b'{"model": "%s", "messages": [{"role": "user", "content": "\\ud83d ?"}]}' % text.model.encode()
    assert refused(httpx.post(url, content=half, headers=kind)) == (400, "invalid_value")
    assert refused(httpx.post(url, content="[" * 100_000, headers=kind)) == (400, "invalid_json")
    assert refused(nothing := httpx.get(f"{text.url}/nothing")) == (404, "not_found")
    assert "POST /v1/chat/completions" in nothing.json()["error"]["message"]
    assert refused(httpx.get(url)) == (405, "not_found")
    assert refused(text.post(good, headers={"Host": "evil.example:80"})) == (403, "forbidden")
    long = text.post(good | {"messages": user("dog " * 5000, "why ?"), "user": "long"})
    assert refused(long) == (400, "context_length_exceeded")
    assert text.memory("long") == ""


def test_models_health_and_metrics(servers: dict[str, Serving]) -> None:
    text = servers["text"]
    assert [model.id for model in text.client().models.list()] == [text.model]
    assert text.client().models.retrieve(text.model).owned_by == "memfactory"
    with pytest.raises(openai.NotFoundError):
        text.client().models.retrieve("other")
    assert httpx.get(f"{text.root}/health").json() == {"status": "ok", "model": text.model}

    def values() -> dict[str, float]:
        found = httpx.get(f"{text.root}/metrics").text
        samples = [sample for family in text_string_to_metric_families(found) for sample in family.samples]
        return {f"{sample.name}{sorted(sample.labels.items())}": sample.value for sample in samples}

    before = values()
    reply = text.ask(user("the old dog stood .", "which animal ?"), user="counted")
    text.post({"n": 2})
    after = values()
    grown = {name: value - before.get(name, 0) for name, value in after.items() if "created" not in name}
    assert grown["memfactory_turns_total[('module', 'write')]"] == 1
    assert grown["memfactory_turns_total[('module', 'answer')]"] == 1
    assert grown["memfactory_tokens_total[('kind', 'completion')]"] == reply.usage.completion_tokens
    assert grown["memfactory_requests_total[('status', '200')]"] == 1
    assert grown["memfactory_requests_total[('status', '400')]"] == 1
    assert grown["memfactory_request_seconds_count[]"] == 1
    assert after["memfactory_requests_under_way[]"] == 0
    assert "counted" not in httpx.get(f"{text.root}/metrics").text


# ---- users and limits ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strict(forked: Server, runs: dict[str, Path], tokens: Path) -> Iterator[Serving]:
    """A server with tokens and narrow limits, whose requests leave nothing."""
    limits = "--at-once 2 --per-minute 12 --body-seconds 1.5 --request-seconds 1 --max-body-mb 1 --stateless"
    with Serving(forked, runs["text"], "--tokens", str(tokens), *limits.split()) as serving:
        yield serving


def test_a_slow_client_stalls_nobody_and_is_let_go(strict: Serving) -> None:
    with socket.create_connection(("127.0.0.1", strict.port), timeout=10) as slow:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKENS['bob']}\r\n"
        head += 'Content-Type: application/json\r\nContent-Length: 400\r\n\r\n{"model": "tiny'
        slow.sendall(head.encode())
        start = time.monotonic()
        reply = strict.ask(user("the old dog stood .", "which animal ?"), token=TOKENS["alice"])
        assert text_of(reply)
        assert time.monotonic() - start < 1.2
        assert slow.recv(1000).startswith(b"HTTP/1.1 408")


def test_a_wrong_token_is_refused_and_a_large_body_is_not_taken_in(strict: Serving) -> None:
    with pytest.raises(openai.AuthenticationError):
        strict.client("wrong-wrong-wrong-wrong").models.list()
    assert httpx.get(f"{strict.url}/memory").status_code == 401
    assert strict.post({"messages": user("?")}).status_code == 401
    assert [model.id for model in strict.client(TOKENS["alice"]).models.list()] == [strict.model]
    assert httpx.get(f"{strict.root}/health").status_code == 200

    process = psutil.Process(strict.process.pid)
    before = process.memory_info().rss
    headers = {"Authorization": f"Bearer {TOKENS['alice']}", "Content-Type": "application/json"}
    url = f"{strict.url}/chat/completions"
    parts = [b"x" * 100_000] * 100
    announced = httpx.post(url, content=b"".join(parts), headers=headers, timeout=30)
    in_chunks = httpx.post(url, content=iter(parts), headers=headers, timeout=30)
    for reply in (announced, in_chunks):
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_large")
    assert process.memory_info().rss - before < 4e6


def test_too_long_too_many_at_once_and_too_many_in_a_minute(strict: Serving) -> None:
    """Alice has asked three times above; what is refused for being too many is not counted."""
    long = {"model": strict.model, "messages": user(*["the old dog stood ."] * 120, "which animal ?")}
    bob = {"Authorization": f"Bearer {TOKENS['bob']}"}
    replies: list[httpx.Response] = []
    threads = [threading.Thread(target=lambda: replies.append(strict.post(long, headers=bob))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(reply.status_code for reply in replies) == [429, 504, 504]
    assert {reply.headers.get("Retry-After") for reply in replies} == {None, "1"}
    stream = strict.post(long | {"stream": True}, headers=bob)
    assert stream.status_code == 200
    last = stream.text.split("\n\n")[-2]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
    short = {"model": strict.model, "messages": user("which animal ?")}
    alice = {"Authorization": f"Bearer {TOKENS['alice']}"}
    many = [strict.post(short, headers=alice) for _ in range(13)]
    statuses = [reply.status_code for reply in many]
    answered = statuses.index(429)  # those of the last minute are counted, whoever of the tests above asked them
    assert statuses == [200] * answered + [429] * (13 - answered)
    assert 30 < int(many[-1].headers["Retry-After"]) <= 60
    # a memory counts as much: who asks too often is told so there too
    for method in ("GET", "DELETE"):
        assert httpx.request(method, f"{strict.url}/memory", headers=alice).status_code == 429
    # nothing is left of what came before: it does not even know that it was asked
    assert read_by(strict.ask(user("the old dog stood .", "?"), token=TOKENS["bob"])) == ["the old dog stood ."]

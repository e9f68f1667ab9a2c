"""Verdicts that are paid for once: in one process, in several, after a restart, and with a file that is broken."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from servers import ChatServer, Reply, fields_of

from memfactory.reward.judge import Rubric, cache
from memfactory.reward.judge.cache import CacheWarning

ASKING = Path(__file__).with_name("asking.py")


def verdicts_of(file: Path) -> int:
    try:
        with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as connection:
            return int(connection.execute("SELECT count(*) FROM verdicts").fetchone()[0])
    except sqlite3.OperationalError:  # not made yet
        return 0


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "did not happen"
        time.sleep(0.02)


class Process:
    """One run of `asking.py`."""

    def __init__(self, server: ChatServer, cache: Path) -> None:
        command = [sys.executable, str(ASKING), server.url, str(cache)]
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ)

    def send(self, answers: list[str]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(answers) + "\n")
        self.process.stdin.flush()

    def result(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        told: dict[str, Any] = json.loads(self.process.stdout.readline())
        assert not told["warnings"]
        return told

    def end(self) -> None:
        self.process.communicate(timeout=60)
        assert self.process.returncode == 0


@pytest.fixture
def start(server: ChatServer, tmp_path: Path):
    started: list[Process] = []

    def one() -> Process:
        started.append(Process(server, tmp_path / "shared" / "judge.sqlite"))
        return started[-1]

    yield one
    for process in started:
        process.process.kill()
        process.process.communicate()


def by_answer(request: dict[str, Any], number: int) -> Reply:
    verdict = "yes" if fields_of(request)["answer"].startswith("good") else "no"
    return Reply(json.dumps({"reason": "r", "verdict": verdict}))


def test_the_cache_survives_a_restart(start, server: ChatServer) -> None:
    server.answer = by_answer
    answers, expected = ["good1", "bad1", "good2"], [1.0, 0.0, 1.0]
    first = start()
    first.send(answers)
    assert first.result()["scores"] == expected
    first.end()  # it never closes its judge
    second = start()
    second.send(answers)
    told = second.result()
    second.end()
    assert told["scores"] == expected
    assert (told["requests"], told["cached"], told["cache_hit_rate"], told["prompt_tokens"]) == (0, 3, 1.0, 0)
    assert len(server.requests) == 3


def test_two_living_processes_share_the_cache(start, server: ChatServer, tmp_path: Path) -> None:
    file = tmp_path / "shared" / "judge.sqlite"
    one, two = start(), start()
    left, right = [f"good{i}" for i in range(20)], [f"bad{i}" for i in range(20)]
    one.send(left)
    one.result()
    wait_for(lambda: verdicts_of(file) == 20)
    two.send(left + right)
    assert two.result()["requests"] == 20, "only what the other had not asked"
    wait_for(lambda: verdicts_of(file) == 40)
    one.send(right)
    assert one.result()["requests"] == 0
    assert len(server.requests) == 40
    one.end()
    two.end()


def test_two_processes_write_at_once(start, server: ChatServer, tmp_path: Path) -> None:
    """Both make the file and write the same and different verdicts in the same moment."""
    server.answer = by_answer
    one, two = start(), start()
    answers = [f"{kind}{i}" for i in range(100) for kind in ("good", "bad")]
    one.send(answers)
    two.send(answers[::-1])
    assert one.result()["scores"] == [1.0, 0.0] * 100
    assert two.result()["scores"] == [0.0, 1.0] * 100
    one.end()
    two.end()
    assert verdicts_of(tmp_path / "shared" / "judge.sqlite") == 200


def grade_all(judge, rubric: Rubric, *answers: str) -> list[float | None]:
    async def run() -> list[float | None]:
        scores = await asyncio.gather(*(judge.grade(rubric, answer=answer) for answer in answers))
        await judge.aclose()
        return [score.value for score in scores]

    return asyncio.run(run())


def test_hit_rate_and_cost(make_judge, server: ChatServer, rubric) -> None:
    server.answer = lambda request, number: Reply(usage={"prompt_tokens": 1000, "completion_tokens": 20})
    judge = make_judge(price_per_million=(2.0, 10.0))
    grade_all(judge, rubric, "a", "b")
    metrics = judge.metrics()
    assert metrics["cost"] == pytest.approx(2 * (1000 * 2 + 20 * 10) / 1e6)
    assert (metrics["prompt_tokens"], metrics["completion_tokens"]) == (2000, 40)
    assert metrics["cache_hit_rate"] == 0.0
    grade_all(judge, rubric, "a", "b", "c", "d")
    metrics = judge.metrics()
    assert metrics["cache_hit_rate"] == 0.5
    assert metrics["cost"] == pytest.approx(2 * (1000 * 2 + 20 * 10) / 1e6)
    empty = judge.metrics()
    assert not any(empty.values()), "taken means gone"
    assert "cache_hit_rate" not in empty


def test_a_failed_attempt_that_was_answered_is_paid_too(make_judge, server: ChatServer, rubric) -> None:
    server.answer = lambda request, number: Reply("no verdict" if number == 0 else Reply().text)
    judge = make_judge(price_per_million=(1.0, 1.0))
    grade_all(judge, rubric, "a")
    assert judge.metrics()["prompt_tokens"] == 200


def test_a_reply_without_usage_is_counted_as_such(make_judge, server: ChatServer, rubric) -> None:
    server.answer = lambda request, number: Reply(usage=None if number == 0 else {"prompt_tokens": -5})
    judge = make_judge(tokens_per_minute=1e6)
    assert grade_all(judge, rubric, "a", "b") == [1.0, 1.0]
    metrics = judge.metrics()
    assert (metrics["unmetered"], metrics["prompt_tokens"]) == (2, 0)


@pytest.mark.parametrize("cached", [True, False])
def test_identical_questions_under_way_are_asked_once(cached: bool, make_judge, server: ChatServer, rubric) -> None:
    server.answer = lambda request, number: Reply(delay=0.2)
    judge = make_judge() if cached else make_judge(cache=None)
    assert grade_all(judge, rubric, *["same"] * 16, "other") == [1.0] * 17
    metrics = judge.metrics()
    assert (len(server.requests), metrics["coalesced"], metrics["asked"]) == (2, 15, 17)
    assert metrics["cache_hit_rate"] == pytest.approx(15 / 17)


def test_a_failure_reaches_all_who_wait_for_it(make_judge, server: ChatServer, rubric) -> None:
    server.answer = lambda request, number: Reply(status=400, delay=0.2)
    judge = make_judge()

    async def run() -> list[Any]:
        return await asyncio.gather(*(judge.grade(rubric, answer="x") for _ in range(3)), return_exceptions=True)

    assert [type(result).__name__ for result in asyncio.run(run())] == ["JudgeError"] * 3
    assert len(server.requests) == 1
    assert judge.metrics()["failed"] == 3


def test_one_who_gives_up_takes_nobody_along(make_judge, server: ChatServer, rubric) -> None:
    server.answer = lambda request, number: Reply(delay=0.5)
    judge = make_judge()

    async def run() -> float | None:
        hasty = asyncio.create_task(judge.grade(rubric, answer="x"))
        patient = asyncio.create_task(judge.grade(rubric, answer="x"))
        await asyncio.sleep(0.15)
        hasty.cancel()
        return (await patient).value

    assert asyncio.run(run()) == 1.0
    assert len(server.requests) == 1


def test_when_all_give_up_the_place_is_free_again(make_judge, server: ChatServer, rubric) -> None:
    server.answer = lambda request, number: Reply(delay=20.0 if number == 0 else 0.0)
    judge = make_judge(concurrency=1)

    async def run() -> float | None:
        hasty = asyncio.create_task(judge.grade(rubric, answer="x"))
        while not server.requests:
            await asyncio.sleep(0.02)
        hasty.cancel()
        return (await asyncio.wait_for(judge.grade(rubric, answer="x"), 10.0)).value

    assert asyncio.run(run()) == 1.0


def write_text(file: Path) -> None:
    file.write_bytes(b"this is no database at all, " * 100)


def write_other_database(file: Path) -> None:
    with sqlite3.connect(file) as connection:
        connection.execute("CREATE TABLE people (name TEXT)")


def write_other_version(file: Path) -> None:
    with sqlite3.connect(file) as connection:
        connection.execute("PRAGMA user_version = 99")


def write_folder(file: Path) -> None:
    file.mkdir()


@pytest.mark.parametrize("spoil", [write_text, write_other_database, write_other_version, write_folder])
def test_a_file_that_cannot_be_used_costs_one_warning_and_not_the_run(
    spoil, make_judge, server: ChatServer, rubric, tmp_path: Path
) -> None:
    file = tmp_path / "spoilt"
    spoil(file)
    before = file.read_bytes() if file.is_file() else None
    judge = make_judge(cache=str(file))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert grade_all(judge, rubric, "a", "b", "c") == [1.0] * 3
        assert grade_all(judge, rubric, "a") == [1.0]
    ours = [str(one.message) for one in caught if issubclass(one.category, CacheWarning)]
    assert len(ours) == 1
    assert str(file) in ours[0]
    assert "judge.cache" in ours[0]
    assert len(server.requests) == 4
    assert (file.read_bytes() if file.is_file() else None) == before, "what is not ours is left as it is"


def test_a_file_that_takes_no_more_is_still_read(make_judge, server: ChatServer, rubric, tmp_path: Path) -> None:
    grade_all(make_judge(), rubric, "a")
    with sqlite3.connect(tmp_path / "judge.sqlite") as connection:
        full = "CREATE TRIGGER full BEFORE INSERT ON verdicts BEGIN SELECT RAISE(ABORT, 'disk is full'); END"
        connection.execute(full)
    judge = make_judge()
    with pytest.warns(CacheWarning, match="disk is full"):
        assert grade_all(judge, rubric, "b", "a") == [1.0, 1.0]
    assert judge.metrics()["cached"] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grade_all(judge, rubric, "c", "a")
    assert judge.metrics()["cached"] == 1


def test_another_process_that_writes_long_holds_up_nobody(make_judge, server: ChatServer, rubric, tmp_path) -> None:
    """Readers and the event loop go on while a write waits; it is made when the other is done."""
    file = tmp_path / "judge.sqlite"
    judge = make_judge()
    grade_all(judge, rubric, "known")
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")

    async def run() -> float:
        start = time.monotonic()
        await asyncio.gather(*(judge.grade(rubric, answer=f"new{i}") for i in range(64)))
        for _ in range(64):
            await judge.grade(rubric, answer="known")
        return time.monotonic() - start

    assert asyncio.run(run()) < 5.0, "a write waits up to ten seconds for the other"
    assert verdicts_of(file) == 1
    other.execute("COMMIT")
    other.close()
    asyncio.run(judge.aclose())
    assert verdicts_of(file) == 65


def test_a_write_that_was_refused_is_made_later(make_judge, server: ChatServer, rubric, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(cache, "BUSY", 0.1)
    judge = make_judge()
    grade_all(judge, rubric, "known")
    other = sqlite3.connect(tmp_path / "judge.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.warns(CacheWarning, match="locked"):
        assert grade_all(judge, rubric, "new") == [1.0]
    assert grade_all(judge, rubric, "new") == [1.0]
    assert len(server.requests) == 2, "what waits to be written is found too"
    other.execute("COMMIT")
    other.close()
    asyncio.run(judge.aclose())
    assert verdicts_of(tmp_path / "judge.sqlite") == 2


def test_a_stored_label_that_the_rubric_no_longer_has_is_asked_again(make_judge, server, rubric, tmp_path) -> None:
    grade_all(make_judge(), rubric, "a")
    with sqlite3.connect(tmp_path / "judge.sqlite") as connection:
        connection.execute("UPDATE verdicts SET label = 'perfect'")
    assert grade_all(make_judge(), rubric, "a") == [1.0]
    assert len(server.requests) == 2


def test_no_text_is_kept_in_the_file(make_judge, server, rubric, tmp_path: Path) -> None:
    grade_all(make_judge(), rubric, "a-private-sentence")
    assert b"a-private-sentence" not in (tmp_path / "judge.sqlite").read_bytes()
    assert b"it fits" in (tmp_path / "judge.sqlite").read_bytes()

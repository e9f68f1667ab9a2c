"""`memfactory eval` with a judge, and of a model behind an endpoint: both are HTTP servers on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

pytest.importorskip("torch")

from memfactory.agents.baselines import Baseline
from memfactory.cli.recipes import find_recipe
from memfactory.evaluate.job import Asked, Done, run_evaluation
from memfactory.evaluate.table import markdown
from memfactory.train.callbacks import progress_bar
from tests.servers import ChatServer, Reply, fields_of


def evaluated(output: Path, *overrides: str, **asked: Any) -> Done:
    with progress_bar(Console(quiet=True)) as progress:
        own = ("eval.greedy=false", "environment.test_tasks=6", *overrides)
        return run_evaluation(Asked(find_recipe("memagent/quickstart"), own, **asked), output, progress)


def judged(server: ChatServer, output: Path, **asked: Any) -> Done:
    own = (f"judge.base_url={server.url}", "judge.model=m", "judge.cache=null", "judge.attempts=1")
    return evaluated(output, *own, judge=True, **asked)


def test_verdicts_stand_beside_the_rule(tmp_path: Path) -> None:
    """An untrained model answers nothing right, and this judge lets everything pass."""
    with ChatServer() as server:
        done = judged(server, tmp_path / "out", samples=2)
    (row,) = done.rows
    assert row.mean == 0
    assert row.judge == {"mean": 1.0, "failed": 0.0, "disagree": 1.0, "kappa": None}
    assert len(server.requests) == 12
    assert {"question", "gold", "answer"} <= set(fields_of(server.requests[0]))
    assert "| 1.000 | 1.000 |" in (tmp_path / "out" / "table.md").read_text()


def test_a_judge_that_fails_is_counted_and_told_once(tmp_path: Path) -> None:
    with ChatServer(lambda request, number: Reply(status=500)) as server:
        done = judged(server, tmp_path / "out", baselines=list(Baseline))
    assert done.failure is None  # the metric is there
    assert [row.mean for row in done.rows] == [0.0] * 5
    assert [row.judge["failed"] for row in done.rows] == [6.0] * 5
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.count("| failed 6 |") == 5
    assert len(done.examples) == len(set(done.examples)) == 1
    assert table.count("the server answered 500") == 1


def test_a_judge_that_fails_now_and_then(tmp_path: Path) -> None:
    with ChatServer(lambda request, number: Reply(status=500 if number % 3 == 0 else 200)) as server:
        (row,) = judged(server, tmp_path / "out").rows
    assert (row.judge["mean"], row.judge["failed"]) == (1.0, 2.0)
    assert "| 1.000 (failed 2) |" in markdown([row], "t", [], [])


def test_an_endpoint_is_asked_and_its_context_is_kept_to(tmp_path: Path) -> None:
    asked = {"model": "m", "baselines": [Baseline.FULL_CONTEXT]}
    with ChatServer(lambda request, number: Reply("paris")) as server:
        whole = evaluated(tmp_path / "out", "environment.chunks=12", endpoint=server.url, **asked)
        warned = [note for note in whole.notes if "--context" in note]
        longest = max(len(request["messages"][0]["content"].split()) for request in server.requests)
        del server.requests[:]
        cut = evaluated(tmp_path / "out", "environment.chunks=12", endpoint=server.url, context=140, **asked)
        kept = max(len(request["messages"][0]["content"].split()) for request in server.requests)
    assert [row.candidate for row in whole.rows] == ["m", "full_context (m)"]
    assert whole.rows[0].tokens > 0  # as the endpoint counts them
    assert len(warned) == 1
    assert "full_context (m)" in warned[0]
    assert not [note for note in cut.notes if "--context" in note]
    assert cut.ran == whole.ran == 12  # another limit is another evaluation
    assert kept < 140 < longest
    assert {request["model"] for request in server.requests} == {"m"}

"""`memfactory eval` where a part cannot be had: baselines that do not apply, and tasks that fail too often."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

pytest.importorskip("torch")

from memfactory.agents.baselines import Baseline, chosen
from memfactory.errors import DataError, RecipeError, ServiceError
from memfactory.evaluate.failures import by_fault, too_many
from memfactory.evaluate.job import Asked, Done, run_evaluation
from memfactory.reward.faults import not_run
from memfactory.train.callbacks import progress_bar
from tests.forked import Server

SHAPED = """
from dataclasses import dataclass, replace
from memfactory.agents import MemAgent
from memfactory.environments.fact_words import FactWords
from memfactory.errors import DataError, ServiceError

@dataclass(frozen=True)
class Shaped(FactWords):
    shape: str = "plain"

    def tasks(self, split, count=None):
        return [self.shaped(task, n) for n, task in enumerate(super().tasks(split, count))]

    def shaped(self, task, n):
        (probe,) = task.probes
        bare = replace(probe, evidence=())
        if self.shape == "unmarked":  # no question of the suite says where its answer stands
            return replace(task, probes=(bare,))
        if self.shape == "mixed":  # two questions each, and one of them does
            return replace(task, probes=(probe, bare))
        if self.shape == "hard":  # what an agent of this file makes of it
            return replace(task, metadata={**task.metadata, "fault": ("data", "service", "data")[n] if n < 3 else ""})
        if self.shape == "few" and n == 0:
            return replace(task, metadata={**task.metadata, "fault": "data"})
        return task

class Fragile(MemAgent):
    async def run(self, task, policy, store=None):
        fault = task.metadata.get("fault")
        if fault == "data":
            raise DataError(f"task {task.id}", "its page is torn", "mend it")
        if fault == "service":
            raise ServiceError(f"task {task.id}", "nobody answered", "wait")
        return await super().run(task, policy, store)
"""
PLAIN = {
    "summary": "the same tasks, measured otherwise",
    "environment": "shaped.py:Shaped",
    "options": {"targets": 1, "chunks": 3},
    "tasks": 6,
    "metrics": ["answer.token_f1", "answer.containment"],
}
ALL = [kind.value for kind in Baseline]


@pytest.fixture(scope="module")
def start(forked: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe of a model that never trained, and suites of odd shapes."""
    folder = tmp_path_factory.mktemp("shaped")
    (folder / "shaped.py").write_text(SHAPED)
    (folder / "data").mkdir()
    suites = {
        shape: {
            "summary": shape,
            "environment": "shaped.py:Shaped",
            "options": {"shape": shape, "targets": 1, "chunks": 3},
            "tasks": 3 if shape == "few" else 6,
            "metrics": ["answer.containment"],
        }
        for shape in ("plain", "unmarked", "mixed", "hard", "few")
    }
    (folder / "data" / "suites.yaml").write_text(json.dumps(suites))
    return folder


def evaluated(start: Path, output: Path, *overrides: str, **asked: Any) -> Done:
    from memfactory.cli.recipes import find_recipe

    with progress_bar(Console(quiet=True)) as progress:
        recipe = find_recipe("memagent/quickstart")
        return run_evaluation(Asked(recipe, ("eval.greedy=false", *overrides), **asked), output, progress)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]


# ---- baselines that cannot apply ----------------------------------------------------------------


def test_a_baseline_without_evidence_is_left_out_of_that_suite_with_a_note(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(start)
    done = evaluated(start, tmp_path / "out", suites=["unmarked", "plain"], baselines=chosen(ALL))
    names = {suite: [row.candidate for row in done.rows if row.suite == suite] for suite in ("unmarked", "plain")}
    assert names["plain"] == ["base", *(f"{kind} (base)" for kind in ALL)]
    assert names["unmarked"] == [name for name in names["plain"] if name != "oracle (base)"]
    note = "unmarked: oracle (base) is left out, the data marks no evidence"
    assert note in done.notes
    assert note in (tmp_path / "out" / "table.md").read_text()
    assert done.failure is None
    # again: everything is there
    again = evaluated(start, tmp_path / "out", suites=["unmarked", "plain"], baselines=chosen(ALL))
    assert (again.ran, len(again.rows)) == (0, len(done.rows))


def test_evidence_is_decided_question_by_question(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(start)
    done = evaluated(start, tmp_path / "out", suites=["mixed"], baselines=[Baseline.ORACLE])
    base, oracle = done.rows
    assert "mixed: oracle (base) is of 6 of 12 questions, the data marks no evidence for the others" in done.notes
    assert (oracle.tasks, oracle.episodes, oracle.failed) == (6, 6, 0)
    assert set(oracle.weights.values()) == {1}
    assert set(base.weights.values()) == {2}
    # the difference is over the same questions: the base's first answers alone
    first = {
        line["task"]["id"]: float(line["answers"][0]["text"] in line["task"]["probes"][0]["answers"])
        for line in lines(tmp_path / "out")
        if line["candidate"] == "base"
    }
    assert oracle.against == first
    assert oracle.difference == pytest.approx(oracle.mean - sum(first.values()) / 6)


def test_baselines_by_name(forked: Server, start: Path, tmp_path: Path) -> None:
    words = (
        "eval",
        "memagent/quickstart",
        "eval.greedy=false",
        "--suite",
        "unmarked",
        "--output",
        str(tmp_path / "o"),
    )
    done = forked.command(*words, "--baseline", "bm25", "--baseline", "oracle", folder=start)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "o" / "table.csv").open()))
    assert [row["candidate"] for row in rows] == ["base", "bm25 (base)"]
    assert "oracle (base) is left out" in done.stdout
    wrong = forked.command(*words, "--baseline", "bm52", folder=start)
    assert wrong.returncode == 2
    assert "did you mean 'bm25'?" in wrong.stderr
    assert chosen([], every=True) == list(Baseline)
    with pytest.raises(RecipeError, match="--baseline full"):
        chosen(["full"])


# ---- too much failed ----------------------------------------------------------------------------


def test_too_many_failures_lose_nothing_else(forked: Server, start: Path, tmp_path: Path) -> None:
    words = ("eval", "memagent/quickstart", "eval.greedy=false", "agent.name=shaped.py:Fragile", "--samples", "2")
    words = (*words, "--suite", "hard", "--suite", "plain", "--baseline", "no_memory", "--output", str(tmp_path / "o"))
    for _ in range(2):  # again: what failed is tried again, and nothing is lost a second time either
        done = forked.command(*words, folder=start)
        assert done.returncode == 2  # the data's fault, as when it is found before
        rows = {(row["suite"], row["candidate"]): row for row in csv.DictReader((tmp_path / "o/table.csv").open())}
        hard, others = rows.pop(("hard", "base")), rows.values()
        assert [row["mean"] != "" for row in others] == [True] * 3
        assert (hard["mean"], hard["low"], hard["dimensions/answer.containment"]) == ("", "", "")
        assert (hard["failed"], hard["failures/data"], hard["failures/service"]) == ("6", "4", "2")
        assert hard["reason"] == "6 of 12 episodes failed: 4 data, 2 service"
        assert rows["hard", "no_memory (base)"]["difference"] == ""
        assert "4 data, 2 service" in done.stdout
        assert "hard, base (sampled): 6 of 12 episodes could not be run, 4 by a fault of the data" in done.stderr
        assert "its page is torn" in done.stderr
        table = (tmp_path / "o" / "table.md").read_text()
        assert "| 4 data, 2 service |" in table
        assert "hard, base (sampled): no mean, 6 of 12 episodes failed" in table
        assert len(json.loads((tmp_path / "o" / "evaluation.json").read_text())["rows"]) == 4
    assert "6 episodes run, 42 taken from" in done.stdout


def test_one_of_three_tasks_may_fail(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(start)
    done = evaluated(start, tmp_path / "out", "agent.name=shaped.py:Fragile", suites=["few"], samples=2)
    assert done.failure is None
    assert (done.rows[0].failed, done.rows[0].failures) == (2, {"data": 2})
    assert done.rows[0].mean is not None
    strict = ("agent.name=shaped.py:Fragile", "rollout.max_failed_share=0")
    done = evaluated(start, tmp_path / "out", *strict, suites=["few"])
    assert isinstance(done.failure, DataError)


def test_what_is_too_much() -> None:
    assert not too_many(0, 5, 0.0)
    assert too_many(1, 5, 0.0)
    assert not too_many(1, 3, 0.25)
    assert too_many(2, 3, 0.25)
    assert not too_many(4, 12, 0.25, samples=4)
    assert too_many(5, 12, 0.25, samples=4)
    assert too_many(1, 1, 0.25)
    assert not too_many(25, 100, 0.25)
    assert too_many(26, 100, 0.25)
    assert by_fault({"service": 1, "data": 2}) == "2 data, 1 service"


def test_the_class_of_most_failures_is_kept() -> None:
    assert isinstance(not_run(9, {"data": 2, "service": 1}, ["x"]), DataError)
    assert isinstance(not_run(9, {"data": 1, "service": 2}, ["x"]), ServiceError)


# ---- the same weights, the same task ------------------------------------------------------------


def test_a_task_of_two_suites_is_run_once_and_kept_in_both(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (start / "data" / "suites.yaml").write_text(
        json.dumps(json.loads((start / "data" / "suites.yaml").read_text()) | {"twin": PLAIN})
    )
    monkeypatch.chdir(start)
    done = evaluated(start, tmp_path / "out", suites=["plain", "twin"])
    assert (done.ran, done.cached) == (6, 6)
    assert [row.suite for row in done.rows] == ["plain", "twin"]
    measured = [[name for name in row.dimensions if name.startswith("answer")] for row in done.rows]
    assert measured == [["answer.containment"], ["answer.token_f1", "answer.containment"]]
    kept = lines(tmp_path / "out")
    assert [line["split"] for line in kept] == ["plain"] * 6 + ["twin"] * 6
    assert list(kept[-1]["scores"]) == ["answer.token_f1", "answer.containment"]
    assert list(kept[0]["scores"]) == ["answer.containment"]
    again = evaluated(start, tmp_path / "out", suites=["plain", "twin"])
    assert again.ran == 0
    assert lines(tmp_path / "out") == kept


def test_fresh_runs_everything_again(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(start)
    evaluated(start, tmp_path / "out", suites=["plain"])
    before = lines(tmp_path / "out")
    assert evaluated(start, tmp_path / "out", suites=["plain"]).ran == 0
    assert evaluated(start, tmp_path / "out", suites=["plain"], fresh=True).ran == 6
    after = lines(tmp_path / "out")
    assert [line["turns"] for line in after] == [line["turns"] for line in before]
    assert len(after) == 6

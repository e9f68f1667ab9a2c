"""What a user sees of `memfactory train`: bad input, refusals, the dry run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from memfactory.environments.base import Split
from memfactory.errors import DataError, RecipeError, RecipeErrors
from memfactory.plugins import shipped
from memfactory.runs import RunFolder
from memfactory.train.prepare import prepare
from memfactory.train.run import train
from tests.forked import Server

QUICKSTART = shipped("recipes") / "memagent" / "quickstart.yaml"


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(forked: Server) -> Run:
    """`memfactory` with some arguments in a folder."""
    return forked.command


def errors_of(*overrides: str) -> str:
    with pytest.raises(RecipeErrors) as caught:
        prepare(QUICKSTART, overrides)
    return str(caught.value)


def test_all_recipe_errors_are_printed_together_with_the_nearest_key(run: Run, tmp_path: Path) -> None:
    result = run(
        *("train", "memagent/quickstart", "modle.name=x", "train.learning_rat=1", "train.num_generations=1"),
        *("eval.samples=many", "warmup.stepz=3", "train.max_steps=lots", "output_dir=out"),
        folder=tmp_path,
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    for expected in (
        *("modle: unknown key", "did you mean 'model'?", "train.learning_rat", "did you mean 'learning_rate'?"),
        *("train.num_generations: 1", "eval.samples", "warmup.stepz", "did you mean 'steps'?", "train.max_steps"),
    ):
        assert expected in result.stderr
    assert "6 errors" in result.stderr
    assert not (tmp_path / "out").exists()


def test_errors_of_agent_environment_and_rewards_come_in_one_message() -> None:
    text = errors_of(
        "agent.max_memory_token=3",
        "environment.chunkz=2",
        "rewards=[{name: answer.exact_mach}]",
        "train.loss_type=sapo",
        "train.output_dir=x",
    )
    for expected in ("max_memory_tokens", "'chunks'", "exact_match", "sapo", "train.output_dir"):
        assert expected in text


@pytest.mark.parametrize("size", [0, 1])
def test_a_group_needs_two_episodes(size: int) -> None:
    assert "nothing to compare" in errors_of(f"train.num_generations={size}")


def test_wrong_batch_arithmetic_is_the_recipes_fault(run: Run, tmp_path: Path) -> None:
    result = run(
        *("train", "memagent/quickstart", "--dry-run", "train.per_device_train_batch_size=12"), folder=tmp_path
    )
    assert result.returncode == 2
    assert "divisible" in result.stderr


def test_missing_recipe_file(run: Run, tmp_path: Path) -> None:
    result = run("train", "memagent/quickstrat", folder=tmp_path)
    assert result.returncode == 2
    assert "memagent/quickstart" in result.stderr


def test_recipe_that_is_not_yaml_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("name: x\nmodel: [unclosed\ntrain: 3\n")
    with pytest.raises(RecipeError, match=r"bad.yaml line \d"):
        prepare(path)


def test_data_errors_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"context": "a", "input": "b", "answers": ["c"]}\n{"context": \n')
    files = ("environment.name=files", f"environment.train={path}", f"environment.test={path}")
    plain = ("environment.train_tasks=null", "environment.test_tasks=null")
    with pytest.raises(DataError, match=r"train\.jsonl.*2"):
        prepare(QUICKSTART, [*files, *plain])


def test_overlap_of_train_and_test_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "all.jsonl"
    path.write_text('{"context": "a", "input": "b", "answers": ["c"]}\n')
    files = ("environment.name=files", f"environment.train={path}", f"environment.test={path}")
    with pytest.raises(DataError, match=r"overlap|both"):
        prepare(QUICKSTART, [*files, "environment.train_tasks=null", "environment.test_tasks=null"])


def test_a_signal_before_a_run_has_its_folder_leaves_what_lies_there(tmp_path: Path, monkeypatch) -> None:
    prepared = prepare(QUICKSTART, [f"output_dir={tmp_path / 'out'}"])
    other = prepare(QUICKSTART, [f"output_dir={tmp_path / 'out'}", "seed=5"])
    folder = RunFolder.open(tmp_path / "out", other.recipe, resume=False)
    folder.write_summary({"stopped": "finished"})
    before = folder.summary_file.read_bytes()
    monkeypatch.setattr("memfactory.train.run.load_tokenizer", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    summary = train(prepared)
    assert (summary["stopped"], summary["signal"]) == ("interrupted", "SIGTERM")
    assert folder.summary_file.read_bytes() == before


def test_a_finished_run_is_left_as_it_is(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    small = ("train.max_steps=1", "warmup.steps=1", "environment.train_tasks=16", "environment.test_tasks=2")
    first = run("train", "memagent/quickstart", f"output_dir={folder}", *small, folder=tmp_path)
    assert first.returncode == 0, first.stderr
    before = {path: path.read_bytes() for path in folder.glob("*.*")}
    again = run("train", "memagent/quickstart", f"output_dir={folder}", *small, folder=tmp_path)
    other = run("train", "memagent/quickstart", f"output_dir={folder}", *small, "seed=5", "--resume", folder=tmp_path)
    assert again.returncode == 0
    assert "already finished" in again.stdout
    assert "--start-over" in again.stdout
    assert other.returncode == 2
    assert "seed was 0, is 5" in other.stderr
    assert "--start-over" in other.stderr
    assert {path: path.read_bytes() for path in folder.glob("*.*")} == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        *sorted(
            str(path.relative_to(shipped("recipes")).with_suffix("")) for path in shipped("recipes").rglob("*.yaml")
        ),
        "memagent/quickstart-gated aggregate.gate=veto",  # under a veto nothing that a stand-in writes has a reward
    ],
)
def test_every_shipped_recipe_passes_the_dry_run(run: Run, tmp_path: Path, words: str) -> None:
    result = run("train", *words.split(), "--dry-run", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "dry run passed" in result.stdout
    found = re.search(r"optimizer step: (\d+) of (\d+) trainable tensors moved", result.stdout)
    assert found
    moved, trainable = int(found[1]), int(found[2])
    # the first update of an adapter moves one of its two factors: the other one is still multiplied by zero
    assert moved == trainable == 24 or 2 * moved == trainable
    assert list(tmp_path.iterdir()) == []


def test_evaluation_needs_the_test_split_alone() -> None:
    prepared = prepare(QUICKSTART, ["environment.train_tasks=null"], splits=(Split.TEST,))
    assert len(prepared.eval_tasks) == 256


def test_eval_without_a_checkpoint_in_the_folder_says_so(run: Run, tmp_path: Path) -> None:
    result = run("eval", "memagent/quickstart", "--checkpoint", str(tmp_path), folder=tmp_path)
    assert result.returncode == 1
    assert "no checkpoint" in result.stderr


BROKEN = """
from memfactory import Episode, reward

@reward
def sometimes(episode: Episode) -> float:
    return float(1 / (int(episode.task.id.rpartition("/")[2]) % 2))

@reward
def always(episode: Episode) -> float:
    raise KeyError("no such thing")
"""
SMALL = ("warmup.steps=5", "train.max_steps=2", "train.per_device_train_batch_size=32", "environment.test_tasks=2")


@pytest.mark.slow
def test_a_reward_that_fails_now_and_then_is_counted_and_the_run_goes_on(run: Run, tmp_path: Path) -> None:
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "broken.py").write_text(BROKEN)
    rewards = "rewards=[{name: answer.token_f1}, {name: broken.sometimes, weight: 0.1}]"
    result = run(
        "train",
        "memagent/quickstart",
        "output_dir=out",
        *SMALL,
        "rollout.max_failed_share=0.9",
        rewards,
        folder=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "out" / "rewards.jsonl").read_text().splitlines()]
    failing = next(line for line in lines if line["faults"]["count"])
    share = failing["dimensions"]["broken.sometimes"]["none_share"]
    assert 0 < share < 1
    assert failing["faults"]["count"]["reward"] == round(share * 32)
    assert "broken.py:6" in failing["faults"]["examples"][0]
    assert "ZeroDivisionError" in failing["faults"]["tracebacks"][0]
    # never a silent zero: an episode without a reward has none, and no advantage
    records = [json.loads(line) for line in (tmp_path / "out" / "episodes.jsonl").read_text().splitlines()]
    for record in (record for record in records if record["split"] == "train"):
        measured = record["scores"]["broken.sometimes"]["value"] is not None
        assert (record["reward"] is not None) == measured
        assert measured or record["advantage"] == 0


@pytest.mark.slow
def test_a_reward_that_always_fails_stops_the_run_with_its_name_and_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "broken.py").write_text(BROKEN)
    rewards = "rewards=[{name: answer.token_f1}, {name: broken.always, role: gate}]"
    result = run("train", "memagent/quickstart", "output_dir=out", *SMALL, rewards, folder=tmp_path)
    assert result.returncode == 1
    # the gate fails closed, so every episode has a reward; what stops the run is the function that fails
    assert "'broken.always' failed 32 times on 32 episodes" in result.stderr
    assert "broken.py:10" in result.stderr
    assert "no such thing" in result.stderr


@pytest.mark.slow
def test_evaluation_names_what_could_not_be_measured(run: Run, tmp_path: Path) -> None:
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "broken.py").write_text(BROKEN)
    rewards = "rewards=[{name: answer.token_f1}, {name: broken.always, weight: 0.5}]"
    result = run("eval", "memagent/quickstart", "environment.test_tasks=2", rewards, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "evals" / "quickstart" / "evaluation.json").read_text())["rows"]
    assert [row["faults"] for row in rows] == [{"reward": 2}, {"reward": 2}]
    assert [row["dimensions"]["broken.always"] for row in rows] == [None, None]
    assert "could not be measured: reward 'always'" in result.stdout
    assert "broken.py:10" in result.stdout


def test_a_recipe_without_an_outcome_is_refused() -> None:
    with pytest.raises(RecipeErrors, match="nothing says how an episode ended"):
        prepare(QUICKSTART, ["rewards=[{name: memory.churn}, {name: grounding.supported}]"], splits=())

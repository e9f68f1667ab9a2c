"""What the documentation shows runs: the example agent, the reward printed on the page, the script behind one."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from memfactory import Episode, ModelOutputError, StopReason, Task, Turn
from memfactory.environments import Split
from memfactory.plugins import resolve
from memfactory.reward.catalogue import load_dimension

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "docs/examples/careful_agent.py"
SMALL = ["warmup.steps=2", "environment.train_tasks=8", "environment.test_tasks=2", "train.max_steps=1"]


class Script:
    """A policy that says what it is told, and remembers what it was asked."""

    def __init__(self, *texts: str) -> None:
        self.texts = list(texts)
        self.prompts: list[str] = []

    async def generate(self, messages: Any, *, module: str, max_tokens: int) -> Turn:
        self.prompts.append(messages[0]["content"])
        return Turn(module, [1], [2], [0.0], self.texts.pop(0), StopReason.STOP, messages)

    def split(self, text: str, max_tokens: int) -> list[str]:
        return [text]


def run(policy: Script) -> Episode:
    agent = resolve(f"{EXAMPLE}:CarefulAgent")(answer_format="plain")
    task = resolve(f"{EXAMPLE}:FilteredFactWords")(chunks=3, targets=1, distractors=0).tasks(Split.TRAIN, 1)[0]
    return asyncio.run(agent.run(task, policy))


@pytest.mark.parametrize(("text", "matters"), [("keep", True), ("  Skip it.", False), ("<think>x</think>keep", True)])
def test_the_filter_reads_keep_and_skip(text: str, matters: bool) -> None:
    assert resolve(f"{EXAMPLE}:Filter")("{question} {chunk}").parse(text) is matters


@pytest.mark.parametrize("text", ["", "maybe keep", "<think>keep"])
def test_the_filter_refuses_anything_else(text: str) -> None:
    with pytest.raises(ModelOutputError):
        resolve(f"{EXAMPLE}:Filter")("{question} {chunk}").parse(text)


def test_a_skipped_chunk_leaves_the_memory_alone() -> None:
    policy = Script("skip", "keep", "a fact", "skip", "an answer")
    episode = run(policy)
    assert [turn.module for turn in episode.turns] == ["filter", "filter", "write", "filter", "answer"]
    assert [turn.chunk for turn in episode.turns] == [0, None, 1, 2, None]  # each chunk once, as retention needs it
    assert episode.memory == "a fact"
    assert "a fact" in policy.prompts[-1]
    assert episode.answer is not None
    assert episode.answer.text == "an answer"


def test_an_unreadable_filter_turn_is_marked_and_the_chunk_read() -> None:
    episode = run(Script("what?", "first", "skip", "skip", "an answer"))
    assert "neither" in episode.turns[0].error
    assert episode.memory == "first"


def test_the_teacher_speaks_the_agents_turns() -> None:
    environment = resolve(f"{EXAMPLE}:FilteredFactWords")(forget=0.0)
    for seed, task in enumerate(environment.tasks(Split.TRAIN, 20)):
        script = Script(*environment.teacher(task, seed))
        agent = resolve(f"{EXAMPLE}:CarefulAgent")(answer_format="plain", prompt="words")
        episode = asyncio.run(agent.run(task, script))
        assert script.texts == []  # nothing left over
        assert episode.answer is not None
        assert episode.answer.text == task.probes[0].answers[0]


def block(page: str, start: str) -> str:
    """The code block of `page` that begins with `start`."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)
    return next(text for text in blocks if text.startswith(start))


def test_the_reward_on_the_page_is_short_and_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = block("adding-a-module-and-agent.md", "from memfactory import Episode")
    assert len(code.splitlines()) <= 12
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards/my_reward.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    dimension = load_dimension("my_reward.short_memory")
    turn = Turn("write", [1], [2], [0.0], "x", StopReason.STOP)
    task = Task("t", (), ())
    assert dimension(Episode(task, [turn], memory="cat")).value == 1.0
    assert dimension(Episode(task, [turn], memory="a b c d e f g h i j")).value == 0.0
    assert dimension(Episode(task)).value is None


def in_checkout(*command: str) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environ, capture_output=True, text=True, check=False, timeout=600
    )


@pytest.mark.slow
def test_the_example_trains(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = in_checkout(
        *("-m", "memfactory.cli.main", "train", "docs/examples/careful.yaml", f"output_dir={folder}", *SMALL),
        *("train.per_device_train_batch_size=16", "train.eval_strategy=no"),
    )
    assert done.returncode == 0, done.stderr
    episodes = [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]
    trained = [episode for episode in episodes if episode["split"] == "train"]
    assert trained
    assert {turn["module"] for episode in trained for turn in episode["turns"]} == {"filter", "write", "answer"}


@pytest.mark.slow
def test_one_episode_is_shown_to_the_end() -> None:
    done = in_checkout("docs/show_episode.py")
    assert done.returncode == 0, done.stderr
    for part in ("TASK", "EPISODE 1", "ROWS", "MICRO-BATCHES", "LOSS"):
        assert part in done.stdout

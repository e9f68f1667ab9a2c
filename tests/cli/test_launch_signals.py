"""Real signals to a real `memfactory launch`: they reach the training, and nothing of it is left behind."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from memfactory.runs import RunFolder
from tests.forked import Forked, Server

pytestmark = pytest.mark.slow
SMALL = (
    *("warmup.steps=2", "environment.train_tasks=8", "environment.test_tasks=2", "train.max_steps=6"),
    *("train.per_device_train_batch_size=8", "train.eval_strategy=no", "output_dir=run"),
    f"agent.name={Path(__file__).with_name('held.py')}:Held",
)


def until(true: Callable[[], Any], what: str, seconds: float = 240) -> Any:
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
        time.sleep(0.05)
    return found


class Launched:
    """A `memfactory launch` in a folder, the training of which can be held in the middle of a step."""

    def __init__(self, server: Server, folder: Path, *options: str) -> None:
        self.folder, self.hold = folder, folder / "hold"
        for file in folder.glob("held-*"):
            file.unlink()
        arguments = ["launch", "memagent/quickstart", *SMALL, "--config", "cpu", *options]
        environment = {"MEMFACTORY_TEST_HELD": str(folder), "CUDA_VISIBLE_DEVICES": ""}
        self.run: Forked = server.start(arguments, folder=folder, environment=environment)
        self.launcher = psutil.Process(self.run.pid)

    def held(self, processes: int) -> list[psutil.Process]:
        """The training processes, once all of them wait in the middle of a step that is not the first."""
        until(lambda: "step    2/6" in self.output or self.ended, "the second step")
        self.hold.touch()
        until(lambda: len(self._waiting()) == processes or self.ended, "a step that is held")
        assert not self.ended, self.output[-3000:]
        return [psutil.Process(pid) for pid in self._waiting()]

    @property
    def output(self) -> str:
        return self.run.output if self.run.log.exists() else ""

    def _waiting(self) -> list[int]:
        return [int(file.name.removeprefix("held-")) for file in self.folder.glob("held-*")]

    @property
    def ended(self) -> bool:
        return not psutil.pid_exists(self.run.pid) or self.launcher.status() == psutil.STATUS_ZOMBIE

    def code(self, seconds: float = 120) -> int:
        until(lambda: self.ended, f"the end of the launcher; {self.output[-1500:]}", seconds)
        return self.run.wait()


def gone(processes: list[psutil.Process]) -> bool:
    return all(not p.is_running() or p.status() == psutil.STATUS_ZOMBIE for p in processes)


@pytest.fixture
def launched(forked: Server, tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    """Starts one; what is left of any at the end of the test is killed."""
    started: list[Launched] = []

    def start(*options: str) -> Launched:
        started.append(Launched(forked, tmp_path, *options))
        return started[-1]

    yield start
    for process in psutil.process_iter(["environ"]):
        if (process.info["environ"] or {}).get("MEMFACTORY_TEST_HELD") == str(tmp_path):
            process.kill()


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run" / "summary.json").read_text())


def test_one_process_saves_on_sigterm_goes_on_and_stops_at_once_on_a_second_ctrl_c(
    launched: Callable[..., Launched], tmp_path: Path
) -> None:
    first = launched("--processes", "1")
    [trainer] = first.held(1)
    assert trainer.pid == first.run.pid, "a process between signals and training"
    first.run.send(signal.SIGTERM)
    first.hold.unlink()
    assert first.code() == 143, first.output[-3000:]
    told = summary(tmp_path)
    assert (told["stopped"], told["signal"], told["processes"]) == ("interrupted", "SIGTERM", 1)
    checkpoint = RunFolder(tmp_path / "run").latest_checkpoint()
    assert checkpoint is not None
    assert checkpoint.name == f"checkpoint-{told['steps']}"

    again = launched("--processes", "1")
    until(lambda: "resuming from" in again.output, "going on")
    again.hold.touch()
    until(again._waiting, "a step that is held")
    again.run.send(signal.SIGINT)
    until(lambda: "Ctrl-C again: at once" in again.output, "the first Ctrl-C")
    again.run.send(signal.SIGINT)
    assert again.code() == 130
    assert "Traceback" not in again.output


def test_two_processes_stop_at_once_on_a_second_ctrl_c(launched: Callable[..., Launched], tmp_path: Path) -> None:
    run = launched("--processes", "2")
    ranks = run.held(2)
    run.run.send(signal.SIGINT)
    until(lambda: "Ctrl-C again: at once" in run.output, "the first Ctrl-C")
    time.sleep(0.7)  # sooner it would be the first one, that came twice
    assert not gone(ranks)
    run.run.send(signal.SIGINT)
    assert run.code() == 130
    assert gone(ranks)
    assert "Traceback" not in run.output
    assert RunFolder(tmp_path / "run").latest_checkpoint() is None, "at once is without a checkpoint"


def test_a_rank_that_is_killed_ends_the_launch_and_the_same_command_goes_on_to_the_same_end(
    launched: Callable[..., Launched], tmp_path: Path
) -> None:
    options = ("--processes", "2", "train.save_steps=1")
    whole = launched(*options, "output_dir=whole")
    assert whole.code(600) == 0, whole.output[-3000:]
    assert whole.output.count("before: ") == 2, "one process says it: at the evaluation, and at the end"

    first = launched(*options)
    ranks = first.held(2)
    ranks[1].kill()
    first.hold.unlink()
    assert first.code() == 128 + signal.SIGKILL, first.output[-3000:]
    assert gone(ranks)
    assert "was ended by SIGKILL" in first.output
    assert "another process of this run has ended" in first.output
    assert "Traceback" not in first.output
    assert RunFolder(tmp_path / "run").latest_checkpoint() is not None

    again = launched(*options)
    assert again.code(600) == 0, again.output[-3000:]
    assert "resuming from" in again.output
    for name in ("rewards.jsonl", "ledger.jsonl", "model/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name

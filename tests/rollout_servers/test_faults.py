"""vLLM processes are killed in the middle of a rollout: nothing is lost, nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from engines import engine_python
from faulty import FaultyServer
from vllm_serving import START, fresh_logprobs, prompts

from memfactory.errors import EngineError
from memfactory.policy.vllm_process import MARK, RolloutServer, end_leftovers, free_port
from memfactory.runs import RunFolder
from tests.forked import Server

ROOT = Path(__file__).parents[2]


def wait_until(condition, seconds: float = 180.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return False


def family(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def gone(processes: list[psutil.Process]) -> bool:
    return not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in processes)


def serve_rollouts(serving, recipe: Path) -> subprocess.Popen:
    """The command that users type."""
    command = [
        sys.executable,
        "-m",
        "memfactory.cli.main",
        "serve-rollouts",
        str(recipe),
        f"output_dir={recipe.parent}",
    ]
    environ = {"MEMFACTORY_VLLM_PYTHON": engine_python("vllm"), "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, f"output_dir={recipe.parent}", f"--port={serving.port}"],
        env=os.environ | environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def until_serving(process: subprocess.Popen) -> None:
    for line in process.stdout:
        if line.startswith("serving"):
            return
    pytest.fail(f"it ended with {process.wait()}")


def under_way(policy) -> int:
    """Turns that servers were asked for and have not answered. On a busy machine vLLM's own count of them comes when
    they are done."""
    return sum(place.under_way.total() for place in policy.pool._places)


@pytest.mark.slow
def test_a_killed_worker_engine_or_api_process_is_replaced_and_the_rollout_goes_on(make_serving, tmp_path):
    """And what comes of it is what would have come of a rollout that nothing disturbed."""
    serving = make_serving()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(serving.recipe().dump()))
    running = serve_rollouts(serving, recipe)
    until_serving(running)
    policy = serving.policy(outage=START)
    model = serving.model(1)
    policy.use(model, 0)
    turns = []

    async def everything():
        asked = (policy.generate(one, module="write", max_tokens=300) for one in prompts(32))
        return await asyncio.gather(*asked)

    rollout = threading.Thread(target=lambda: turns.extend(asyncio.run(everything())))
    rollout.start()
    for kind in ("VLLM::Worker", "VLLM::EngineCore", "api"):
        assert wait_until(lambda: under_way(policy)), "the rollout did not go on"
        time.sleep(0.2)
        processes = family(running)
        if kind == "api":
            (killed,) = (one for one in processes if one.ppid() == running.pid)
        else:
            (killed,) = (one for one in processes if one.name().startswith(kind))
        killed.send_signal(signal.SIGKILL)
        output, _ = running.communicate(timeout=90)
        assert running.returncode == 1
        assert "the vLLM server ended" in output
        assert wait_until(lambda processes=processes: gone(processes)), "processes of the killed server are left"
        assert rollout.is_alive(), f"it was over before {kind} was killed"
        running = serve_rollouts(serving, recipe)
        until_serving(running)
    rollout.join(timeout=120)
    assert len(turns) == 32
    for turn in turns:
        assert (torch.tensor(turn.logprobs) - fresh_logprobs(model, turn)).abs().max() < 1e-4
    disturbed, turns = turns, []
    policy.seed(0)  # as it was when the first batch began
    turns.extend(asyncio.run(everything()))
    assert [turn.completion_ids for turn in turns] == [turn.completion_ids for turn in disturbed]
    policy.close()

    processes = family(running)
    running.send_signal(signal.SIGTERM)
    output, _ = running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGTERM
    assert "stopped" in output
    assert wait_until(lambda: gone(processes)), "processes of the stopped server are left"


def trained_turns(folder: Path) -> list[Any]:
    """Of every logged training episode: step, task, and each turn's tokens."""
    return [
        (record["step"], record["task"]["id"], [turn["completion_ids"] for turn in record["turns"]])
        for record in RunFolder(folder).read_episodes("train")
    ]


@pytest.mark.slow
def test_trainer_and_server_killed_together_go_on_to_the_same_end(make_serving, tmp_path):
    """kill -9 in the middle of the third step's sampling; what is resumed from the second ends as uninterrupted."""
    serving = make_serving()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(serving.recipe().dump()))
    steps = ["train.max_steps=2", "train.save_steps=1", "train.per_device_train_batch_size=8"]
    command = [
        "train",
        "memagent/quickstart-vllm",
        *serving.training(outage=START),
        *steps,
        "rollout.log_episodes=100",
    ]
    trainers, processes, servers = Server(tmp_path), [], [serve_rollouts(serving, recipe)]
    first = servers[0]
    try:
        until_serving(first)
        trainers.run([*command, f"output_dir={tmp_path / 'whole'}"])
        whole = RunFolder(tmp_path / "whole")
        before = sum(len(record["turns"]) for record in whole.read_episodes() if record["split"] != "train")
        evaluated = before // 2  # the evaluation after training has as many turns
        done = sum(len(turns) for step, _, turns in trained_turns(tmp_path / "whole") if step <= 1)
        processes = family(first)
        api = next(one for one in processes if one.ppid() == first.pid)
        run = trainers.start(
            [*command, f"output_dir={tmp_path / 'killed'}"],
            at=f"memfactory.policy.vllm_server:VLLMServer.sample#{evaluated + done + 6}",
            environment={"MEMFACTORY_TEST_KILL_TOO": f"{first.pid} {api.pid}"},
        )
        assert run.wait() == -signal.SIGKILL, run.output
        first.wait(timeout=10)
        assert RunFolder(tmp_path / "killed").latest_checkpoint().name == "checkpoint-1"

        servers.append(second := serve_rollouts(serving, recipe))
        until_serving(second)
        assert wait_until(lambda: gone(processes)), "processes of the killed server are left"
        output = trainers.run([*command, f"output_dir={tmp_path / 'killed'}"])
        assert "resuming from" in output
        assert trained_turns(tmp_path / "killed") == trained_turns(tmp_path / "whole")
        one, other = (
            load_file(tmp_path / name / "model" / "adapter_model.safetensors") for name in ("whole", "killed")
        )
        assert one.keys() == other.keys()
        # on a CPU they were equal to the bit each time this was measured; a server that forms other batches after its
        # restart may round log-probs differently, so that is not asked for
        for name, value in one.items():
            assert (value - other[name]).norm() <= 1e-3 * value.norm(), name
        processes = family(second)
        second.send_signal(signal.SIGTERM)
        second.communicate(timeout=60)
        assert wait_until(lambda: gone(processes))
    finally:
        trainers.close()
        for server in servers:
            server.kill()
        for left in processes:
            with contextlib.suppress(psutil.Error):
                left.kill()


def test_a_server_that_has_our_port_is_not_taken_for_ours(tmp_path):
    """It was bound by another program between our look at it and vLLM's."""
    with FaultyServer() as other:
        ours = [sys.executable, "-c", "import sys, time; time.sleep(3); sys.exit('Error: address already in use')"]
        with (
            RolloutServer(ours, os.environ, other.url, tmp_path / "vllm.log") as server,
            pytest.raises(EngineError, match="ended with code 1: Error: address already in use") as caught,
        ):
            server.wait_healthy(30)
    assert f"see {tmp_path / 'vllm.log'}" in str(caught.value)


def test_a_server_that_does_not_answer_in_time_names_log_and_setting(tmp_path):
    silent = [sys.executable, "-c", "import time; print('loading', flush=True); time.sleep(600)"]
    with RolloutServer(silent, os.environ, "http://127.0.0.1:9", tmp_path / "vllm.log") as server:
        assert wait_until(lambda: "loading" in (tmp_path / "vllm.log").read_text())
        with pytest.raises(EngineError, match=r"did not answer within 0\.1 s: loading") as caught:
            server.wait_healthy(0.1, setting="rollout.vllm.outage")
    assert str(tmp_path / "vllm.log") in str(caught.value)
    assert "raise rollout.vllm.outage" in str(caught.value)


def test_ranks_are_told_different_ports():
    assert not {free_port(0) for _ in range(20)} & {free_port(1) for _ in range(20)}


WAITS = "import time; time.sleep(600.25)"
TREE = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {WAITS!r}]); {WAITS}"


def test_a_server_that_does_not_end_by_itself_is_killed_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr("memfactory.policy.vllm_process.GRACE", 0.5)
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + TREE
    with RolloutServer([sys.executable, "-c", deaf], os.environ, "http://127.0.0.1:9") as server:
        assert wait_until(lambda: len(family(server.process)) == 1)
        processes = [psutil.Process(server.process.pid), *family(server.process)]
    assert wait_until(lambda: gone(processes), 5)


@pytest.mark.skipif(sys.platform != "linux", reason="environments of other processes are read from /proc")
def test_what_a_killed_server_has_left_is_found_by_its_mark(tmp_path):
    own, other = (
        subprocess.Popen([sys.executable, "-c", TREE], env=os.environ | {MARK: f"{tmp_path}:{port}"})
        for port in (8000, 8001)
    )
    assert wait_until(lambda: family(own) and family(other))
    processes = [psutil.Process(own.pid), *family(own)]
    assert end_leftovers(f"{tmp_path}:8000") == 2
    assert wait_until(lambda: gone(processes), 5)
    assert not gone([psutil.Process(other.pid)]), "that of another port was ended"
    assert end_leftovers(f"{tmp_path}:8001") == 2
    assert own.wait() == other.wait() == -signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process that its parent has died")
def test_a_server_ends_with_the_one_who_started_it(tmp_path):
    starter = (
        "import os, sys, time\nfrom memfactory.policy.vllm_process import RolloutServer\n"
        f"server = RolloutServer([sys.executable, '-c', {TREE!r}], os.environ, 'http://127.0.0.1:9')\n"
        "server.__enter__(); print(server.process.pid, flush=True); time.sleep(600)"
    )
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", starter], stdout=subprocess.PIPE, text=True, env=environ)
    server = psutil.Process(int(process.stdout.readline()))
    process.kill()
    process.wait()
    assert wait_until(lambda: gone([server]), 10)
    for child in psutil.process_iter():  # what it started in turn is its own to end: vLLM's API process does
        with contextlib.suppress(psutil.Error):
            if WAITS in " ".join(child.cmdline()):
                child.kill()

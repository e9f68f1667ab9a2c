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

import psutil
import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from engines import engine_python
from vllm_serving import START, fresh_logprobs, prompts

from memfactory.policy.vllm_process import RolloutServer

ROOT = Path(__file__).parents[2]


def wait_until(condition, seconds: float = 60.0) -> bool:
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


@pytest.mark.slow
def test_a_killed_engine_is_replaced_and_the_rollout_goes_on(make_serving, tmp_path):
    serving = make_serving()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(serving.recipe().dump()))
    first = serve_rollouts(serving, recipe)
    until_serving(first)
    policy = serving.policy(outage=START)
    model = serving.model(1)
    policy.use(model, 0)
    turns = []

    async def everything():
        asked = (policy.generate(one, module="write", max_tokens=100) for one in prompts(64))
        return await asyncio.gather(*asked)

    rollout = threading.Thread(target=lambda: turns.extend(asyncio.run(everything())))
    rollout.start()
    time.sleep(0.5)  # some are answered, some are not
    processes = family(first)
    assert len(processes) >= 3, "API, engine, worker"
    engine = max(processes, key=lambda one: one.create_time())
    engine.send_signal(signal.SIGKILL)
    output, _ = first.communicate(timeout=90)
    assert first.returncode == 1
    assert "the vLLM server ended" in output
    assert wait_until(lambda: gone(processes)), "processes of the killed server are left"
    assert rollout.is_alive(), "it was over before the engine was killed"

    second = serve_rollouts(serving, recipe)
    until_serving(second)
    rollout.join(timeout=120)
    assert len(turns) == 64
    for turn in turns:
        assert (torch.tensor(turn.logprobs) - fresh_logprobs(model, turn)).abs().max() < 1e-4
    policy.close()

    processes = family(second)
    second.send_signal(signal.SIGTERM)
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 128 + signal.SIGTERM
    assert "stopped" in output
    assert wait_until(lambda: gone(processes)), "processes of the stopped server are left"


WAITS = "import time; time.sleep(600.25)"
TREE = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {WAITS!r}]); {WAITS}"


def test_a_server_that_does_not_end_by_itself_is_killed_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr("memfactory.policy.vllm_process.GRACE", 0.5)
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + TREE
    with RolloutServer([sys.executable, "-c", deaf], os.environ, "http://127.0.0.1:9") as server:
        assert wait_until(lambda: len(family(server.process)) == 1)
        processes = [psutil.Process(server.process.pid), *family(server.process)]
    assert wait_until(lambda: gone(processes), 5)


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

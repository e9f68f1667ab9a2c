"""`accelerate launch` without what it loses: signals reach one process and several, and torch prints no stack."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from memfactory.launch.accelerate_config import merged, read_config

TOLD = """
import json, os, sys
print(json.dumps({"pid": os.getpid(), "arguments": sys.argv[1:], "environ": dict(os.environ)}), flush=True)
"""


def configuration(tmp_path: Path, processes: int) -> Path:
    values = merged(
        read_config("cpu"), processes=processes, nodes=1, port=0, train={}, deepspeed=tmp_path / "deepspeed.json"
    )
    file = tmp_path / "accelerate.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def start(tmp_path: Path, processes: int, program: str, *arguments: str) -> subprocess.Popen[str]:
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, "-m", "memfactory.launch.start", "--config_file", configuration(tmp_path, processes)]
    command += [tmp_path / "program.py", *arguments]
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "TORCH"))}
    return subprocess.Popen(
        command,
        env=environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that nothing is left of it whatever happens
    )


def test_one_process_is_started_as_accelerate_would_and_nothing_stands_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = start(tmp_path, 1, TOLD, "train", "a recipe.yaml", "--resume")
    told, wrong = running.communicate(timeout=120)
    assert running.returncode == 0, wrong
    found = json.loads(told)
    assert found["pid"] == running.pid, "signals to the launcher would not reach the training"
    assert found["arguments"] == ["train", "a recipe.yaml", "--resume"]

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    asked = ["--config_file", str(tmp_path / "accelerate.yaml"), "program.py"]
    prepared = prepare_simple_launcher_cmd_env(_validate_launch_command(launch_command_parser().parse_args(asked))[0])
    names = [name for name in prepared[1] if name.startswith(("ACCELERATE_", "OMP_", "KMP_"))]
    assert len(names) > 5
    assert {name: found["environ"].get(name) for name in names} == {name: prepared[1][name] for name in names}


@pytest.mark.parametrize(
    ("ends", "code", "says"),
    [
        ("sys.exit(2)", 2, "the process of rank 1 ended with code 2"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 128 + signal.SIGKILL, "the process of rank 1 was ended by SIGKILL"),
    ],
)
def test_the_code_of_a_process_that_fails_is_that_of_the_launch(
    tmp_path: Path, ends: str, code: int, says: str
) -> None:
    program = f"import os, signal, sys, time\nif os.environ['RANK'] == '1':\n    {ends}\ntime.sleep(300)\n"
    running = start(tmp_path, 2, program)
    try:
        _, wrong = running.communicate(timeout=120)
    finally:
        running.poll() is None and os.killpg(running.pid, signal.SIGKILL)
    assert running.returncode == code, wrong
    assert says in wrong
    assert "Traceback" not in wrong


def answers(running: subprocess.Popen[str], lines: int) -> None:
    """Wait for so many lines of the processes."""
    assert running.stdout is not None
    for _ in range(lines):
        assert running.stdout.readline()


def test_the_warning_of_a_batch_system_reaches_the_processes(tmp_path: Path) -> None:
    program = "import signal, sys\nsignal.signal(signal.SIGUSR1, lambda *_: sys.exit(143))\n"
    running = start(tmp_path, 2, program + "print('ready', flush=True)\nsignal.pause()\n")
    try:
        answers(running, 2)
        running.send_signal(signal.SIGUSR1)
        _, wrong = running.communicate(timeout=120)
    finally:
        running.poll() is None and os.killpg(running.pid, signal.SIGKILL)
    assert running.returncode == 128 + signal.SIGUSR1, wrong
    assert "Traceback" not in wrong


def test_a_third_ctrl_c_leaves_nobody_behind(tmp_path: Path) -> None:
    program = r"""
import os, signal, time

def tell(*_):  # a whole line at once: torchrun starts Python with -u, where print() writes the end of a line by itself
    os.write(1, b"%d\n" % os.getpid())

for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, tell)  # deaf, like one that waits for a device
tell()
while True:
    time.sleep(0.1)
"""
    running = start(tmp_path, 2, program)
    assert running.stdout is not None
    processes = [psutil.Process(int(running.stdout.readline())) for _ in range(2)]
    try:
        for _ in range(2):
            running.send_signal(signal.SIGINT)
            answers(running, 2)
        assert all(process.is_running() for process in processes)
        running.send_signal(signal.SIGINT)
        _, wrong = running.communicate(timeout=120)
        assert running.returncode == 130
        assert "Traceback" not in wrong
        assert psutil.wait_procs(processes, timeout=60)[1] == []
    finally:
        for process in processes:
            process.is_running() and process.kill()

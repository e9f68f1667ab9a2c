"""Runs `memfactory` in forked processes: importing torch and TRL takes twelve seconds, and a fork has them.

A server process imports everything once and answers lines of JSON on its standard input: an order to start by forking
a child, which runs the `memfactory` command, and with the child's process id; an order to wait with how it ended.
A run can be told to kill itself at a place in the code: that is a real SIGKILL, which no handler sees. Processes that
`MEMFACTORY_TEST_KILL_TOO` names by number are killed in the same moment.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


class Forked:
    """A run that goes on in a forked process."""

    def __init__(self, server: Server, log: Path, pid: int) -> None:
        self.server, self.log, self.pid = server, log, pid
        self.code: int | None = None

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """The exit code; negative: the signal that ended it."""
        if self.code is None:
            self.code = self.server.ask({"wait": self.pid})
        return self.code

    @property
    def output(self) -> str:
        return self.log.read_text()


class Server:
    def __init__(self, folder: Path) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
        environment |= {"COLUMNS": "300", "TRL_EXPERIMENTAL_SILENCE": "1"}
        command = [sys.executable, "-m", "tests.forked"]
        self.folder, self.count = folder, 0
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, order: dict[str, Any]) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(
        self,
        arguments: list[str],
        *,
        at: str = "",
        do: str = "kill",
        largest: int = 0,
        environment: dict[str, str] | None = None,
        folder: Path | None = None,
        apart: bool = False,
        typed: str = "",
        terminal: str = "",
    ) -> Forked:
        """Begin a run.

        Args:
            at: ``module:function`` or ``module:Class.method``, and ``#N`` for its N-th call.
            do: what is to happen there: ``kill``, or the name of a signal that the run sends itself.
            largest: no file may be larger; 0 for no limit. Unit: bytes.
            environment: variables to add.
            folder: where the run works; absent: the checkout.
            apart: what it writes to standard error goes to a file of its own, the log's name with `.err`.
            typed: what stands on its standard input.
            terminal: a device to read from instead.
        """
        self.count += 1
        log = self.folder / f"log{self.count}.txt"
        order = {"arguments": arguments, "log": str(log), "at": at, "do": do, "largest": largest, "apart": apart}
        Path(f"{log}.in").write_text(typed, encoding="utf-8")
        order |= {"folder": str(folder or ROOT), "input": terminal or f"{log}.in"}
        return Forked(self, log, self.ask(order | {"environment": environment or {}}))

    def command(
        self, *arguments: str, folder: Path, environment: dict[str, str] | None = None, typed: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """`memfactory` with `arguments` in `folder`, to its end."""
        run = self.start(list(arguments), folder=folder, environment=environment, apart=True, typed=typed)
        code = run.wait()
        told, wrong = (Path(f"{run.log}{end}").read_text() for end in ("", ".err"))
        return subprocess.CompletedProcess(list(arguments), code, told, wrong)

    def run(self, arguments: list[str], code: int = 0, **options: Any) -> str:
        """A run to its end; its output."""
        run = self.start(arguments, **options)
        assert run.wait() == code, run.output[-3000:]
        return run.output

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def strike(at: str, do: str) -> None:
    """Let the process send itself a signal when it comes to a place."""
    name, _, number = at.partition("#")
    module, _, path = name.partition(":")
    *outer, last = path.split(".")
    owner = importlib.import_module(module)
    for part in outer:
        owner = getattr(owner, part)
    original, left = getattr(owner, last), [int(number or 1)]

    def instead(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            for other in os.environ.get("MEMFACTORY_TEST_KILL_TOO", "").split():
                os.kill(int(other), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL if do == "kill" else signal.Signals[do])
        return original(*args, **kwargs)

    setattr(owner, last, instead)


def child(order: dict[str, Any]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born without
    os.dup2(os.open(order["input"], os.O_RDONLY), 0)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(os.open(order["log"] + ".err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if order["apart"] else log, 2)
    os.chdir(order["folder"])
    sys.path[0] = order["folder"]
    code: Any = 0
    os.environ.update(order["environment"])
    try:
        if order["largest"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (order["largest"], order["largest"]))
        if order["at"]:
            strike(order["at"], order["do"])
        from memfactory.cli.main import main

        sys.argv = ["memfactory", *order["arguments"]]
        main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else bool(code))


def serve() -> None:
    import torch

    import memfactory.cli.main  # sets no thread going
    import memfactory.train.run  # noqa: F401

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            child(order)
        print(pid, flush=True)


if __name__ == "__main__":
    serve()

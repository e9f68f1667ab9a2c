"""``python -m memfactory.launch.start ...``: ``accelerate launch ...``, in which signals reach the training processes.

Accelerate's own command loses them in two places. One process it starts with Popen and waits: SIGTERM and Ctrl-C end
the launcher, and the training goes on without it. Several it hands to torchrun, which passes a signal on and then ends
with a traceback of its own; and SIGUSR1 it does not know at all. Everything else here is accelerate.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress

import psutil

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""What torchrun passes on to its processes; SIGUSR1 is not among those it knows."""
SHUTDOWN_SECONDS = 600
"""How long processes may take to finish their step and save after a signal, before torchrun ends them."""


def become(command: Sequence[str], environ: dict[str, str]) -> None:
    """Become `command`: signals go to it, and its exit code is ours."""
    if os.name == "nt":  # exec on Windows returns to the shell before the command has ended
        sys.exit(subprocess.call(list(command), env=environ))
    os.execve(command[0], list(command), environ)


def _one_process(args: Namespace) -> None:
    """In the place of accelerate's `simple_launcher`: the same command and environment, without a process between."""
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    become(*prepare_simple_launcher_cmd_env(args))


def end_processes() -> None:
    """Kill what is left of the processes below this one: torchrun gives up waiting for them at its third signal."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.kill()


def main(arguments: Sequence[str] | None = None) -> int:
    """`accelerate launch` with `arguments`.

    Returns:
        The exit code: 128 and the signal that ended it, as a shell counts, or that of the process that failed first.
    """
    from accelerate.commands import launch
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    launch.simple_launcher = _one_process
    args = launch.launch_command_parser().parse_args(arguments)
    args.signals_to_handle = SIGNALS  # torchrun's option, which accelerate has no name for and passes on
    try:
        launch.launch_command(args)
    except SignalException as ended:
        end_processes()
        return 128 + int(ended.sigval)
    except ChildFailedError as failed:  # each said itself what was wrong; torch would print its own stack on top
        codes = {rank: failure.exitcode for rank, failure in sorted(failed.failures.items())}
        for rank, code in codes.items():
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            print(f"the process of rank {rank} {how}", file=sys.stderr)
        first = failed.get_first_failure()[1].exitcode
        return 128 - first if first < 0 else first
    return 0


if __name__ == "__main__":
    sys.exit(main())

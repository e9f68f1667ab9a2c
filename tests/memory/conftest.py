"""A real PostgreSQL server for the tests that need one: a cluster of its own in a temporary folder, no network."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import pytest

FOLDER, REQUIRED = "MEMFACTORY_POSTGRES_BIN", "MEMFACTORY_REQUIRE_POSTGRES"
"""Which programs to use, and whether a server that cannot be had is a failure rather than a skip."""


def programs() -> Path | None:
    """The folder with initdb and pg_ctl: as told, on PATH, of Debian's packages, or of the package `pgserver`."""
    if os.environ.get(FOLDER):
        return Path(os.environ[FOLDER])
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: (len(path.parts[-2]), path))
    if (package := find_spec("pgserver")) and package.origin:
        folders.insert(0, Path(package.origin).parent / "pginstall" / "bin")
    return next((folder for folder in reversed(folders) if (folder / "initdb").exists()), None)


@dataclass
class Server:
    """A running server, and what starts and stops it."""

    bin: Path
    folder: Path

    @property
    def dsn(self) -> str:
        return f"host={self.folder} user=memfactory dbname=postgres"

    @property
    def process(self) -> int:
        return int((self.folder / "data" / "postmaster.pid").read_text().split()[0])

    def call(self, program: str, *arguments: str) -> None:
        user: dict[str, Any] = {}
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            account = _account()
            user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        command = [str(self.bin / program), "-D", str(self.folder / "data"), *arguments]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=self.folder, timeout=120, **user
        )
        if done.returncode:
            raise OSError(f"{program}: {done.stdout}{done.stderr}")

    def start(self) -> None:
        # fsync: these tests kill processes, they do not cut the power
        options = f"-k {self.folder} -c listen_addresses= -c fsync=off -c shared_buffers=16MB -c max_connections=60"
        self.call("pg_ctl", "start", "-w", "-l", str(self.folder / "log"), "-o", options)

    def crash(self) -> None:
        """Kill the server without a chance to tidy up, and wait until it is gone."""
        process = self.process
        os.kill(process, signal.SIGKILL)
        # its children end once they see that it is gone; until then a new one refuses to start
        end = time.monotonic() + 30
        while any(_group(path) == process for path in Path("/proc").glob("[0-9]*")) and time.monotonic() < end:
            time.sleep(0.05)

    def stop(self, mode: str = "fast") -> None:
        self.call("pg_ctl", "stop", "-w", "-m", mode)


def _group(process: Path) -> int | None:
    """The process group of a process; None where it has ended."""
    try:
        state, _, group, *_ = (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else int(group)


def _account() -> pwd.struct_passwd:
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise OSError("there is neither a user postgres nor nobody to run the server as")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Server]:
    pytest.importorskip("psycopg_pool", reason="psycopg is not installed: pip install 'memfactory[postgres]'")
    unavailable: Callable[[str], object] = pytest.fail if os.environ.get(REQUIRED) else pytest.skip
    bin = programs()
    if bin is None:
        unavailable("PostgreSQL is not installed: apt-get install postgresql, or pip install pgserver")
    assert bin is not None
    # not below tmp_path: that is closed to other users, and a socket's path ends at 107 bytes
    folder = Path(tempfile.mkdtemp(prefix="memfactory-"))
    server = Server(bin, folder)
    try:
        try:
            if os.geteuid() == 0:
                os.chown(folder, _account().pw_uid, _account().pw_gid)
            server.call("initdb", "-U", "memfactory", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
            server.start()
        except OSError as error:
            unavailable(f"PostgreSQL in {bin} does not start: {error}")
        yield server
        server.stop("immediate")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def example(name: str) -> str:
    """The block of Python in the documentation of banks that mentions `name`."""
    page = (Path(__file__).parents[2] / "docs" / "memory-bank.md").read_text()
    (block,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.S) if name in block)
    return str(block)


@pytest.fixture
def documented() -> Callable[[str], str]:
    return example


_NUMBERS = count(1)


@pytest.fixture
def postgres_schema(postgres_server: Server) -> str:
    """The name of a schema that no other test uses."""
    return f"test {next(_NUMBERS)}"  # a blank, so that a name that is not quoted fails

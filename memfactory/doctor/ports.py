"""Ports of this machine: free, or who has them."""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import urlsplit

from memfactory.doctor.check import Check, Level
from memfactory.launch.ports import port_taken

_PATIENCE = 3.0
"""Seconds for an answer of whoever listens."""


class Answer(StrEnum):
    """What is at an address."""

    NOBODY = "nobody"
    SILENT = "silent"
    """The port is taken and takes no connection: a server that is starting, or one that is stuck."""
    SERVER = "server"
    """It lists models as vLLM does; which ones is another question."""
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Address:
    """Of a rollout server."""

    url: str
    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> Address:
        parts = urlsplit(url)
        return cls(url, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))

    @property
    def local(self) -> bool:
        """Whether a server at this address runs on this machine."""
        return self.host in ("localhost", "127.0.0.1", "0.0.0.0", "::1", socket.gethostname())


def look(address: Address) -> Answer:
    """Who answers there."""
    try:
        with socket.create_connection((address.host, address.port), timeout=_PATIENCE):
            pass
    except OSError:
        taken = address.local and port_taken(address.port, "127.0.0.1")
        return Answer.SILENT if taken else Answer.NOBODY
    import httpx

    with contextlib.suppress(httpx.HTTPError, httpx.InvalidURL, ValueError):
        reply = httpx.get(f"{address.url.rstrip('/')}/v1/models", timeout=_PATIENCE, trust_env=not address.local)
        data = reply.json()
        # with a key it may refuse to list them: the trainer sends one
        if reply.status_code == 401 or (isinstance(data, dict) and isinstance(data.get("data"), list)):
            return Answer.SERVER
    return Answer.OTHER


def owner(port: int) -> str:
    """The process that listens on `port` of this machine: ``python (pid 41)``; empty where it cannot be told."""
    import psutil

    with contextlib.suppress(psutil.Error, OSError):  # macOS tells only the super-user
        for connection in psutil.net_connections("inet"):
            here = connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
            if here and connection.pid is not None:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    return ""


def free_near(port: int) -> int:
    """The next port from `port` on that nobody has."""
    return next((other for other in range(port + 1, port + 100) if not port_taken(other)), port + 1)


def check_main_port(port: int) -> Check:
    """The port where the processes of a launch meet.

    Args:
        port: 0 for any.
    """
    name = "port of the processes"
    if port == 0:
        return Check(name, "any free one")
    if not port_taken(port):
        return Check(name, f"{port} is free")
    who = owner(port) or "another program"
    fix = f"memfactory launch --port {free_near(port)}, the same on every node; --port 0 takes a free one"
    return Check(name, f"{port} is taken by {who}", "free", Level.WRONG, fix)

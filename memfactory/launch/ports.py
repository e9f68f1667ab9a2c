"""Whether a port of this machine is free."""

from __future__ import annotations

import socket


def port_taken(port: int, host: str = "") -> bool:
    """Whether something listens on a port of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False

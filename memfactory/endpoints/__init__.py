"""Talking to OpenAI-compatible endpoints: what judges and frozen policies share.

:class:`memfactory.endpoints.chat.ChatEndpoint` needs the extra ``judge``; nothing here imports it before it is used.
"""

from __future__ import annotations

from urllib.parse import urlsplit


def is_address(url: str) -> bool:
    """Whether `url` names a server, e.g. ``http://localhost:8000/v1``."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets or port
        return False

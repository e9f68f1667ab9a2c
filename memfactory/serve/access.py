"""Who may ask, and how much at once."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import math
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from memfactory.errors import DataError, RecipeError
from memfactory.recipe import read_yaml
from memfactory.serve.refusals import Refused

LOCAL_USER = "local"
"""Who asks where there are no tokens."""
SHORTEST = 16
"""Characters of a token, at least."""
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class Tokens:
    """The users of a server, by the hashes of their tokens. Without any, there is one local user."""

    users: Mapping[str, bytes] = field(default_factory=dict)
    """User -> SHA-256 of the token."""

    @classmethod
    def read(cls, path: Path) -> Tokens:
        """From a file (YAML or JSON) of lines ``user: token``.

        Raises:
            RecipeError: the file is not YAML.
            DataError: there is none, or it holds something else, or a token is short, or belongs to two users.
        """
        if not path.is_file():
            raise DataError(
                f"--tokens {path}", "there is no such file", "write one, with a line `user: token` for each"
            )
        users: dict[str, bytes] = {}
        for user, token in read_yaml(path).items():
            if not isinstance(token, str) or len(token) < SHORTEST or not token.isascii() or not str(user).strip():
                raise DataError(
                    f"{path}: the token of {str(user)!r}",
                    f"a token is a text of at least {SHORTEST} ASCII characters",
                    'python -c "import secrets; print(secrets.token_urlsafe(24))"',
                )
            digest = _digest(token)
            if digest in users.values():
                raise DataError(
                    f"{path}: the token of {str(user)!r}", "another user has the same", "give each its own"
                )
            users[str(user)] = digest
        if not users:
            raise DataError(f"{path}: no tokens", "a line is `user: token`", "add a user")
        return cls(users)

    def user(self, headers: Mapping[str, str]) -> str:
        """Who sends a request with these headers.

        Raises:
            Refused: nobody who is known.
        """
        if not self.users:
            # a page in the browser can reach this machine under a name of its own (DNS rebinding)
            host = headers.get("host", "")
            if host.rpartition(":")[0] not in _LOCAL_HOSTS and host not in _LOCAL_HOSTS:
                raise Refused(403, "without tokens this server answers to localhost alone", "forbidden")
            return LOCAL_USER
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = _digest(token.strip()) if scheme.lower() == "bearer" else b""
        # all of them are compared, whichever fits: the time says nothing
        found = [user for user, digest in self.users.items() if hmac.compare_digest(digest, given)]
        if not found:
            raise Refused(401, "a valid token is needed: Authorization: Bearer TOKEN", "invalid_api_key")
        return found[0]


def check_reachable(host: str, tokens: Tokens) -> None:
    """Without tokens only this machine may ask.

    Raises:
        RecipeError: `host` is seen by others, and there are no tokens.
    """
    if tokens.users or host == "localhost":
        return
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if not local:
        raise RecipeError(
            f"--host {host}",
            "other machines could ask, and read what was told, without a token",
            "--tokens FILE with lines `user: token`, or --host 127.0.0.1",
        )


@dataclass
class Limits:
    """How much each user may ask.

    Args:
        at_once: requests that are not answered yet.
        per_minute: requests in any 60 seconds.
    """

    at_once: int
    per_minute: int
    _running: Counter[str] = field(default_factory=Counter)
    _recent: dict[str, deque[float]] = field(default_factory=dict)

    @contextmanager
    def admit(self, user: str) -> Iterator[None]:
        """Inside, a request of `user` is under way.

        Raises:
            Refused: it is one too many; says when to come again.
        """
        now, recent = time.monotonic(), self._recent.setdefault(user, deque())
        while recent and recent[0] <= now - 60:
            recent.popleft()
        if len(recent) >= self.per_minute:
            wait = math.ceil(recent[0] + 60 - now)
            why = f"more than {self.per_minute} requests in a minute; try again in {wait} s"
            raise Refused(429, why, "rate_limit_exceeded", retry_after=wait)
        if self._running[user] >= self.at_once:
            why = f"{self.at_once} requests of this user are under way; wait for one of them"
            raise Refused(429, why, "rate_limit_exceeded", retry_after=1)
        recent.append(now)
        self._running[user] += 1
        try:
            yield
        finally:
            self._running[user] -= 1


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()

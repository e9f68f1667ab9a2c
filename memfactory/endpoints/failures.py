"""How a request can fail, and which failures are worth another attempt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from enum import StrEnum
from time import time
from typing import Any

import httpx


class Failure(StrEnum):
    """Class of a failed request, as counted in the metrics."""

    RATE_LIMIT = "rate_limit"
    """429."""
    TIMEOUT = "timeout"
    """408, or no connection in time."""
    SERVER = "server"
    """5xx."""
    CONNECTION = "connection"
    """Refused, reset, or no such host."""
    CUT = "cut"
    """The reply ended before its end."""
    GARBAGE = "garbage"
    """The reply is no chat completion."""
    VERDICT = "verdict"
    """A chat completion, but no verdict of the rubric."""
    EMPTY = "empty"
    """A chat completion without a text."""
    REFUSED = "refused"
    """Any other status: asking again would change nothing."""
    ADDRESS = "address"
    """No request can be made of the address or the key."""
    DEADLINE = "deadline"
    """The time for this reply is over."""


FINAL = (Failure.REFUSED, Failure.ADDRESS, Failure.DEADLINE)
UNUSABLE = (Failure.VERDICT, Failure.EMPTY)
"""The server did its part and the model did not: a second attempt is worth it, a third is not."""


@dataclass(frozen=True, slots=True)
class Fixes:
    """What the reader can do about a failure, in the words of the recipe's section that asks."""

    kinds: Mapping[Failure, str]
    statuses: Mapping[int, str] = field(default_factory=dict)
    """Of `Failure.REFUSED`, by HTTP status; where it says nothing, `kinds` does."""

    def of(self, failed: RequestFailed) -> str:
        return failed.fix or self.statuses.get(failed.status or 0) or self.kinds.get(failed.kind, "")


class RequestFailed(Exception):
    """One request came to nothing.

    Args:
        kind: its class.
        why: what happened, for the message.
        fix: what the reader can do, where that is the same whoever asks.
        retry_after: seconds the server asked to wait.
        status: HTTP status of a request that was refused.
    """

    def __init__(
        self, kind: Failure, why: str, fix: str = "", retry_after: float = 0.0, status: int | None = None
    ) -> None:
        self.kind, self.why, self.fix = kind, why, fix
        self.retry_after, self.status = retry_after, status
        super().__init__(why)


def of_status(response: httpx.Response) -> RequestFailed:
    """The failure that a status other than 2xx stands for."""
    status = response.status_code
    why = f"the server answered {status} {response.reason_phrase}".rstrip()
    return _of_code(status, why, response.text, retry_after(response))


def of_error(error: Any, response: httpx.Response) -> RequestFailed:
    """The failure that an ``error`` in the body of a reply stands for, whatever the reply's status says.

    Routers that began to answer before the model behind them failed can say so only there.
    """
    code = error.get("code") if isinstance(error, dict) else None
    text = str(error.get("message") or error) if isinstance(error, dict) else str(error)
    status = code if isinstance(code, int) and 400 <= code < 600 else 500
    why = f"the server answered {response.status_code} with an error" + (f" {code}" if code else "")
    return _of_code(status, why, text, retry_after(response))


def _of_code(status: int, why: str, text: str, pause: float) -> RequestFailed:
    # a server may quote the key back in these two
    said = "" if status in (401, 403) else " ".join(text.split())[:200]
    why += f": {said}" if said else ""
    if status == 429 and "insufficient_quota" in text:
        return RequestFailed(Failure.REFUSED, why, "the account behind the key has no credit left")
    why += f" (asking to wait {pause:g} s)" if pause else ""
    if status == 429:
        return RequestFailed(Failure.RATE_LIMIT, why, retry_after=pause)
    if status == 408:
        return RequestFailed(Failure.TIMEOUT, why, retry_after=pause)
    if status >= 500:
        return RequestFailed(Failure.SERVER, why, retry_after=pause)
    return RequestFailed(Failure.REFUSED, why, status=status)


def of_transport(error: Exception) -> RequestFailed:
    """The failure that an exception of httpx stands for."""
    why = f"{type(error).__name__}: {error}".rstrip(": ")
    if isinstance(error, httpx.InvalidURL | httpx.UnsupportedProtocol | httpx.LocalProtocolError):
        return RequestFailed(Failure.ADDRESS, why)
    if isinstance(error, httpx.TimeoutException):
        return RequestFailed(Failure.TIMEOUT, why)
    if isinstance(error, httpx.RemoteProtocolError | httpx.ReadError):
        return RequestFailed(Failure.CUT, why)
    if isinstance(error, httpx.DecodingError):
        return RequestFailed(Failure.GARBAGE, why)
    return RequestFailed(Failure.CONNECTION, why)


def retry_after(response: httpx.Response) -> float:
    """Seconds of the Retry-After header (a number or a date), 0 where there is none that can be read."""
    value = response.headers.get("retry-after", "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time())
    except ValueError:
        return 0.0

"""How a request can fail, which failures are worth another attempt, and what the reader can do about the rest."""

from __future__ import annotations

from email.utils import parsedate_to_datetime
from enum import StrEnum
from time import time

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
    REFUSED = "refused"
    """Any other status: asking again would change nothing."""
    DEADLINE = "deadline"
    """The time for this verdict is over."""


FINAL = (Failure.REFUSED, Failure.DEADLINE)

FIXES = {
    Failure.RATE_LIMIT: "lower judge.concurrency, or set judge.requests_per_minute and judge.tokens_per_minute",
    Failure.TIMEOUT: "raise judge.deadline, or lower judge.concurrency",
    Failure.SERVER: "look at the log of the judge's server",
    Failure.CONNECTION: "check judge.base_url and that its server runs",
    Failure.CUT: "look at the log of the judge's server, or of the proxy before it",
    Failure.GARBAGE: "judge.base_url must be an OpenAI-compatible endpoint, e.g. http://localhost:8000/v1",
    Failure.VERDICT: "use a model and server that support structured output, or raise judge.max_tokens",
    Failure.REFUSED: "see the server's message",
    Failure.DEADLINE: "raise judge.deadline, or lower judge.concurrency",
}

STATUS_FIXES = {
    400: "check judge.model, judge.max_tokens and that the server supports response_format json_schema",
    401: "put a valid key into the environment variable named by judge.api_key_env",
    403: "the key may not use this model: check judge.model and judge.api_key_env",
    404: "check judge.base_url (it usually ends in /v1) and judge.model",
    413: "the text to grade is too long for the server",
    422: "check judge.model and that the server supports response_format json_schema",
}


class RequestFailed(Exception):
    """One request came to nothing.

    Args:
        kind: its class.
        why: what happened, for the message.
        fix: what the reader can do; empty takes the class's usual one.
        retry_after: seconds the server asked to wait.
    """

    def __init__(self, kind: Failure, why: str, fix: str = "", retry_after: float = 0.0) -> None:
        self.kind, self.why, self.fix = kind, why, fix or FIXES[kind]
        self.retry_after = retry_after
        super().__init__(why)


def of_status(response: httpx.Response) -> RequestFailed:
    """The failure that a status other than 2xx stands for."""
    status = response.status_code
    # a server may quote the key back in these two
    said = "" if status in (401, 403) else " ".join(response.text.split())[:200]
    why = f"the server answered {status} {response.reason_phrase}".rstrip() + (f": {said}" if said else "")
    if status == 429 and "insufficient_quota" in response.text:
        return RequestFailed(Failure.REFUSED, why, "the account behind the key has no credit left")
    pause = retry_after(response)
    why += f" (asking to wait {pause:g} s)" if pause else ""
    if status == 429:
        return RequestFailed(Failure.RATE_LIMIT, why, retry_after=pause)
    if status == 408:
        return RequestFailed(Failure.TIMEOUT, why, retry_after=pause)
    if status >= 500:
        return RequestFailed(Failure.SERVER, why, retry_after=pause)
    return RequestFailed(Failure.REFUSED, why, STATUS_FIXES.get(status, ""))


def of_transport(error: Exception) -> RequestFailed:
    """The failure that an exception of httpx stands for."""
    why = f"{type(error).__name__}: {error}".rstrip(": ")
    if isinstance(error, httpx.InvalidURL | httpx.UnsupportedProtocol | httpx.LocalProtocolError):
        return RequestFailed(Failure.REFUSED, why, "check judge.base_url and the key in judge.api_key_env")
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

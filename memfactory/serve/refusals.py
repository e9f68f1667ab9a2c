"""What a server says instead of an answer, in the form of OpenAI's errors."""

from __future__ import annotations

import logging
from typing import Any

from memfactory.errors import DataError, MemFactoryError, ServiceError, StoreError, TooLongError

LOG = logging.getLogger("memfactory.serve")

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class Refused(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        message: what is wrong and what to do; shown to whoever asked.
        code: a word that programs can look for.
        param: the field of the request that is wrong.
        retry_after: seconds after which it may be tried again.
    """

    def __init__(
        self, status: int, message: str, code: str, *, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = {"Retry-After": str(retry_after)} if retry_after is not None else {}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def refusal_of(error: BaseException) -> Refused:
    """What is said of `error`. The faults of this side are told in the log alone: they name its files and options."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, TooLongError):
        return Refused(400, f"{error.what}: {error.why}; send it in smaller messages", "context_length_exceeded")
    if isinstance(error, DataError):
        return Refused(400, f"{error.what}: {error.why}", "invalid_conversation")
    if isinstance(error, TimeoutError):
        return Refused(504, "the agent took longer than this server allows; nothing of it was kept", "timeout")
    if isinstance(error, MemFactoryError):
        LOG.error("%s", error)
        if isinstance(error, ServiceError):
            return Refused(502, "an endpoint behind the agent did not answer; nothing was kept", "bad_gateway")
        if isinstance(error, StoreError):
            return Refused(503, "the memory could not be read or written; nothing was kept", "memory_unavailable")
    else:
        LOG.error("a request failed", exc_info=error)
    return Refused(500, "the agent failed; the log of the server says why", "internal_error")

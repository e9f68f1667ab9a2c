"""A headless Chromium that is driven over its DevTools protocol, through a pipe: no port, no further package."""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
)
NO_NETWORK = ("--host-resolver-rules=MAP * ~NOTFOUND", "--proxy-server=127.0.0.1:9", "--proxy-bypass-list=<-loopback>")
"""No name is found, and whatever is asked for goes to a proxy at a port where nobody listens."""


class Tab:
    """A page in a browser of its own, closed with the `with` block.

    Args:
        program: Chromium's, or one like it.
        profile: a folder for its files; a new one for a browser that remembers nothing.
        timeout: most seconds for any one answer.
    """

    def __init__(self, program: str, profile: Path, *flags: str, timeout: float = 120) -> None:
        self.requests: list[str] = []
        """Addresses of everything that the page has asked for, itself included."""
        self._timeout, self._count, self._rest = timeout, 0, b""
        theirs, self._to = os.pipe()
        self._from, answers = os.pipe()
        # the browser reads from descriptor 3 and writes to 4
        shell = ["bash", "-c", f'exec "$@" 3<&{theirs} 4>&{answers}', "chromium"]
        command = [
            *shell,
            program,
            *FLAGS,
            *flags,
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
            "about:blank",
        ]
        self._process = subprocess.Popen(
            command, pass_fds=(theirs, answers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(theirs)
        os.close(answers)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime"):
            self.call(f"{domain}.enable")

    _session = ""

    def __enter__(self) -> Tab:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The answer of the browser to one command.

        Raises:
            RuntimeError: it refused, or the browser is gone, or took too long.
        """
        self._count += 1
        asked = {"id": self._count, "method": method, "params": params}
        asked |= {"sessionId": self._session} if self._session else {}
        os.write(self._to, json.dumps(asked).encode() + b"\0")
        end = time.monotonic() + self._timeout
        while True:
            message = self._next(end - time.monotonic(), method)
            if message.get("method") == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
            elif message.get("method") == "Network.webSocketCreated":
                self.requests.append(message["params"]["url"])
            if message.get("id") == self._count:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                found: dict[str, Any] = message["result"]
                return found

    def evaluate(self, script: str) -> Any:
        """The value of an expression on the page, awaited. The page's own policy does not hold for it."""
        told = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in told:
            details = told["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description") or details["text"])
        return told["result"].get("value")

    def open(self, address: str, until: str = "document.readyState === 'complete'") -> float:
        """Open a page; seconds until the expression `until` holds on it and it has been painted."""
        start = time.perf_counter()
        self.call("Page.navigate", url=address)
        while True:
            try:
                if self.evaluate(f"location.href !== 'about:blank' && ({until})"):
                    break
            except RuntimeError as error:  # the old document went away, or the new one has not run its script
                if time.perf_counter() - start > self._timeout:
                    raise RuntimeError(f"{address} did not open: {error}") from error
            time.sleep(0.005)
        self.evaluate(PAINTED)
        return time.perf_counter() - start

    def _next(self, seconds: float, method: str) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise RuntimeError(f"{method}: no answer in {self._timeout:.0f} s")
            piece = os.read(self._from, 1 << 20)
            if not piece:
                raise RuntimeError(f"{method}: the browser ended")
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message


PAINTED = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))"
"""Resolves when what the page is now has been painted."""

OPENED = "document.querySelector('#episode .turn') !== null"
"""Whether the report shows an episode."""


def acting(**values: str) -> str:
    """An expression that sets selects and inputs of the report, one after another, in the place of a user. Its value:
    the milliseconds until the list is there, the first episode stands open, and both are painted."""
    lines = [
        f"{{ const control = document.getElementById({name!r}); control.value = {value!r};"
        "control.dispatchEvent(new Event(control.tagName === 'SELECT' ? 'change' : 'input')); }"
        for name, value in values.items()
    ]
    shown = "if (wanted) { await episodeOf(wanted); }"
    body = f"{' '.join(lines)} {shown} await {PAINTED};"
    return f"(async () => {{ const start = performance.now(); {body} return performance.now() - start; }})()"

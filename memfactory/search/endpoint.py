"""`EndpointEmbedder`: vectors from an OpenAI-compatible ``/embeddings`` (vLLM, llama.cpp, TEI, Ollama, OpenAI ...)."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from memfactory.errors import EngineError, ServiceError
from memfactory.loops import BackgroundLoop

PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""HTTP states that may be gone at the next try."""


class EndpointEmbedder:
    """Asks an endpoint, and again while what fails may pass and the deadline allows.

    Args:
        base_url: up to and with the version, e.g. ``http://localhost:8000/v1``.
        model: the name the endpoint serves it under.
        api_key_env: the environment variable that holds the key; empty sends none. Keys are never in a recipe.
        deadline: seconds for one call of :meth:`embed`, all its batches and tries together.
        batch: texts a request.
    """

    def __init__(
        self, base_url: str, model: str, api_key_env: str = "", deadline: float = 30.0, batch: int = 64
    ) -> None:
        try:
            import httpx
        except ImportError as error:
            raise EngineError("httpx could not be imported", str(error), 'pip install "memfactory[embed]"') from error
        key = os.environ.get(api_key_env, "").strip() if api_key_env else ""
        if api_key_env and not key:
            raise EngineError(
                f"no key for the embedder at {base_url}",
                f"the environment variable {api_key_env} is empty",
                f"export {api_key_env}=...",
            )
        self._httpx = httpx
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.url, self.model, self.deadline, self.batch = f"{base_url.rstrip('/')}/embeddings", model, deadline, batch
        self.fingerprint = f"endpoint {model}"
        self._background = BackgroundLoop("memfactory-embedder")
        self._client: Any = None
        self._pid = os.getpid()
        self._lock = threading.Lock()

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """(n, d)

        Raises:
            ServiceError: refused, not in time, or not an answer to what was asked.
        """
        end = time.monotonic() + self.deadline
        parts = [self._batch(list(texts[at : at + self.batch]), end) for at in range(0, len(texts), self.batch)]
        if len({part.shape[1] for part in parts}) > 1:
            raise EngineError(
                f"embedder at {self.url}", "vectors of different lengths", "serve one model at this name"
            )
        return np.concatenate(parts) if parts else np.zeros((0, 0), dtype=np.float32)

    def close(self) -> None:
        """Give the connections back."""
        with self._lock:
            client, self._client = self._client, None
            if client is not None and self._pid == os.getpid():
                self._background.start(client.aclose()).result()

    def _batch(self, texts: list[str], end: float) -> np.ndarray:
        pause, why = 0.1, "no time was left to ask"
        while (left := end - time.monotonic()) > 0:
            try:
                response = self._post({"model": self.model, "input": texts}, left)
            except (self._httpx.InvalidURL, self._httpx.UnsupportedProtocol) as error:
                fix = "write the address as http://host:port/v1"
                raise ServiceError(f"embedder at {self.url}", str(error), fix) from error
            except self._httpx.HTTPError as error:
                why = f"{type(error).__name__}: {error}"
            except TimeoutError:
                why = "the answer had not arrived as a whole"
            else:
                if response.is_success:
                    return self._read(response, len(texts))
                why = f"HTTP {response.status_code}: {response.text[:200]}"
                if response.status_code not in PASSING:
                    raise ServiceError(f"embedder at {self.url}", why, "check its address, `model` and the key")
            time.sleep(max(0.0, min(pause, end - time.monotonic())))
            pause = min(2 * pause, 2.0)
        raise ServiceError(
            f"embedder at {self.url}: no answer in {self.deadline:g} s",
            why,
            "check that it is up, or raise `deadline`",
        )

    def _post(self, body: dict[str, Any], seconds: float) -> Any:
        """The whole answer, or TimeoutError.

        httpx counts the time of each read by itself, so a server that sends a byte now and then is never too late.
        Only a loop can end a request as a whole; it runs in a thread of its own, because callers may have one.
        """
        background, client = self._started()

        async def ask() -> Any:
            async with asyncio.timeout(seconds):
                return await client.post(self.url, json=body, headers=self._headers, timeout=None)

        return background.start(ask()).result()

    def _started(self) -> tuple[BackgroundLoop, Any]:
        """The loop and the connections of this process: after os.fork the child has no thread to run the parent's."""
        with self._lock:
            if self._pid != os.getpid():
                self._background, self._client = BackgroundLoop("memfactory-embedder"), None
                self._pid = os.getpid()
            if self._client is None:
                self._client = self._httpx.AsyncClient()
            return self._background, self._client

    def _read(self, response: Any, n: int) -> np.ndarray:
        """The vectors in the order asked for: each item names its place, and servers need not keep the order."""
        try:
            items = sorted(response.json()["data"], key=lambda item: item["index"])
            rows = np.array([item["embedding"] for item in items], dtype=np.float32)
            places = [item["index"] for item in items]
        except (ValueError, KeyError, TypeError) as error:
            why = f"{type(error).__name__}: {error}; it begins {response.text[:100]!r}"
            raise ServiceError(
                f"embedder at {self.url}: answer not read", why, "point it to an /embeddings"
            ) from error
        if places != list(range(n)) or rows.ndim != 2:
            raise ServiceError(f"embedder at {self.url}: not one vector per text", f"{len(rows)} for {n} texts")
        return rows

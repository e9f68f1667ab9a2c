"""A server that speaks as vLLM does and fails as told: for what a real one cannot be made to do at will."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # `servers` is shared by folders of tests

from servers import LocalServer

Fault = Callable[["FaultyServer", str, dict[str, Any], int], int | str | float | None]
"""``fault(server, path, body, number)``: a status to answer; ``cut`` (no reply), ``short`` (half a reply) or
``garbage``; seconds (a float) after which to answer well; None: at once. `number` counts the requests to that path
from 0."""


class FaultyServer(LocalServer):
    """Completions are the request's seed modulo 100, three times; log-probs of prompts are `-weight` for every token.

    Args:
        port: 0 takes a free one.
        weight: stands for the weights: what the canary sees.
    """

    def __init__(self, fault: Fault | None = None, port: int = 0, weight: float = 1.0) -> None:
        super().__init__(port)
        self.fault, self.weight, self.version = fault, weight, "0.31.0"
        self.info: dict[str, Any] | None = None
        """Its configuration, where it is in its development mode."""
        self.engines = 1
        self.ranks: list[str | None] = []
        """Engine that each request with a body was for."""
        self.adapters: dict[str, str] = {}
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self._counts: dict[str, int] = {}

    def completions(self) -> list[dict[str, Any]]:
        """Requests for turns that came here."""
        return [body for path, body in self.seen if path == "/v1/completions" and "prompt_logprobs" not in body]

    def _handle(self, handler: BaseHTTPRequestHandler, content: bytes) -> None:
        path = handler.path.partition("?")[0]
        body: dict[str, Any] = json.loads(content) if content else {}
        with self._lock:
            number = self._counts.get(path, 0)
            self._counts[path] = number + 1
            self.seen.append((path, body))
            if body:
                self.ranks.append(handler.headers.get("X-data-parallel-rank"))
        told = self.fault(self, path, body, number) if self.fault is not None else None
        if told == "cut":
            handler.close_connection = True
            return
        if isinstance(told, float):
            time.sleep(told)
            told = None
        if isinstance(told, int):
            self._send(handler, told, {"error": {"message": "as told", "code": told}})
        elif told == "garbage":
            self._send(handler, 200, {"what": "is this"})
        else:
            handler.close_connection = told == "short"
            self._send(handler, *self._answer(path, body), short=told == "short")

    def _answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/health":
            return 200, {}
        if path == "/version":
            return 200, {"version": self.version}
        if path == "/server_info" and self.info is not None:
            return 200, {"vllm_config": self.info}
        if path == "/metrics":
            lines = (f'vllm:num_requests_running{{engine="{n}",model_name="base"}} 0' for n in range(self.engines))
            return 200, "\n".join(lines)
        if path == "/v1/models":
            models = [{"id": "base", "max_model_len": 512}, *({"id": name} for name in self.adapters)]
            return 200, {"data": models}
        if path == "/v1/load_lora_adapter":
            self.adapters[body["lora_name"]] = body["lora_path"]
            return 200, "loaded"
        if path == "/v1/unload_lora_adapter":
            return (200, "gone") if self.adapters.pop(body["lora_name"], None) else (404, {"error": {"message": "no"}})
        if path != "/v1/completions":
            return 404, {"error": {"message": "not found", "code": 404}}
        if body["model"] not in {"base", *self.adapters}:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist", "code": 404}}
        if "prompt_logprobs" in body:
            places = [None, *({str(id): {"logprob": -self.weight}} for id in body["prompt"][1:])]
            return 200, {"choices": [{"prompt_logprobs": places, "finish_reason": "length"}]}
        time.sleep(0.01)
        ids = [body["seed"] % 100] * 3
        choice = {"token_ids": ids, "logprobs": {"token_logprobs": [-0.5] * 3}, "finish_reason": "length"}
        return 200, {"choices": [choice], "usage": {"prompt_tokens": len(body["prompt"]), "completion_tokens": 3}}

    @staticmethod
    def _send(handler: BaseHTTPRequestHandler, status: int, body: Any, short: bool = False) -> None:
        content = (body if isinstance(body, str) else json.dumps(body)).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[: len(content) // 2] if short else content)

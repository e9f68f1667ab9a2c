"""Small runs to serve, and real `memfactory serve` processes on them."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path
from typing import Any, Self

import httpx
import openai
import psutil
import yaml

from memfactory.episode import Task
from memfactory.policy.models import load_model, load_tokenizer
from memfactory.recipe import Recipe
from memfactory.train.prepare import prepare
from tests.forked import Server

AGENTS: dict[str, dict[str, Any]] = {
    "text": {
        "name": "memagent",
        "prompt": "words",
        "answer_format": "plain",
        "max_memory_tokens": 8,
        "max_answer_tokens": 6,
    },
    "bank": {
        "name": "compose",
        "extract": {"kind": "chunk"},
        "update": {"kind": "add"},
        "retrieve": {"kind": "search", "k": 3},
        "rerank": {"kind": "model", "m": 2},
        "answer": {"kind": "words"},
        "max_rerank_tokens": 3,
        "max_answer_tokens": 6,
    },
}
"""By what they keep."""


def make_run(folder: Path, kind: str) -> Path:
    """A run folder with an untrained model: its weights are large, so that what it says depends on all it reads."""
    recipe = Recipe.model_validate(
        {
            "name": f"tiny-{kind}",
            "model": {"tiny": {"hidden_size": 32, "layers": 2, "heads": 2, "mlp_size": 48, "initializer_range": 0.5}},
            "agent": AGENTS[kind],
            "environment": {"name": "fact_words", "test_tasks": 3, "train_tasks": 3},
            "rewards": [{"name": "answer.exact_match"}],
        }
    )
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.dump()), encoding="utf-8")
    tokenizer = load_tokenizer(recipe.model, prepare(folder / "recipe.yaml", splits=()).vocabulary)
    load_model(recipe.model, tokenizer, 0).save_pretrained(folder / "model")
    return folder


def user(*texts: str) -> list[dict[str, str]]:
    """Messages of the user."""
    return [{"role": "user", "content": text} for text in texts]


def messages_of(task: Task) -> list[dict[str, str]]:
    """A task as a client sends it."""
    return user(*task.stream, task.probes[0].question)


class Serving:
    """A `memfactory serve` process at a free port.

    Args:
        server: forks it.
        run: what is served.
        options: of the command.
        start: of `Server.start`.
    """

    def __init__(self, server: Server, run: Path, *options: str, **start: Any) -> None:
        # each new client reads the certificates of the system: 50 ms
        self.clients: dict[str, openai.OpenAI] = {}
        self.web = httpx.Client(timeout=60, trust_env=False)
        self.process = server.start(["serve", str(run), "--port", "0", *options], **start)
        end = time.monotonic() + 60
        while not (found := re.search(r"^(\S+) .* at (http://\S+)/v1$", self.output, re.MULTILINE)):
            assert psutil.pid_exists(self.process.pid), self.output
            assert time.monotonic() < end, self.output
            time.sleep(0.02)
        self.model, self.root = found[1], found[2]
        self.url = f"{self.root}/v1"
        self.port = int(self.root.rpartition(":")[2])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for client in (*self.clients.values(), self.web):
            client.close()
        if self.process.code is None:
            self.end(signal.SIGKILL)

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self.process.output if self.process.log.exists() else ""

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait; the exit code."""
        self.process.send(number)
        return self.process.wait()

    def client(self, token: str = "none") -> openai.OpenAI:
        if token not in self.clients:
            self.clients[token] = openai.OpenAI(base_url=self.url, api_key=token, max_retries=0, timeout=60)
        return self.clients[token]

    def ask(self, messages: list[dict[str, str]], *, token: str = "none", **options: Any) -> Any:
        """A greedy answer with its episode, through OpenAI's own client."""
        extra = {"return_episode": True, **options.pop("extra_body", {})}
        given = {"temperature": 0, "model": self.model, **options}
        return self.client(token).chat.completions.create(messages=messages, extra_body=extra, **given)  # type: ignore[call-overload]

    def post(self, body: Any, **options: Any) -> httpx.Response:
        """The raw reply to a body."""
        return self.web.post(f"{self.url}/chat/completions", json=body, **options)

    def memory(self, owner: str = "", token: str = "none") -> str:
        """What a user, or who they ask for, is remembered by."""
        headers = {"Authorization": f"Bearer {token}"}
        reply = self.web.get(f"{self.url}/memory", params={"user": owner}, headers=headers)
        text: str = reply.raise_for_status().json()["text"]
        return text


def text_of(reply: Any) -> str:
    text: str = reply.choices[0].message.content
    return text


def read_by(reply: Any) -> list[str]:
    """What the agent read for a reply."""
    stream: list[str] = reply.episode["task"]["stream"]
    return stream

"""A real vLLM server on this machine."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from vllm_serving import SHAPE, START, WORDS, Serving, free_port

from memfactory.policy.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def make_serving(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Serving]:
    """Makes a base model in a folder of its own and a free port for it; starts nothing."""

    def make() -> Serving:
        folder = tmp_path_factory.mktemp("serving")
        tokenizer = tiny_tokenizer(WORDS)
        tiny_model(SHAPE, tokenizer, 0).save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
        return Serving(folder, free_port())

    return make


@pytest.fixture(scope="session")
def serving(make_serving: Callable[[], Serving]) -> Iterator[Serving]:
    """A server that runs for all tests that do it no harm."""
    made = make_serving()
    # places for the adapters of an asynchronous run; others need two of them
    with made.server(extra=("--max-loras", "3")) as server:
        server.wait_healthy(START)
        yield made

"""A real vLLM server on this machine, and the model it serves."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

sys.path.insert(0, str(Path(__file__).parents[1]))  # `engines` is shared by folders of tests

from engines import engine_python

from memfactory.launch.rollout_server import RolloutServer, ServerOptions, arguments, environment
from memfactory.policy.base import Sampling
from memfactory.policy.models import load_checkpoint
from memfactory.policy.tiny import tiny_model, tiny_tokenizer
from memfactory.policy.transformers_backend import TransformersPolicy
from memfactory.policy.vllm_policy import VLLMPolicy
from memfactory.recipe import Recipe, TinyModel
from memfactory.train.serving import served

WORDS = [f"w{number}" for number in range(200)]
SHAPE = TinyModel(hidden_size=64, heads=2, initializer_range=0.3)  # heads of 32: vLLM's CPU attention has no 16
START = 300.0
"""Seconds a server may take to start on a busy machine."""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@dataclass
class Serving:
    """A base model on disk, and how to serve it and to sample from it."""

    folder: Path
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def recipe(self, **vllm: Any) -> Recipe:
        """A recipe that samples from `url`."""
        vllm = {"base_urls": [self.url], "max_model_len": 512, "outage": 60, "deadline": 120} | vllm
        return Recipe.model_validate(
            {
                "name": "served",
                "model": {"name": str(self.folder / "base"), "lora": {"r": 8}},
                "environment": {"name": "fact_words"},
                "rewards": [{"name": "answer.exact_match"}],
                "rollout": {"engine": "vllm", "vllm": vllm},
            }
        )

    def server(self, log: str = "vllm.log", **changes: Any) -> RolloutServer:
        """The server that `memfactory serve-rollouts` starts for `recipe`; use it as a context."""
        options = ServerOptions(port=self.port, extra=changes.pop("extra", ()))
        flags = arguments(self.recipe(**changes), self.folder / "run", options, gpu=False)
        command = [engine_python("vllm"), "-m", "vllm.entrypoints.openai.api_server", *flags]
        # two threads fight for the cores with the trainer's; the pages of a cache this small fit anywhere
        environ = environment(os.environ | {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}, gpu=False)
        return RolloutServer(command, environ, self.url, self.folder / log)

    def model(self, seed: int | None = 0, rank: int = 8) -> PeftModel:
        """The base model with an adapter whose weights `seed` decides; None: one that changes nothing."""
        base = load_checkpoint(self.folder / "base", self.recipe().model)
        model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear"))
        if seed is not None:
            draw = torch.Generator().manual_seed(seed)
            for name, weight in model.named_parameters():
                if "lora_" in name:
                    weight.data.normal_(0, 0.2, generator=draw)
        return model.eval()

    def policy(self, run: str = "run", **vllm: Any) -> VLLMPolicy:
        """A policy that samples from the server, as the trainer makes it."""
        tokenizer = tiny_tokenizer(WORDS)
        inner = TransformersPolicy(self.model(), tokenizer, sampling=Sampling(1.0))
        return served(self.recipe(**vllm), inner, self.folder / run)


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
    with made.server() as server:
        server.wait_healthy(START)
        yield made

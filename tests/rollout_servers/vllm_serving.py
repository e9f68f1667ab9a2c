"""A base model on disk, the vLLM server for it, and turns sampled from it."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model

sys.path.insert(0, str(Path(__file__).parents[1]))  # `engines` is shared by folders of tests

from engines import engine_python

from memfactory.doctor.served import Served
from memfactory.environments import build_environment
from memfactory.episode import Turn
from memfactory.policy.base import Sampling
from memfactory.policy.models import load_checkpoint
from memfactory.policy.tiny import tiny_tokenizer
from memfactory.policy.transformers_backend import TransformersPolicy
from memfactory.policy.vllm_policy import VLLMPolicy
from memfactory.policy.vllm_process import MARK, RolloutServer, ServerOptions, arguments, environment
from memfactory.recipe import Recipe, TinyModel
from memfactory.train.prepare import prepare
from memfactory.train.serving import served

WORDS = [*(f"w{number}" for number in range(200)), *build_environment("fact_words", {}).vocabulary()]
"""Of the tests' own prompts, and of the environment that recipes are trained in here."""
SHAPE = TinyModel(hidden_size=64, heads=2, initializer_range=0.3)  # heads of 32: vLLM's CPU attention has no 16
PARTS = Path(__file__).parents[1] / "train" / "rank_parts.py"
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
    lora: bool = True
    """Adapters are sent; else all weights."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def recipe(self, **vllm: Any) -> Recipe:
        """A recipe that samples from `url`."""
        vllm = {"base_urls": [self.url], "max_model_len": 512, "outage": 60, "deadline": 120} | vllm
        return Recipe.model_validate(
            {
                "name": "served",
                "model": {"name": str(self.folder / "base")} | ({"lora": {"r": 8}} if self.lora else {}),
                "environment": {"name": "fact_words"},
                "rewards": [{"name": "answer.exact_match"}],
                "rollout": {"engine": "vllm", "vllm": vllm},
            }
        )

    def training(self, **vllm: Any) -> list[str]:
        """Overrides of `memagent/quickstart-vllm` with which it trains on this base model: a few steps, no warm-up."""
        vllm = self.recipe(**vllm).rollout.vllm.model_dump(mode="json", exclude_unset=True)
        return [
            "model.tiny=null",
            f"model.name={self.folder / 'base'}",
            "model.lora={r: 8}",
            "warmup=null",
            f"rollout.vllm={json.dumps(vllm)}",
            f"agent.name={PARTS}:Uneven",
            f"rewards={json.dumps([{'name': f'{PARTS}:words'}])}",
            "environment.train_tasks=12",
            "environment.test_tasks=2",
            "train.num_generations=4",
            "train.learning_rate=0.01",
            "train.eval_strategy=no",
            "eval.greedy=false",
        ]

    def doctor(self, folder: Path, *overrides: str) -> Served:
        """What `memfactory doctor` looks at for `recipe`, by way of its file in `folder`."""
        file = folder / "recipe.yaml"
        file.write_text(yaml.safe_dump(self.recipe().dump()))
        return Served(prepare(file, [f"output_dir={folder / 'run'}", *overrides], splits=()), "recipe.yaml")

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

    def policy(self, run: str = "run", temperature: float = 1.0, **vllm: Any) -> VLLMPolicy:
        """A policy that samples from the server, as the trainer makes it."""
        tokenizer = tiny_tokenizer(WORDS)
        inner = TransformersPolicy(self.model(), tokenizer, sampling=Sampling(temperature))
        return served(self.recipe(**vllm), inner, self.folder / run)


def prompts(count: int, words: int = 30) -> list[list[dict[str, str]]]:
    return [
        [{"role": "user", "content": " ".join(f"w{(n * 7 + k * k) % 200}" for k in range(words))}]
        for n in range(count)
    ]


def ask(policy: VLLMPolicy, asked: list[Any], max_tokens: int = 12) -> list[Turn]:
    async def everything() -> list[Turn]:
        return await asyncio.gather(*(policy.generate(one, module="write", max_tokens=max_tokens) for one in asked))

    return asyncio.run(everything())


@torch.no_grad()
def fresh_logprobs(model: Any, turn: Turn) -> torch.Tensor:
    """Log-probs of a turn's completion by a forward pass of its own."""
    ids = torch.tensor([[*turn.prompt_ids, *turn.completion_ids]])
    logits = model(input_ids=ids).logits[0, len(turn.prompt_ids) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(turn.completion_ids)[:, None])[:, 0]


def left_over(folder: Path) -> list[psutil.Process]:
    """Processes of a server that was started for `folder`; its mark is in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK, "").startswith(str(folder)):
                found.append(process)
        except psutil.Error:
            continue
    return found

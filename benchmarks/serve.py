"""What `memfactory serve` adds to a turn of its model, and whether 50 users at once are answered.

    python benchmarks/serve.py
    python benchmarks/serve.py --entries 10 1000 5000 20000

Two agents with 0.1 M random weights: one that keeps a text, one over a bank. The same questions are asked of the agent
in this process, with nothing kept, and over HTTP of a server in a process of its own, where each answer is on the disk
before it is sent; one after the other, by turns, so that both meet the same machine. Then 50 users ask at once.

With `--entries` it is the agent over a bank alone, all questions are of one user, and a bank of so many entries stands
in the file before the server starts. A turn over HTTP is then held against the time in the model alone, of the same
prompts in this process. Then a second user with such a bank asks for the first time, while a third one, who has told
nothing, asks again and again: how long that one waits is how long the others stall.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import httpx
import psutil
import yaml

from memfactory.agents.running import run_episodes
from memfactory.environments.base import Split
from memfactory.episode import Message, Operation, Task, Turn
from memfactory.memory.bank import EntryBank
from memfactory.memory.sqlite import SqliteStore
from memfactory.policy.base import Policy, Sampling
from memfactory.policy.models import load_model, load_tokenizer
from memfactory.serve.access import LOCAL_USER
from memfactory.serve.desk import owner_of
from memfactory.train.prepare import Prepared, prepare
from memfactory.train.start import load_policy

TARGET = 10.0
"""Milliseconds that a turn may take longer."""
WARM = 3
"""Tasks that are not counted."""
AGENTS: dict[str, dict[str, Any]] = {
    "text": {"name": "memagent", "prompt": "words", "answer_format": "plain"}
    | {"max_memory_tokens": 16, "max_answer_tokens": 16},
    "bank": {"name": "compose", "extract": {"kind": "chunk"}, "update": {"kind": "add"}}
    | {"retrieve": {"kind": "search", "k": 3}, "rerank": {"kind": "model", "m": 2}, "answer": {"kind": "words"}}
    | {"max_rerank_tokens": 8, "max_answer_tokens": 16},
}


def make_run(folder: Path, kind: str, tasks: int) -> Prepared:
    """A run folder with a model of random weights."""
    told = {
        "name": kind,
        "model": {"tiny": {"hidden_size": 64, "layers": 2, "heads": 4, "mlp_size": 128, "initializer_range": 0.3}},
        "agent": AGENTS[kind],
        "environment": {"name": "fact_words", "train_tasks": 1, "test_tasks": tasks},
        "rewards": [{"name": "answer.exact_match"}],
    }
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(told), encoding="utf-8")
    prepared = prepare(folder / "recipe.yaml", splits=(Split.TEST,))
    tokenizer = load_tokenizer(prepared.recipe.model, prepared.vocabulary)
    load_model(prepared.recipe.model, tokenizer, 0).save_pretrained(folder / "model")
    return prepared


def body(task: Task, model: str, user: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": text} for text in (*task.stream, task.probes[0].question)]
    return {"model": model, "messages": messages, "temperature": 0, "user": user}


@dataclass
class Cost:
    """What turns took, in milliseconds each."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    """Of the process with the model, all threads."""

    def add(self, wall: float, cpu: float, turns: int) -> None:
        self.wall.append(1000 * wall / turns)
        self.cpu.append(1000 * cpu / turns)


def by_turns(prepared: Prepared, url: str, model: str, folder: Path, server: psutil.Process) -> tuple[Cost, Cost]:
    """What turns take here, and over HTTP, a figure for each task."""
    policy, here, there = load_policy(prepared, folder / "model"), Cost(), Cost()
    with policy.drawing(Sampling(0.0), 0), httpx.Client(timeout=60, trust_env=False) as client:
        for place, task in enumerate(prepared.eval_tasks):
            start, start_cpu = time.perf_counter(), used(psutil.Process())
            (episode,) = run_episodes(prepared.agent, [task], policy)
            between, between_cpu = time.perf_counter(), used(psutil.Process())
            before = used(server)
            asked = time.perf_counter()
            reply = client.post(f"{url}/chat/completions", json=body(task, model, f"user {place}"))
            end = time.perf_counter()
            reply.raise_for_status()
            assert episode.answer is not None
            assert reply.json()["choices"][0]["message"]["content"] == episode.answer.text
            if place >= WARM:  # the first ones pay for what is done once
                here.add(between - start, between_cpu - start_cpu, len(episode.turns))
                there.add(end - asked, used(server) - before, len(episode.turns))
    return here, there


class Timed:
    """A policy that adds up how long its turns take."""

    def __init__(self, inner: Policy) -> None:
        self.inner, self.seconds = inner, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def generate(self, messages: list[Message], *, module: str, max_tokens: int) -> Turn:
        start = time.perf_counter()
        turn = await self.inner.generate(messages, module=module, max_tokens=max_tokens)
        self.seconds += time.perf_counter() - start
        return turn


def told(prepared: Prepared, count: int) -> list[Operation]:
    """`count` facts of 8 words each, of which the model knows every one."""
    draw, words = random.Random(0), prepared.vocabulary or []
    return [Operation("ADD", "", " ".join(draw.choices(words, k=8))) for _ in range(count)]


def of_one_user(prepared: Prepared, count: int, url: str, folder: Path, server: psutil.Process) -> tuple[Cost, Cost]:
    """What turns take in the model, and over HTTP for a user with `count` entries, a figure for each task."""
    policy, model, there = Timed(load_policy(prepared, folder / "model")), Cost(), Cost()
    bank, last = EntryBank("here"), ()
    for operation in told(prepared, count):
        bank.apply(operation)
    with policy.drawing(Sampling(0.0), 0), httpx.Client(timeout=60, trust_env=False) as client:
        for place, task in enumerate(prepared.eval_tasks):
            policy.seconds, start_cpu = 0.0, used(psutil.Process())
            read = Task(task.id, (*last, *task.stream), task.probes)
            episode = asyncio.run(prepared.agent.run(read, policy, bank))
            here_cpu, before = used(psutil.Process()) - start_cpu, used(server)
            asked = time.perf_counter()
            reply = client.post(f"{url}/chat/completions", json=body(task, folder.name, "large"))
            end = time.perf_counter()
            reply.raise_for_status()
            assert episode.answer is not None
            assert reply.json()["choices"][0]["message"]["content"] == episode.answer.text
            last = (f"user: {task.probes[0].question}\nassistant: {episode.answer.text}",)
            if place >= WARM:
                model.add(policy.seconds, here_cpu, len(episode.turns))
                there.add(end - asked, used(server) - before, len(episode.turns))
    return model, there


def stall(prepared: Prepared, url: str, model: str) -> tuple[list[float], float, list[float]]:
    """Seconds of a small user's answers: alone, then while a large bank is asked for the first time; and its own."""

    def ask(user: str, number: int) -> float:
        start = time.perf_counter()
        task = prepared.eval_tasks[number % len(prepared.eval_tasks)]
        httpx.post(f"{url}/chat/completions", json=body(task, model, user), timeout=60).raise_for_status()
        return time.perf_counter() - start

    alone = [ask("small 0", number) for number in range(10)]
    first: list[float] = []
    thread = threading.Thread(target=lambda: first.append(ask("cold", 0)))
    thread.start()
    beside: list[float] = []
    while thread.is_alive():
        beside.append(ask(f"small {len(beside) + 1}", len(beside)))
    thread.join()
    return alone, first[0], beside


def used(process: psutil.Process) -> float:
    """Seconds of CPU, in steps of 10 ms."""
    times = process.cpu_times()
    return float(times.user + times.system)


async def at_once(prepared: Prepared, url: str, model: str, users: int, rounds: int) -> tuple[list[float], list[str]]:
    """Seconds of each answer, and what went wrong."""
    seconds: list[float] = []
    errors: list[str] = []

    async def one(client: httpx.AsyncClient, user: int) -> None:
        for number in range(rounds):
            task = prepared.eval_tasks[(user + number) % len(prepared.eval_tasks)]
            start = time.perf_counter()
            try:
                reply = await client.post(f"{url}/chat/completions", json=body(task, model, f"many {user}"))
                if reply.status_code != 200:
                    errors.append(f"HTTP {reply.status_code}: {reply.text[:200]}")
            except httpx.HTTPError as error:
                errors.append(repr(error))
            seconds.append(time.perf_counter() - start)

    limits = httpx.Limits(max_connections=users)
    async with httpx.AsyncClient(timeout=300, trust_env=False, limits=limits) as client:
        await asyncio.gather(*(one(client, user) for user in range(users)))
    return seconds, errors


@contextmanager
def serving(folder: Path, log: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server of the run in `folder`: its URL and process."""
    command = [sys.executable, "-m", "memfactory.cli.main", "serve", str(folder), "--port", "0"]
    with log.open("w") as out:
        server = subprocess.Popen([*command, "--at-once", "1000"], stdout=out, stderr=out)
    try:
        while not (found := re.search(r"at (http://\S+/v1)$", log.read_text(), re.MULTILINE)):
            if server.poll() is not None:
                sys.exit(log.read_text())
            time.sleep(0.1)
        yield found[1], server
    finally:
        server.kill()


def verdict(here: Cost, there: Cost, where: str) -> str:
    """Both sides, and what is between them."""
    added = median(there.wall) - median(here.wall)
    met = "met" if added <= TARGET else "MISSED"
    took = f"a turn takes {median(here.wall):.1f} ms {where}, {median(there.wall):.1f} ms over HTTP"
    return f"{took}: {added:.1f} ms more, target at most {TARGET:g}: {met}"


def small_memories(options: argparse.Namespace) -> None:
    """Both agents, each question of a user of its own."""
    for kind in AGENTS:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / kind
            prepared = make_run(folder, kind, options.tasks)
            with serving(folder, Path(scratch) / "log") as (url, server):
                here, there = by_turns(prepared, url, kind, folder, psutil.Process(server.pid))
                start = time.perf_counter()
                seconds, errors = asyncio.run(at_once(prepared, url, kind, options.users, options.rounds))
                wall = time.perf_counter() - start
                server.send_signal(signal.SIGTERM)
                code = server.wait(60)
        print(f"{kind}: {verdict(here, there, 'here')}")
        print(f"  CPU of a turn, mean: {mean(here.cpu):.1f} ms here, {mean(there.cpu):.1f} ms in the server")
        answered = f"{len(seconds)} answers: {len(errors)} errors, {len(seconds) / wall:.1f} answers/s"
        took = f"mean {mean(seconds):.2f} s, longest {max(seconds):.2f} s"
        print(f"  {options.users} users at once, {answered}, {took}; ended with code {code}")
        for error in errors[:3]:
            print(f"  {error}")


def large_memories(options: argparse.Namespace) -> None:
    """The agent over a bank, for users with so many entries."""
    for count in options.entries:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "bank"
            prepared = make_run(folder, "bank", options.tasks)
            with SqliteStore(folder / "memories.sqlite") as store:
                for user in ("large", "cold"):
                    store.bank(owner_of(LOCAL_USER, user)).apply_all(told(prepared, count))
            with serving(folder, Path(scratch) / "log") as (url, server):
                process = psutil.Process(server.pid)
                before = process.memory_info().rss
                model, there = of_one_user(prepared, count, url, folder, process)
                grown = process.memory_info().rss - before
                alone, first, beside = stall(prepared, url, "bank")
        print(f"{count} entries: {verdict(model, there, 'in the model')}")
        print(f"  CPU of a turn in the server, mean: {mean(there.cpu):.1f} ms; it grew by {grown / 1e6:.0f} MB")
        others = f"median {1000 * median(alone):.0f} ms alone, longest {1000 * max(alone):.0f} ms"
        others += f"; beside it longest {1000 * max(beside):.0f} ms of {len(beside)}"
        print(f"  a user with as many asks for the first time: {1000 * first:.0f} ms; another one waits {others}")


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=40)
    parser.add_argument("--users", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=4, help="questions of each user")
    parser.add_argument("--entries", type=int, nargs="+", help="sizes of a bank that is there before")
    options = parser.parse_args()
    if options.entries:
        large_memories(options)
    else:
        small_memories(options)
    print(f"load average of the last minute {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")


if __name__ == "__main__":
    main()

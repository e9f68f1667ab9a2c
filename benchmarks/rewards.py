"""What rewards cost: scoring, the arithmetic after it, and a slow judge beside generation.

python benchmarks/rewards.py                    # all three, about two minutes on 2 quiet cores
python benchmarks/rewards.py --only arithmetic
python benchmarks/rewards.py --json figures.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

for name, value in {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "OMP_NUM_THREADS": "1"}.items():
    os.environ.setdefault(name, value)

from memfactory import Episode, Score, StopReason, Task, Turn, reward  # noqa: E402 - after the environment
from memfactory.plugins import shipped  # noqa: E402
from memfactory.recipe import JudgeSection  # noqa: E402
from memfactory.reward.catalogue import WeightedDimension, load_dimension  # noqa: E402
from memfactory.reward.dimension import RewardDimension, Role  # noqa: E402
from memfactory.reward.judge import Rubric, build_judge  # noqa: E402
from memfactory.reward.measure import Faults, measure  # noqa: E402
from memfactory.reward.system import RewardSystem  # noqa: E402
from memfactory.runs import RunFolder, episode_from_record  # noqa: E402

RULES = (
    "answer.exact_match answer.containment answer.token_f1 answer.boxed answer.numeric format.answered format.stopped "
    "format.operations_valid grounding.supported memory.evidence_recall memory.compression memory.redundancy"
).split()
"""Twelve rule dimensions, the costly ones among them."""


def best(work: Callable[[], Any], repeat: int) -> dict[str, float]:
    """Seconds of wall clock and of CPU of `work`: the least of `repeat`, and the median wall."""
    wall, cpu = [], []
    for _ in range(repeat):
        start, start_cpu = time.perf_counter(), time.process_time()
        work()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
    return {"seconds": min(wall), "cpu_seconds": min(cpu), "median_seconds": statistics.median(wall)}


def scoring(episodes: int = 1024) -> dict[str, Any]:
    """Score real episodes on twelve rule dimensions, and call the same functions in a bare loop."""
    path = shipped("data") / "samples" / "episodes.jsonl"
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    batch = [episode_from_record(records[number % len(records)]) for number in range(episodes)]
    dimensions = [WeightedDimension(name, load_dimension(name)) for name in RULES]

    def bare() -> None:
        for weighted in dimensions:
            function = weighted.dimension.function
            for episode in batch:
                if weighted.dimension.per_turn:
                    for turn in episode.turns:
                        function(episode, turn)
                else:
                    function(episode)

    ours, loop = best(lambda: measure(batch, dimensions), 5), best(bare, 5)
    return {
        "episodes": episodes,
        "dimensions": len(dimensions),
        **ours,
        "bare_loop_seconds": loop["seconds"],
        "over_bare_loop": ours["seconds"] / loop["seconds"],
        "target_seconds": 1.0,
    }


def arithmetic(episodes: int = 4096, dimensions: int = 32, turns: int = 5, group: int = 8) -> dict[str, Any]:
    """Aggregate, compare, credit and log a batch whose scores are there."""
    draw = random.Random(0)
    names = [f"d{number}" for number in range(dimensions)]
    system = RewardSystem(
        [
            WeightedDimension(name, RewardDimension(name, len, role=Role.GATE if number < 9 else Role.OBJECTIVE))
            for number, name in enumerate(names)
        ]
    )
    batch = []
    for number in range(episodes):
        own = [Turn("write", [1], [2], [-1.0], "", StopReason.STOP) for _ in range(turns)]
        scores = {name: Score(draw.random()) for name in names}
        task = f"task{number // group}"
        batch.append(Episode(Task(task, (), ()), own, group=task, id=f"0/0/{number}", scores=scores))
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder))

        def work() -> None:
            assessment = system.assess(batch, Faults())
            run.log_metrics(1, assessment.metrics, phase="train")
            run.log_rewards(1, assessment.record)

        figures = best(work, 15)
    return {"episodes": episodes, "dimensions": dimensions, "turns": turns, **figures, "target_seconds": 0.05}


class _SlowVerdict(BaseHTTPRequestHandler):
    """Answers every question with yes after one second."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(1.0)
        verdict = json.dumps({"reason": "it is", "verdict": "yes"})
        body = json.dumps({"choices": [{"message": {"content": verdict}, "finish_reason": "stop"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        return


class _Server(ThreadingHTTPServer):
    request_queue_size = 256  # connections that may wait: 64 come at once


def _serve(port: Any) -> None:
    server = _Server(("127.0.0.1", 0), _SlowVerdict)
    port.value = server.server_port
    server.serve_forever()


def judged(tasks: int = 32, group: int = 8, chunks: int = 4, new_tokens: int = 40, repeat: int = 3) -> dict[str, Any]:
    """Generate and score a batch without and with a judge of one second latency, 64 requests at a time.

    A real model, the real agent, a server in a process of its own. Every episode is a different question, so nothing
    comes from the cache.
    """
    import torch

    from memfactory.agents import MemAgent
    from memfactory.agents.running import run_episodes
    from memfactory.environments import build_environment
    from memfactory.environments.base import Split
    from memfactory.policy.base import Sampling
    from memfactory.policy.tiny import tiny_model, tiny_tokenizer
    from memfactory.policy.transformers_backend import TransformersPolicy
    from memfactory.recipe import TinyModel

    environment: Any = build_environment("fact_words", {"chunks": chunks})
    tokenizer = tiny_tokenizer(environment.vocabulary())
    model = tiny_model(TinyModel(hidden_size=256, layers=4, heads=4, mlp_size=512), tokenizer, 0).eval()
    agent: Any = MemAgent(
        prompt="words", answer_format="plain", max_memory_tokens=new_tokens, max_answer_tokens=new_tokens
    )
    batch = [task for task in environment.tasks(Split.TRAIN, tasks) for _ in range(group)]
    rubric = Rubric("polite", "1", "Is the text polite?", {"yes": 1.0, "no": 0.0})

    @reward
    async def asks(episode: Episode, *, judge: Any) -> Score:
        return await judge.grade(rubric, text=f"{episode.group} {id(episode)} {episode.memory}")

    @reward
    def rule(episode: Episode) -> float:
        return float(len(episode.memory) % 2)

    port = multiprocessing.Value("i", 0)
    server = multiprocessing.Process(target=_serve, args=(port,), daemon=True)
    server.start()
    while not port.value:
        time.sleep(0.05)
    judge = build_judge(
        JudgeSection(base_url=f"http://127.0.0.1:{port.value}/v1", model="slow", concurrency=64, cache=None)
    )

    def step(dimension: RewardDimension) -> dict[str, float]:
        system = RewardSystem([WeightedDimension("own", dimension)], judge=judge)
        policy = TransformersPolicy(model, tokenizer, sampling=Sampling(1.0), token_budget=8192, seed=0)
        measuring = system.begin()
        start = time.perf_counter()
        with torch.no_grad():
            episodes = run_episodes(agent, batch, policy, measuring.submit)
        generated = time.perf_counter()
        system.assess(episodes, measuring.finish(episodes))
        assert all(episode.reward is not None for episode in episodes)
        return {"generate": generated - start, "score": time.perf_counter() - generated}

    try:
        step(rule)  # warm
        without, with_judge = [], []
        for _ in range(repeat):  # by turns, because a machine is not equally fast all the time
            without.append(step(rule))
            with_judge.append(step(asks))
    finally:
        server.terminate()
    plain, judged_total = (statistics.median(sum(one.values()) for one in runs) for runs in (without, with_judge))
    return {
        "episodes": len(batch),
        "without": without,
        "with_judge": with_judge,
        "judge_seconds_one_after_the_other": len(batch) / 64,
        "added_share": judged_total / plain - 1,
        "target_added_share": 0.10,
    }


PARTS: dict[str, Callable[[], dict[str, Any]]] = {"scoring": scoring, "arithmetic": arithmetic, "judge": judged}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", choices=sorted(PARTS))
    arguments.add_argument("--json", type=Path)
    asked = arguments.parse_args()
    figures = {}
    for name, part in PARTS.items():
        if asked.only in (None, name):
            figures[name] = part()
            print(name, json.dumps(figures[name], indent=2), flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What a second process costs: one optimizer step on two processes of one thread, against one process of two threads.

    python benchmarks/ranks.py                            # SmolLM2-135M, about 15 minutes on 2 quiet cores
    python benchmarks/ranks.py --model tiny --repeat 3    # the same script on a toy model, two minutes

Both do the same work: the workload of `step.py`, whole on one process or half of its tasks on each of two. The two
share gradients and statistics over gloo; the one shares matrices between threads.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from step import in_own_process, machine
from workload import Spec

LAYOUTS = {"1 process x 2 threads": (1, 2), "2 processes x 1 thread": (2, 1)}
MOST = 1.15
"""Wall time of two processes over that of one that is good enough."""


def contest(spec: Spec, ranks: int) -> dict[str, Any]:
    """One step in this process, which may be one of several."""
    import torch
    import transformers

    torch.set_num_threads(spec.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    transformers.set_seed(spec.seed)
    import ours

    return ours.run(spec, ranks=ranks).dump()


def measure(spec: Spec, ranks: int, scratch: Path) -> dict[str, Any]:
    """A step by `ranks` fresh processes: figures of the slowest, CPU seconds of all.

    Raises:
        SystemExit: one of them failed.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": str(spec.threads),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])),
    }
    if ranks > 1:
        port = random.randint(20_000, 30_000)
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    running = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        command = [sys.executable, str(Path(__file__)), "--spec", json.dumps(spec.dump()), "--ranks", str(ranks)]
        with (scratch / f"log{rank}").open("w") as log:
            running.append(
                subprocess.Popen(
                    [*command, "--json", str(scratch / f"result{rank}.json")],
                    env=environment | own,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        codes = [process.wait() for process in running]
    finally:
        for process in running:
            process.kill()
    failed = [
        f"rank {rank} ended with {code}:\n{(scratch / f'log{rank}').read_text()[-2000:]}"
        for rank, code in enumerate(codes)
        if code
    ]
    if failed:  # all of them: one that is killed takes the others with it
        raise SystemExit("\n".join(failed))
    results = [json.loads((scratch / f"result{rank}.json").read_text()) for rank in range(ranks)]
    slowest = max(results, key=lambda result: result["total_seconds"])
    return slowest | {"cpu_seconds": sum(result["cpu_seconds"] for result in results)}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One optimizer step on two processes, against one.")
    parser.add_argument("--model", default="smollm2", help="smollm2, tiny, a Hub id or a folder (default: smollm2)")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each, in turn; medians are reported")
    parser.add_argument("--tasks", type=int, default=4, help="an even number: half for each of two processes")
    parser.add_argument("--group", type=int, default=8, help="episodes per task")
    parser.add_argument("--chunks", type=int, default=3)
    parser.add_argument("--chunk-tokens", type=int, default=120)
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens sampled on every turn")
    parser.add_argument("--budget", type=int, default=2048, help="token positions of a training pass")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the raw figures here")
    parser.add_argument("--spec", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.tasks % 2:
        parser.error("--tasks: an even number is needed, so that two processes have equal work")
    return options


def main() -> None:
    options = parse()
    if options.spec is not None:
        options.json.write_text(json.dumps(contest(Spec(**options.spec), options.ranks)))
        return
    console = Console(width=None if sys.stdout.isatty() else 140)
    facts = machine(2)
    console.print(f"{facts['cpu']}, {facts['cores']} cores, load {facts['load_before']:.1f}, {facts['versions']}")
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in LAYOUTS}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        in_own_process(["--prepare", str(folder), "--model", options.model, "--seed", str(options.seed)], 2)
        for number in range(options.repeat):
            for name, (ranks, threads) in LAYOUTS.items():
                spec = Spec(
                    str(folder), options.tasks, options.group, options.chunks, options.chunk_tokens,
                    options.new_tokens, options.budget, threads, options.seed,
                )  # fmt: skip
                result = measure(spec, ranks, Path(scratch))
                runs[name].append(result)
                line = f"{name}, run {number + 1}: {result['total_seconds']:.2f} s, load {os.getloadavg()[0]:.1f}"
                console.print(line, highlight=False)
    same = {
        (result["episodes"], result["generated_tokens"], result["trained_tokens"])
        for own in runs.values()
        for result in own
    }
    assert len(same) == 1, f"the layouts did different work: {same}"

    table = Table(title="One optimizer step", title_justify="left")
    table.add_column("")
    for name in runs:
        table.add_column(name, justify="right")
    middle = {
        name: {key: statistics.median(result[key] for result in own) for key in ("total_seconds", "cpu_seconds")}
        for name, own in runs.items()
    }
    for key, label in (("total_seconds", "seconds"), ("cpu_seconds", "CPU seconds, all processes")):
        table.add_row(label, *(f"{figures[key]:.2f}" for figures in middle.values()))
    for phase in ("generate", "forward", "backward", "optimizer", "other"):
        values = [statistics.median(result["seconds"][phase] for result in own) for own in runs.values()]
        table.add_row(f"  {phase}", *(f"{value:.2f}" for value in values))
    console.print(table)
    one, two = middle.values()
    ratio = two["total_seconds"] / one["total_seconds"]
    console.print(
        f"two processes / one: {ratio:.3f} in seconds "
        f"(wanted: at most {MOST}, {'met' if ratio <= MOST else 'MISSED'}), "
        f"{two['cpu_seconds'] / one['cpu_seconds']:.3f} in CPU seconds"
    )
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": facts, "ratio": ratio, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()

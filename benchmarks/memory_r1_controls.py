"""What the Memory-R1 recipes learn, and what they do not learn without their reward, their retrieval or their memory.

    python benchmarks/memory_r1_controls.py                          three seeds of every recipe
    python benchmarks/memory_r1_controls.py --recipes quickstart --seeds 0

For every recipe and seed:

- ``true``      the recipe itself
- ``shuffled``  the same from the same warmed-up weights, rewards permuted inside each group
- ``random``    the trained model with what is retrieved for a question drawn at random (evaluation only)
- ``wiped``     the trained model with nothing retrieved for a question (evaluation only)

Sampled accuracy (temperature 1) is the honest number; greedy stands beside it. Every run is a real ``memfactory``
command in a process of its own; what is finished is not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from evaluated import evaluated

RECIPES = ("quickstart", "answerer-quickstart", "joint-quickstart")
Metrics = dict[str, float]


def memfactory(*arguments: str) -> None:
    """Run the command line; its output goes to this terminal."""
    subprocess.run([sys.executable, "-m", "memfactory.cli.main", *arguments], check=True)


def train(recipe: str, folder: Path, *overrides: str) -> dict[str, Any]:
    """Train into `folder` unless it is finished there, and return its summary."""
    summary = folder / "summary.json"
    if not summary.is_file() or json.loads(summary.read_text())["stopped"] != "finished":
        memfactory("train", f"memory_r1/{recipe}", "--resume", f"output_dir={folder}", *overrides)
    found: dict[str, Any] = json.loads(summary.read_text())
    return found


def evaluate(recipe: str, run: Path, control: str, seed: int) -> Metrics:
    """The trained model of `run` under a control of retrieval."""
    options = (f"seed={seed}", f"agent.retrieve.control={control}")
    return evaluated(f"memory_r1/{recipe}", run, run.parent / f"{run.name}-{control}", *options)


def one_seed(recipe: str, seed: int, out: Path) -> dict[str, Metrics]:
    """All conditions of one recipe and seed."""
    run = out / f"{recipe}-true-{seed}"
    true = train(recipe, run, f"seed={seed}")
    warmed = (f"seed={seed}", f"model.name={run / 'initial'}", "model.tiny=null", "warmup=null")
    shuffled = train(recipe, out / f"{recipe}-shuffled-{seed}", *warmed, "credit.shuffle_rewards=true")
    return {
        "before": true["before"],
        "true": true["after"] | {"wall": true["wall_seconds"], "memory": true["peak_memory_bytes"]},
        "shuffled": shuffled["after"],
        "random": evaluate(recipe, run, "random", seed),
        "wiped": evaluate(recipe, run, "empty", seed),
    }


def table(results: dict[int, dict[str, Metrics]]) -> str:
    """Markdown: sampled / greedy accuracy by condition and seed."""
    seeds = list(results)
    lines = ["| condition | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean sampled |"]
    lines.append("|---" * (len(seeds) + 2) + "|")
    for name in results[seeds[0]]:
        own = [results[seed][name] for seed in seeds]
        cells = [f"{m['sampled_em']:.2f} / {m['greedy_em']:.2f}" for m in own]
        lines.append(f"| {name} | {' | '.join(cells)} | {mean(m['sampled_em'] for m in own):.2f} |")
    wall = ", ".join(f"{results[seed]['true']['wall']:.0f}" for seed in seeds)
    return "\n".join([*lines, "", f"Seconds of the true runs: {wall}."])


def main() -> None:
    """Run what is not there yet and print a table for each recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/memory-r1-controls"))
    arguments = parser.parse_args()
    for recipe in arguments.recipes:
        results = {seed: one_seed(recipe, seed, arguments.out) for seed in arguments.seeds}
        print(f"\n### memory_r1/{recipe}\n\n{table(results)}\n", flush=True)


if __name__ == "__main__":
    main()

"""What RMM's reranker learns from citations, and what it does not learn without them: the runs and their controls.

    python benchmarks/rmm_controls.py                 three seeds, linear and GRPO; about 40 minutes on a quiet core
    python benchmarks/rmm_controls.py --seeds 0 --only linear --out my-controls

For every seed, from one and the same warmed-up language model:

- ``true``       the recipe itself
- ``shuffled``   linear: citations permuted over the draws of a rollout; GRPO: rewards permuted in each group
- ``rate 0``     learning rate 0
- ``random``     the trained reranker (linear) over entries that were retrieved at random (evaluation only)
- ``paper``      linear: optimizer, learning rate and baseline of the paper in as many questions

``recall`` is `retrieval.recall_at_k`, k = M, over the entries the answer was shown; sampled (the reranker draws) and
greedy (it takes the best). Every run is a real ``memfactory`` command in a process of its own.
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

Metrics = dict[str, float]
RECALL = "retrieval.recall_at_k"
LINEAR, GRPO = "rmm/quickstart", "rmm/grpo-quickstart"


def memfactory(*arguments: str) -> None:
    """Run the command line; its output goes to this terminal."""
    subprocess.run([sys.executable, "-m", "memfactory.cli.main", *arguments], check=True)


def train(recipe: str, folder: Path, *overrides: str) -> dict[str, Any]:
    """Train into `folder` unless its summary is there already, and return the summary."""
    summary = folder / "summary.json"
    if not summary.is_file() or json.loads(summary.read_text())["stopped"] != "finished":
        memfactory("train", recipe, "--resume", f"output_dir={folder}", *overrides)
    found: dict[str, Any] = json.loads(summary.read_text())
    return found


def warmed(folder: Path, seed: int) -> tuple[str, ...]:
    """Overrides that begin from the language model that the run in `folder` was warmed up to."""
    return (
        f"seed={seed}",
        f"model.name={folder / 'initial'}",
        "model.tiny=null",
        "warmup=null",
        "train.eval_strategy=no",
    )


def linear(seed: int, out: Path) -> dict[str, Metrics]:
    """All conditions of the linear reranker for one seed: metrics by condition."""
    first = out / f"linear-true-{seed}"
    true = train(LINEAR, first, f"seed={seed}", "train.eval_strategy=no")
    same = warmed(first, seed)

    def other(name: str, *overrides: str) -> Metrics:
        after: Metrics = train(LINEAR, out / f"linear-{name}-{seed}", *same, *overrides)["after"]
        return after

    control = (f"seed={seed}", "agent.retrieve.control=random")
    random = evaluated(LINEAR, first, out / f"linear-random-{seed}", *control)
    return {
        "before": true["before"],
        "true": true["after"] | {"wall": true["wall_seconds"]},
        "shuffled": other("shuffled", "agent.rerank.shuffle_citations=true"),
        "rate 0": other("rate0", "agent.rerank.lr=0"),
        "paper": other("paper", "agent.rerank.optimizer=sgd", "agent.rerank.lr=0.001", "agent.rerank.baseline=0.5"),
        "random": random,
    }


def grpo(seed: int, out: Path) -> dict[str, Metrics]:
    """All conditions of the language model as reranker for one seed."""
    first = out / f"grpo-true-{seed}"
    true = train(GRPO, first, f"seed={seed}", "train.eval_strategy=no")
    shuffled = train(GRPO, out / f"grpo-shuffled-{seed}", *warmed(first, seed), "credit.shuffle_rewards=true")
    return {
        "before": true["before"],
        "true": true["after"] | {"wall": true["wall_seconds"]},
        "shuffled": shuffled["after"],
    }


def table(results: dict[int, dict[str, Metrics]]) -> str:
    """Markdown: recall, sampled / greedy, and exact match by condition and seed."""
    seeds = list(results)
    lines = ["| condition | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean sampled recall |"]
    lines.append("|---" * (len(seeds) + 2) + "|")
    for name in results[seeds[0]]:
        cells = []
        for metrics in (results[seed][name] for seed in seeds):
            recall = f"{metrics[f'sampled_{RECALL}']:.2f} / {metrics[f'greedy_{RECALL}']:.2f}"
            cells.append(f"{recall} (em {metrics['sampled_em']:.2f} / {metrics['greedy_em']:.2f})")
        average = mean(results[seed][name][f"sampled_{RECALL}"] for seed in seeds)
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {average:.2f} |")
    return "\n".join(lines)


def checks(results: dict[int, dict[str, Metrics]], gain: float) -> list[tuple[str, bool]]:
    """The claims of docs/rmm.md, each with whether these runs bear it out."""

    def sampled(name: str) -> list[float]:
        return [result[name][f"sampled_{RECALL}"] for result in results.values()]

    rises = [after - before for after, before in zip(sampled("true"), sampled("before"), strict=True)]
    found = [(f"true: sampled recall rises by at least {gain:.2f} in every run", min(rises) >= gain)]
    for name in ("shuffled", "rate 0"):
        if name in next(iter(results.values())):
            held = max(sampled(name)) <= min(sampled("true")) - gain / 2
            found.append((f"{name}: every run stays {gain / 2:.2f} below every true run", held))
    return found


def main() -> int:
    """Run, print the tables and the checks; exit 1 if a check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", choices=["linear", "grpo"])
    parser.add_argument("--out", type=Path, default=Path("runs/rmm-controls"))
    arguments = parser.parse_args()
    held = True
    for name, one_seed, gain in (("linear", linear, 0.3), ("grpo", grpo, 0.3)):
        if arguments.only in (None, name):
            results = {seed: one_seed(seed, arguments.out) for seed in arguments.seeds}
            print(f"\n{name}: recall, sampled / greedy (exact match, sampled / greedy) on held-out dialogues\n")
            print(table(results))
            print()
            for claim, holds in checks(results, gain):
                print(f"{'holds ' if holds else 'FAILS '} {claim}")
                held &= holds
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())

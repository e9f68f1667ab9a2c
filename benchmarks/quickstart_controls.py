"""What the quickstart learns, and what it does not learn without its reward: the run and its controls.

    python benchmarks/quickstart_controls.py                 three seeds, about 20 minutes on two quiet cores
    python benchmarks/quickstart_controls.py --seeds 0 --out my-controls

For every seed, from one and the same warmed-up model:

- ``true``       the quickstart itself
- ``shuffled``   rewards permuted inside each group: they say nothing about the episode any more
- ``last turn``  only the answer is trained: no credit reaches the turns that write the memory
- ``wiped``      the trained model with its memory emptied before the answer (evaluation only)
- ``warm-up x2`` twice the supervised steps and no reinforcement learning

Sampled accuracy (temperature 1) is the honest number; greedy stands beside it. Every run is a real
``memfactory`` command in a process of its own.
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

RECIPE = "memagent/quickstart"


def memfactory(*arguments: str) -> None:
    """Run the command line; its output goes to this terminal."""
    subprocess.run([sys.executable, "-m", "memfactory.cli.main", *arguments], check=True)


def train(folder: Path, *overrides: str) -> dict[str, Any]:
    """Train into `folder` unless its summary is there already, and return the summary."""
    summary = folder / "summary.json"
    if not summary.is_file() or json.loads(summary.read_text())["stopped"] != "finished":
        memfactory("train", RECIPE, "--resume", f"output_dir={folder}", *overrides)
    return json.loads(summary.read_text())


def one_seed(seed: int, out: Path) -> dict[str, dict[str, float]]:
    """All conditions of one seed: metrics by condition."""
    true = train(out / f"true-{seed}", f"seed={seed}")
    warmed = (f"seed={seed}", f"model.name={out / f'true-{seed}' / 'initial'}", "model.tiny=null", "warmup=null")
    shuffled = train(out / f"shuffled-{seed}", *warmed, "credit.shuffle_rewards=true")
    last_turn = train(out / f"last-turn-{seed}", *warmed, "credit.assigner=last_turn")
    # one step with learning rate zero: the evaluation before it is the measurement
    more = train(
        out / f"more-warm-up-{seed}", f"seed={seed}", "warmup.steps=900", "train.max_steps=1", "train.learning_rate=0"
    )
    wiped = evaluated(RECIPE, out / f"true-{seed}", out / f"wiped-{seed}", f"seed={seed}", "agent.wipe_memory=true")
    return {
        "before": true["before"],
        "true": true["after"] | {"wall": true["wall_seconds"], "memory": true["peak_memory_bytes"]},
        "shuffled": shuffled["after"],
        "last turn": last_turn["after"],
        "wiped": wiped,
        "warm-up x2": more["before"],
    }


def checks(results: dict[int, dict[str, dict[str, float]]]) -> list[tuple[str, bool]]:
    """The claims of the README, each with whether these runs bear it out."""
    by = {name: [r[name]["sampled_em"] for r in results.values()] for name in next(iter(results.values()))}
    greedy = [r["true"]["greedy_em"] for r in results.values()]
    return [
        ("before: every sampled accuracy <= 0.20", max(by["before"]) <= 0.20),
        ("true: every sampled accuracy >= 0.65", min(by["true"]) >= 0.65),
        ("true: every greedy accuracy >= 0.90", min(greedy) >= 0.90),
        ("shuffled: mean sampled accuracy <= 0.25", mean(by["shuffled"]) <= 0.25),
        ("every true run >= every shuffled run + 0.30", min(by["true"]) >= max(by["shuffled"]) + 0.30),
        ("wiped: every sampled accuracy <= 0.02", max(by["wiped"]) <= 0.02),
        (
            "last turn: no run rises by more than 0.10",
            max(a - b for a, b in zip(by["last turn"], by["before"], strict=True)) <= 0.10,
        ),
        (
            "warm-up x2: no run rises by more than 0.10",
            max(a - b for a, b in zip(by["warm-up x2"], by["before"], strict=True)) <= 0.10,
        ),
        ("true: every run under 300 s", max(r["true"]["wall"] for r in results.values()) < 300),
        ("true: every run under 2 GB", max(r["true"]["memory"] for r in results.values()) < 2e9),
    ]


def table(results: dict[int, dict[str, dict[str, float]]]) -> str:
    """Markdown: sampled / greedy accuracy and retention by condition and seed."""
    seeds = list(results)
    lines = ["| condition | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean sampled |"]
    lines.append("|---" * (len(seeds) + 2) + "|")
    for name in results[seeds[0]]:
        cells = [
            f"{m['sampled_em']:.2f} / {m['greedy_em']:.2f} (keep {m.get('sampled_retain', float('nan')):.2f})"
            for m in (results[seed][name] for seed in seeds)
        ]
        average = mean(results[seed][name]["sampled_em"] for seed in seeds)
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {average:.2f} |")
    return "\n".join(lines)


def main() -> int:
    """Run, print the table and the checks; exit 1 if a check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/controls"))
    arguments = parser.parse_args()
    results = {seed: one_seed(seed, arguments.out) for seed in arguments.seeds}
    print("\nsampled / greedy exact match on 256 held-out tasks (keep: facts kept from chunk to chunk)\n")
    print(table(results))
    print()
    outcome = checks(results)
    for claim, holds in outcome:
        print(f"{'holds ' if holds else 'FAILS '} {claim}")
    for seed, result in results.items():
        print(f"seed {seed}: {result['true']['wall']:.0f} s, {result['true']['memory'] / 1e9:.2f} GB")
    return 0 if all(holds for _, holds in outcome) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Does a gate do what it is for? The quickstart with its gates on, and with the same gates only measured.

    python benchmarks/gated_controls.py                 three seeds, about 20 minutes on two quiet cores
    python benchmarks/gated_controls.py --seeds 0 --out my-runs

For every seed, from one and the same warmed-up model:

- ``measured``   the gates have weight 0: seen, and without effect
- ``geometric``  the recipe `memagent/quickstart-gated`
- ``veto``       the same with `aggregate.gate: veto`

Pass rates are shares of training episodes with every word of the memory supported, and of those with no turn
cut: of the first batch, and of the last eight together. Accuracy is on 256 held-out tasks.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

RECIPE = "memagent/quickstart-gated"
GATES = ("grounding.supported", "format.stopped")
MEASURED = (
    "rewards=["
    + ", ".join(
        [
            "{name: answer.exact_match, weight: 0.5}",
            "{name: answer.token_f1, weight: 0.5}",
            *(f"{{name: {gate}, role: gate, threshold: 1.0, weight: 0}}" for gate in GATES),
        ]
    )
    + "]"
)
CONDITIONS: dict[str, list[str]] = {"measured": [MEASURED], "geometric": [], "veto": ["aggregate.gate=veto"]}
LAST = 8
"""Batches averaged at the end."""


def train(folder: Path, *overrides: str) -> dict[str, Any]:
    """Train into `folder` unless its summary is there already; accuracy and pass rates."""
    summary_file = folder / "summary.json"
    if not summary_file.is_file() or json.loads(summary_file.read_text())["stopped"] != "finished":
        command = [sys.executable, "-m", "memfactory.cli.main", "train", RECIPE, "--resume", f"output_dir={folder}"]
        subprocess.run([*command, *overrides], check=True)
    summary = json.loads(summary_file.read_text())
    lines = [json.loads(line)["dimensions"] for line in (folder / "rewards.jsonl").read_text().splitlines()]
    rates = {gate: [line[gate]["pass_rate"] for line in lines] for gate in GATES}
    return {
        "before": summary["before"]["sampled_em"],
        "sampled": summary["after"]["sampled_em"],
        "greedy": summary["after"]["greedy_em"],
        "first": {gate: rate[0] for gate, rate in rates.items()},
        "last": {gate: mean(rate[-LAST:]) for gate, rate in rates.items()},
    }


def one_seed(seed: int, out: Path) -> dict[str, dict[str, Any]]:
    """All conditions of one seed, from the model that the first of them warmed up."""
    results: dict[str, dict[str, Any]] = {}
    warm: tuple[str, ...] = ()
    for name, overrides in CONDITIONS.items():
        folder = out / f"{name}-{seed}"
        results[name] = train(folder, f"seed={seed}", *overrides, *warm)
        warm = warm or (f"model.name={folder / 'initial'}", "model.tiny=null", "warmup=null")
    return results


def main() -> int:
    """Run, print the table and the checks; exit 1 if a check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/gated"))
    arguments = parser.parse_args()
    results = {seed: one_seed(seed, arguments.out) for seed in arguments.seeds}
    print("\n| condition | seed | sampled | greedy | " + " | ".join(f"{gate} passes" for gate in GATES) + " |")
    print("|---" * (4 + len(GATES)) + "|")
    for name in CONDITIONS:
        for seed, by in results.items():
            own = by[name]
            rates = " | ".join(f"{own['first'][gate]:.2f} -> {own['last'][gate]:.2f}" for gate in GATES)
            print(f"| {name} | {seed} | {own['sampled']:.3f} | {own['greedy']:.3f} | {rates} |")

    def average(name: str, value: Any) -> float:
        return mean(value(by[name]) for by in results.values())

    support = GATES[0]
    claims = []
    for name in ("geometric",):  # what a veto does is in the table: it learns more slowly
        rises = min(by[name]["last"][support] - by[name]["first"][support] for by in results.values())
        more = average(name, lambda r: r["last"][support]) - average("measured", lambda r: r["last"][support])
        less = average("measured", lambda r: r["sampled"]) - average(name, lambda r: r["sampled"])
        claims += [
            (f"{name}: the pass rate of {support} rises in every seed", rises, rises > 0.2),
            (f"{name}: it ends no more than 0.02 below that of `measured`, in the mean", more, more >= -0.02),
            (f"{name}: sampled accuracy is at most 0.03 below that of `measured`, in the mean", less, less <= 0.03),
        ]
    print()
    for claim, figure, holds in claims:
        print(f"{'holds ' if holds else 'FAILS '} {claim} ({figure:+.3f})")
    return 0 if all(holds for _, _, holds in claims) else 1


if __name__ == "__main__":
    sys.exit(main())

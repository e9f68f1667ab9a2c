"""What one optimizer step of a memory agent costs: ours against four others, measured in one run.

    python benchmarks/step.py                     # everything, about 20 minutes on 2 quiet cores
    python benchmarks/step.py --model tiny        # the same script on a toy model, half a minute
    python benchmarks/step.py --only ours,handwritten --repeat 3

Every contestant runs in a process of its own. See benchmarks/README.md for what each one does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from workload import Spec, prepare_model

CONTESTANTS = ("ours", "ours_unshared", "handwritten", "generate_only", "plain_trl", "naive")
REFERENCE = {"tasks": 4, "group": 8, "chunks": 3, "chunk_tokens": 120, "new_tokens": 32, "budget": 2048, "threads": 2}
"""The workload the targets belong to (with --model smollm2)."""
LARGER = {"tasks": 2, "group": 16, "chunks": 3, "chunk_tokens": 512, "new_tokens": 96, "budget": 2048, "threads": 2}
"""Nearer to the papers' proportions, for shared prefixes."""


@dataclass(frozen=True)
class Ratio:
    """A ratio, what it should be, and whether it is; `value` is None when a contestant did not run."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return (self.low is None or self.value >= self.low) and (self.high is None or self.value <= self.high)

    @property
    def target(self) -> str:
        return f">= {self.low}" if self.low is not None else f"<= {self.high}"


def contest(name: str, spec: Spec) -> dict[str, Any]:
    """Run contestant `name` in this process."""
    import torch

    torch.set_num_threads(spec.threads)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    transformers.set_seed(spec.seed)
    if name.startswith("ours"):
        import ours

        return ours.run(spec, bf16="bf16" in name, share_prefix="unshared" not in name).dump()
    if name == "handwritten":
        import handwritten

        return handwritten.run(spec).dump()
    if name == "generate_only":
        import handwritten

        return handwritten.run_generate_only(spec).dump()
    if name == "plain_trl":
        import plain_trl

        return plain_trl.run(spec).dump()
    import naive

    return naive.run(spec).dump()


def in_own_process(arguments: list[str], threads: int) -> None:
    """This script again with `arguments`; its output is shown only if it fails.

    Raises:
        SystemExit: it failed.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable, str(Path(__file__)), *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments[:2])} failed:\n{done.stdout[-4000:]}")


def measure(
    name: str, spec: Spec, repeat: int, console: Console, scratch: Path, *, in_process: bool = False
) -> list[dict[str, Any]]:
    """`repeat` runs of a contestant, each in a fresh process unless `in_process`."""
    results = []
    for number in range(repeat):
        out = scratch / "result.json"
        label = f"{name} ({spec.tasks} tasks, {spec.chunks} chunks, run {number + 1} of {repeat})"
        arguments = ["--contestant", name, "--spec", json.dumps(spec.dump()), "--json", str(out)]
        start = time.perf_counter()
        with console.status(label):
            if in_process:
                result = contest(name, spec)
            else:
                in_own_process(arguments, spec.threads)
                result = json.loads(out.read_text())
        results.append(result)
        console.print(
            f"{label}: {result['total_seconds']:.1f} s a step, {time.perf_counter() - start:.0f} s with loading"
        )
    return results


def middle(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The run with the median step time."""
    return sorted(results, key=lambda result: result["total_seconds"])[(len(results) - 1) // 2]


def rates(result: dict[str, Any]) -> dict[str, float | None]:
    """Derived figures: per second of the whole step, except ``computed`` (of forward and backward)."""
    total, seconds = result["total_seconds"], result["seconds"]
    train = seconds["forward"] + seconds["backward"]
    return {
        "episodes_per_second": result["episodes"] / total,
        "generated_per_second": result["generated_tokens"] / seconds["generate"],
        "trained_per_second": result["trained_tokens"] / train if train else None,
        "computed_per_second": result["computed_tokens"] / train if train else None,
        "other_share": seconds["other"] / total,
        "real_over_computed_prefill": result["real_over_computed_prefill"] or None,
        "real_over_computed": result["real_tokens"] / result["computed_tokens"] if result["computed_tokens"] else None,
    }


def ratios(best: dict[str, dict[str, Any]], *, larger: bool = False, alone: bool = False) -> list[Ratio]:
    """Ours against each of the others, with the project's targets."""

    def quotient(a: str, b: str, phase: str = "") -> float | None:
        if a not in best or b not in best:
            return None
        first, second = (best[name]["seconds"][phase] if phase else best[name]["total_seconds"] for name in (a, b))
        return first / second

    if alone:
        return [Ratio("ours / prefixes not shared, seconds a step", quotient("ours", "ours_unshared"), high=1.03)]
    own = rates(best["ours"]) if "ours" in best else {}
    unshared = rates(best["ours_unshared"]) if "ours_unshared" in best else {}
    shared = [
        Ratio(
            "prefixes not shared / ours, seconds a step",
            quotient("ours_unshared", "ours"),
            low=2.5 if larger else 1.8,
        ),
        Ratio("tokens of rows over those computed in training, ours", own.get("real_over_computed"), low=2.5),
        Ratio("tokens of prompts over those prefilled, ours", own.get("real_over_computed_prefill"), low=2.5),
    ]
    if larger:
        return shared
    return [
        *shared,
        Ratio("ours / handwritten, seconds a step", quotient("ours", "handwritten"), high=1.1),
        Ratio("naive / ours, seconds a step", quotient("naive", "ours"), low=2.0),
        Ratio("plain TRL / ours, seconds a step", quotient("plain_trl", "ours"), low=1.6),
        Ratio(
            "ours / raw model.generate, seconds generating", quotient("ours", "generate_only", "generate"), high=1.1
        ),
        Ratio("share of ours outside generate, forward, backward, optimizer", own.get("other_share"), high=0.05),
        Ratio("real over computed tokens in training, unshared", unshared.get("real_over_computed"), low=0.95),
    ]


def scaling(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How time and memory grow over runs of `ours`: each against the first, per row."""
    base = results[0]
    return [
        {
            "tasks": result["spec"]["tasks"],
            "chunks": result["spec"]["chunks"],
            "rows": result["rows"],
            "total_seconds": result["total_seconds"],
            "seconds_per_row_over_first": (result["total_seconds"] / result["rows"])
            / (base["total_seconds"] / base["rows"]),
            "peak_bytes": result["peak_bytes"],
            "peak_over_first": result["peak_bytes"] / base["peak_bytes"],
        }
        for result in results
    ]


def show(console: Console, report: dict[str, Any]) -> None:
    """Print the tables."""
    results = report["results"]
    table = Table(title="One optimizer step", title_justify="left")
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")

    def row(label: str, values: list[float | None], form: str) -> None:
        table.add_row(label, *("-" if value is None else format(value, form) for value in values))

    runs, derived = list(results.values()), list(report["rates"].values())
    row("seconds, total", [run["total_seconds"] for run in runs], ".1f")
    for phase in ("generate", "recompute", "forward", "backward", "optimizer", "other"):
        label = {"recompute": "  old log-probs again", "other": "  everything else"}.get(phase, f"  {phase}")
        row(label, [run["seconds"][phase] for run in runs], ".2f")
    row("share of everything else", [rate["other_share"] for rate in derived], ".1%")
    row("CPU seconds", [run["cpu_seconds"] for run in runs], ".1f")
    row("episodes / s", [rate["episodes_per_second"] for rate in derived], ".3f")
    row("generated tokens / s of generation", [rate["generated_per_second"] for rate in derived], ".1f")
    row("trained tokens / s of training", [rate["trained_per_second"] for rate in derived], ".1f")
    row("computed tokens / s of training", [rate["computed_per_second"] for rate in derived], ".0f")
    row("real / computed tokens in training", [rate["real_over_computed"] for rate in derived], ".3f")
    row("real / computed tokens in prefill", [rate["real_over_computed_prefill"] for rate in derived], ".3f")
    row("prompt tokens", [run["prompt_tokens"] for run in runs], "d")
    row("generated tokens", [run["generated_tokens"] for run in runs], "d")
    row("trained tokens", [run["trained_tokens"] for run in runs], "d")
    row("peak memory, GB", [run["peak_bytes"] / 1e9 for run in runs], ".2f")
    row("gradient norm", [run["gradient_norm"] for run in runs], ".3g")
    console.print(table)

    table = Table(title="Ratios and targets", title_justify="left")
    for column in ("", "measured", "target", ""):
        table.add_column(column)
    for ratio in report["ratios"]:
        verdict = {True: "met", False: "MISSED", None: "not measured"}[ratio["met"]]
        if not report["reference"]:
            verdict += " (not the reference workload)" if ratio["met"] is not None else ""
        table.add_row(
            ratio["name"], "-" if ratio["value"] is None else f"{ratio['value']:.3f}", ratio["target"], verdict
        )
    console.print(table)

    if len(report["scaling"]) > 1:
        table = Table(title="Growth of ours: memory should stay, seconds per row should stay", title_justify="left")
        for column in ("tasks", "chunks", "rows", "seconds", "seconds a row / first", "peak GB", "peak / first"):
            table.add_column(column, justify="right")
        for line in report["scaling"]:
            table.add_row(
                str(line["tasks"]),
                str(line["chunks"]),
                str(line["rows"]),
                f"{line['total_seconds']:.1f}",
                f"{line['seconds_per_row_over_first']:.3f}",
                f"{line['peak_bytes'] / 1e9:.2f}",
                f"{line['peak_over_first']:.3f}",
            )
        console.print(table)


def machine(threads: int) -> dict[str, Any]:
    """Where and with what this was measured."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        model = next((s.partition(":")[2].strip() for s in info.read_text().splitlines() if "model name" in s), model)
    packages = ("torch", "transformers", "trl", "accelerate")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": threads,
        "load_before": os.getloadavg()[0],
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in packages},
    }


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Cost of one optimizer step, ours against others.")
    parser.add_argument("--model", default="smollm2", help="smollm2, tiny, a Hub id or a folder (default: smollm2)")
    parser.add_argument("--only", default="", help=f"contestants, from {', '.join((*CONTESTANTS, 'ours_bf16'))}")
    parser.add_argument("--bf16", action="store_true", help="also ours in bfloat16 autocast, float32 weights")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each contestant; the median one is reported")
    parser.add_argument("--tasks", type=numbers, default=[4], help="tasks; more than one (4,8): growth of ours")
    parser.add_argument("--chunks", type=numbers, default=[3], help="chunks; more than one (3,6,12): growth of ours")
    parser.add_argument("--group", type=int, default=8, help="episodes per task")
    parser.add_argument("--chunk-tokens", type=int, default=120)
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens sampled on every turn")
    parser.add_argument("--budget", type=int, default=2048, help="token positions of a training pass")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alone", action="store_true", help="no prompt begins like another (ours, ours_unshared)")
    parser.add_argument("--json", type=Path, help="write the raw figures here")
    parser.add_argument(
        "--in-process", action="store_true", help="all in one process: quick for tests, but memory is not told apart"
    )
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--spec", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    known = (*CONTESTANTS, "ours_bf16")
    options.names = options.only.split(",") if options.only else [*CONTESTANTS, *["ours_bf16"] * options.bf16]
    if options.alone and not set(options.names) <= {"ours", "ours_unshared"}:
        parser.error("--alone: only ours and ours_unshared have such a workload; add --only ours,ours_unshared")
    for name in options.names:
        if name not in known:
            parser.error(f"--only: no contestant is called '{name}'; choose from {', '.join(known)}")
    return options


def main() -> None:
    options = parse()
    if options.prepare is not None:
        prepare_model(options.model, options.prepare, options.seed)
        return
    if options.contestant is not None:
        options.json.write_text(json.dumps(contest(options.contestant, Spec(**options.spec))))
        return

    console = Console(width=None if sys.stdout.isatty() else 140)
    facts = machine(options.threads)
    console.print(f"{facts['cpu']}, {options.threads} of {facts['cores']} cores, {facts['versions']}")
    if facts["load_before"] > 0.5:
        console.print(
            f"the machine is not quiet (load {facts['load_before']:.1f}): times will be too long, and unevenly"
        )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        with console.status(f"preparing {options.model}"):
            if options.in_process:
                prepare_model(options.model, folder, options.seed)
            else:
                arguments = ["--prepare", str(folder), "--model", options.model, "--seed", str(options.seed)]
                in_own_process(arguments, options.threads)
        sizes = [(options.tasks[0], chunks) for chunks in options.chunks]
        sizes += [(tasks, options.chunks[0]) for tasks in options.tasks[1:]]
        specs = [
            Spec(
                str(folder), tasks, options.group, chunks, options.chunk_tokens, options.new_tokens, options.budget,
                options.threads, options.seed, options.alone,
            )
            for tasks, chunks in sizes
        ]  # fmt: skip
        runs = {
            name: measure(name, specs[0], options.repeat, console, Path(scratch), in_process=options.in_process)
            for name in options.names
        }
        grown = [middle(measure("ours", spec, 1, console, Path(scratch))) for spec in specs[1:]]

    best = {name: middle(results) for name, results in runs.items()}
    size = {key: value for key, value in specs[0].dump().items() if key in REFERENCE}
    report = {
        "schema": 1,
        "model": options.model,
        "workload": size | {"seed": options.seed, "alone": options.alone},
        "reference": options.model == "smollm2" and size in (REFERENCE, LARGER),
        "machine": facts,
        "results": best,
        "rates": {name: rates(result) for name, result in best.items()},
        "ratios": [
            {"name": ratio.name, "value": ratio.value, "target": ratio.target, "met": ratio.met}
            for ratio in ratios(best, larger=size == LARGER, alone=options.alone)
        ],
        "scaling": scaling([best["ours"], *grown]) if "ours" in best else [],
        "runs": runs,
    }
    for name, results in runs.items():
        if len(results) > 1:
            seconds = [result["total_seconds"] for result in results]
            console.print(f"{name}: {min(seconds):.1f} to {max(seconds):.1f} s, mean {statistics.mean(seconds):.1f} s")
    show(console, report)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

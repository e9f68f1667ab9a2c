"""What a person sees while a run goes on, and what is written down."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from memfactory.runs import RunFolder


def progress_bar(console: Console) -> Progress:
    """The bar used for all long work: what, how far, elapsed, left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def verdict(logs: dict[str, float]) -> str:
    """One line on whether groups carry signal, and why the others do not."""
    groups, dead = logs.get("groups/count"), logs.get("groups/dead_share")
    if groups is None or dead is None:
        return ""
    live = 1 - dead
    reasons = {
        "all right": logs.get("groups/solved_share", 0.0),
        "all wrong": logs.get("groups/failed_share", 0.0),
        "all equal": logs.get("groups/tied_share", 0.0),
        "not scored": logs.get("groups/unmeasured_share", 0.0),
    }
    why = ", ".join(f"{share:.0%} {reason}" for reason, share in reasons.items() if share > 0)
    text = f"{live:.0%} of {groups:.0f} groups teach" + (f" ({why})" if why else "")
    if live == 0:
        worst = max(reasons, key=lambda reason: reasons[reason])
        advice = {
            "all right": "the tasks are too easy now",
            "all wrong": "the tasks are too hard or the reward is broken",
            "all equal": "the reward does not tell episodes apart",
            "not scored": "the reward could not be measured",
        }[worst]
        text += f" -> no update: {advice}"
    return text


def gates(logs: dict[str, float]) -> str:
    """How many episodes pass each gate, worst first; empty without gates."""
    end = "/pass_rate"  # a name can have slashes of its own: path/file.py:name
    rates = {key.removeprefix("rewards/").removesuffix(end): v for key, v in logs.items() if key.endswith(end)}
    worst = sorted((rate, name) for name, rate in rates.items() if not math.isnan(rate))[:3]
    return "".join(f"  {name} passes {rate:.0%}" for rate, name in worst)


class RunLog(TrainerCallback):
    """Writes metrics to the run folder and prints one line per log step."""

    def __init__(self, run: RunFolder | None, console: Console, total_steps: int) -> None:
        self.run = run
        self.console = console
        self.total_steps = total_steps
        self.progress = progress_bar(console)
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.progress.start()
            self._bar = self.progress.add_task("train", total=state.max_steps, completed=state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.stop()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self.progress.update(self._bar, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        numbers = {k: _number(v) for k, v in logs.items() if k not in ("epoch", "num_tokens", "step_time")}
        if self.run is not None:
            self.run.log_metrics(state.global_step, numbers, phase="train")
        seconds = sum(
            logs.get(f"time/{part}") or 0.0 for part in ("wait", "generate", "reward", "train", "optimizer", "other")
        )
        self.progress.console.print(
            f"step {state.global_step:>4}/{state.max_steps}  reward {_shown(logs.get('reward'))} "
            f"± {logs.get('reward_std') or 0.0:.2f}{gates(logs)}  {verdict(logs)}  {seconds:.1f} s",
            highlight=False,
            soft_wrap=True,
        )

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        if metrics and state.is_world_process_zero:
            line = f"step {state.global_step:>4}  held out: {describe(metrics, 'eval_')}"
            self.progress.console.print(line, highlight=False, soft_wrap=True)


def describe(metrics: dict[str, float], prefix: str = "") -> str:
    """Sampled accuracy first, greedy beside it."""
    parts = [f"accuracy {metrics[f'{prefix}sampled_em']:.3f} sampled"]
    if f"{prefix}greedy_em" in metrics:
        parts.append(f"{metrics[f'{prefix}greedy_em']:.3f} greedy")
    if f"{prefix}sampled_retain" in metrics:
        parts.append(f"facts kept per chunk {metrics[f'{prefix}sampled_retain']:.2f}")
    return ", ".join(parts)


def _shown(value: float | None) -> str:
    return "not measured" if value is None or math.isnan(value) else f"{value:.3f}"


def _number(value: Any) -> float | None:
    """Numbers as they are; TRL logs some (grad_norm, learning_rate) as text in newer versions."""
    if value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None

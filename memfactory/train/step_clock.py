"""What happens around an optimizer step: its time is split into phases, weights are checked, prompts entered."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback


class StepClock(TrainerCallback):
    """Splits the wall time of an optimizer step of `trainer` into phases and logs them in seconds."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._optimizer_start = 0.0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._optimizer_start = time.perf_counter()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._seconds["optimizer"] += time.perf_counter() - self._optimizer_start

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.health.check_weights(f"the weights at step {state.global_step}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer.health.check_weights()
        trainer.ledger.update(state.global_step, last=state.global_step >= state.max_steps)
        now = time.perf_counter()
        wall = now - trainer._window_start if trainer._window_start is not None else 0.0
        seconds = dict(trainer._seconds)
        seconds["other"] = max(wall - sum(seconds.values()), 0.0)
        metrics = trainer._metrics["train"]
        for phase in ("generate", "reward", "optimizer", "other"):
            metrics[f"time/{phase}"].append(seconds[phase])
        metrics["time/train"].append(seconds["forward"] + seconds["backward"])
        for phase, value in seconds.items():
            trainer.total_seconds[phase] += value
        trainer._seconds = dict.fromkeys(trainer._seconds, 0.0)
        trainer._window_start = now

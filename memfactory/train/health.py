"""Numbers that are no numbers stop a run before they reach the weights or a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from memfactory.errors import EngineError

_FIX = (
    "what is saved is not touched by it. In a new run (output_dir=...) lower train.learning_rate or "
    "train.max_grad_norm, look at the last lines of metrics.jsonl for what grew before it, and begin from a saved "
    "model: model.name=RUN/checkpoints/checkpoint-N"
)


class Health:
    """Checks of one trainer. Ranks come to the same verdict, so that all of them stop."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.losses: list[torch.Tensor] = []
        """Of the training steps since the last update."""

    def check_gradients(self, norm: Any) -> None:
        """Before an update.

        Args:
            norm: of the gradient, as the trainer is about to log it; None where an engine has none yet.

        Raises:
            EngineError: it, or a loss that it comes from, is not finite.
        """
        losses, self.losses = self.losses, []
        if getattr(self.trainer.accelerator, "scaler", None) is not None:
            return  # float16: a gradient that overflows is skipped, and the scale lowered, by the scaler
        loss = float(torch.stack(losses).sum()) if losses else 0.0
        size = _number(norm) if norm is not None else 0.0
        if not self._anywhere(not (math.isfinite(loss) and math.isfinite(size))):
            return
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        bad = (n for n, p in model.named_parameters() if p.grad is not None and not _finite([p.grad]))
        raise EngineError(
            f"step {self.trainer.state.global_step + 1}: the gradient is not finite, so no update was made",
            f"loss {loss}, norm of the gradient {size}, first in {next(bad, 'another process')}",
            _FIX,
        )

    def check_weights(self, what: str = "") -> None:
        """After an update, and before anything is sampled or saved.

        Args:
            what: which weights, in words, all of them; default the trained ones after the step that was just made.

        Raises:
            EngineError: one of them is not finite.
        """
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        looked_at = {name: p for name, p in model.named_parameters() if what or p.requires_grad}
        if not self._anywhere(not _finite(looked_at.values())):
            return
        bad = (name for name, parameter in looked_at.items() if not _finite([parameter]))
        what = what or f"the weights after step {self.trainer.state.global_step}"
        raise EngineError(f"{what} are not finite", f"first in {next(bad, 'another process')}", _FIX)

    def _anywhere(self, bad: bool) -> bool:
        return bool(self.trainer.ranks.max(int(bad)))


def _finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether all numbers in `tensors` are finite: one number per device comes back, not one per tensor."""
    with torch.no_grad():
        filled = [t.detach() for t in tensors if t.numel() and t.is_floating_point()]
        return not filled or math.isfinite(_number(torch.nn.utils.get_total_norm(filled, norm_type=math.inf)))


def _number(value: Any) -> float:
    return float(value.full_tensor() if hasattr(value, "full_tensor") else value)

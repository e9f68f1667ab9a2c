"""Log-probabilities of completion tokens without computing anything on padding or prompts' heads.

TRL's layout is [left padding | prompt | completion | right padding]. Two things in it cost time: rows
are as wide as the longest prompt plus the longest completion, and on devices without Triton the LM
head is applied to every position. Here rows are shifted left, so the width is the longest whole row,
and the backbone's output is cut down to the positions that predict a completion token before the head
sees it. Causal attention never looks right, so the padding behind a row needs no mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class CompletionScorer:
    """Calls a model that has TRL's fused LM head on completion positions only.

    It hooks the backbone of `model` (the unwrapped model; PEFT's base model for adapters). Outside of
    :meth:`score` the hook does nothing, so generation and saving are untouched.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._keep: Tensor | None = None
        model.base_model.register_forward_hook(self._select)

    def _select(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._keep is not None:
            output.last_hidden_state = output.last_hidden_state[self._keep].unsqueeze(0)  # (1, N, H)
        return output

    def score(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, width: int, **options: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probs and entropies (B, T) of the last `width` = T columns; zero on padding.

        Args:
            model: the (wrapped) model whose backbone is hooked.
            input_ids: (B, P + T), prompts padded left, completions padded right.
            attention_mask: (B, P + T), 1 on real tokens.
            width: T.
            options: further arguments of the forward pass.

        Returns:
            log-probs, entropies (None where the head does not compute them), auxiliary loss (or None).
        """
        size, columns = input_ids.shape
        real = attention_mask.bool()
        left = real.int().argmax(1)  # (B,) columns of left padding
        lengths = real.sum(1)  # (B,)
        longest = int(lengths.max())
        offsets = torch.arange(longest, device=input_ids.device)
        source = (left[:, None] + offsets).clamp(max=columns - 1)  # (B, L)
        compact_ids = input_ids.gather(1, source)
        scored = real.clone()
        scored[:, : columns - width] = False  # (B, P + T), the completion tokens
        # hidden state j predicts token j + 1
        keep = scored.gather(1, source) & (offsets < lengths[:, None])
        keep = torch.cat([keep[:, 1:], keep.new_zeros(size, 1)], dim=1)  # (B, L)
        self._keep = keep
        try:
            output = model(
                input_ids=compact_ids,
                attention_mask=(offsets < lengths[:, None]).long() if options.get("output_router_logits") else None,
                shift_labels=input_ids[scored].unsqueeze(0),  # (1, N), row-major like the kept states
                fused_lm_head=True,
                **options,
            )
        finally:
            self._keep = None

        def spread(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            return values.new_zeros(size, columns).masked_scatter(scored, values.squeeze(0))[:, columns - width :]

        log_probs = spread(output.log_probs)
        assert log_probs is not None
        return log_probs, spread(output.entropy), getattr(output, "aux_loss", None)

"""Log-probabilities of completion tokens without computing anything on padding or prompts' heads.

TRL's layout is [left padding | prompt | completion | right padding]. Two things in it cost time: rows
are as wide as the longest prompt plus the longest completion, and on devices without Triton the LM
head is applied to every position. Here rows are shifted left, so the width is the longest whole row,
and the backbone's output is cut down to the positions that predict a completion token before the head
sees it. Causal attention never looks right, so the padding behind a row needs no mask. Rows that begin alike are
packed (:mod:`memfactory.policy.prefix_sharing`), where that saves anything, and passes over rows that begin alike are
joined (:mod:`memfactory.policy.stem`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import PreTrainedModel

from memfactory.policy.prefix_sharing import Packed, unique_ids, worth
from memfactory.policy.prefix_support import Support
from memfactory.policy.stem import Junction, Owed, Stem


class CompletionScorer:
    """Calls a model that has TRL's fused LM head on completion positions only.

    It hooks the backbone of `model` (the unwrapped model; PEFT's base model for adapters). Outside of
    :meth:`score` the hook does nothing, so generation and saving are untouched.

    Args:
        share_prefix: compute what rows have in common once, if the model lets itself.
    """

    def __init__(self, model: PreTrainedModel, *, share_prefix: bool = False) -> None:
        self._keep: Tensor | None = None
        self._stem = Stem()
        self._owed: Owed | None = None
        self.sharing = Support(model, share_prefix)
        model.base_model.register_forward_hook(self._select)

    def _select(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._keep is not None and self._keep.dtype == torch.bool:
            output.last_hidden_state = output.last_hidden_state[self._keep].unsqueeze(0)  # (1, N, H)
        elif self._keep is not None:  # places, some more than once
            output.last_hidden_state = embedding(self._keep, output.last_hidden_state[0]).unsqueeze(0)  # (1, N, H)
        return output

    def positions(self, rows: Sequence[list[int]], stem: Sequence[int] = (), *, joined: bool = False) -> int:
        """Positions that the backbone computes for `rows` of ids.

        Args:
            stem: that they continue.
            joined: the pass before continues these rows.
        """
        padded = len(rows) * max(map(len, rows), default=0)
        unique = unique_ids(rows, stem) if self.sharing.available else padded
        return unique if stem or joined or worth(padded, unique) else padded

    @contextmanager
    def continuing(self, model: nn.Module, stem: list[int], device: torch.device, *, join_in: bool) -> Iterator[None]:
        """Inside, rows continue `stem`, and take over the gradients that rows before them have for them.

        A pass without gradients computes what the stem does not have in common with the one before, which `join_in`
        asks for on a rank that has nothing to compute when another one has.
        """

        def forward(**arguments: Any) -> None:
            # by the same modules as when rows are scored: under ZeRO-3 each gathers its own weights
            self._call(
                model, torch.zeros(1, dtype=torch.long, device=device), arguments["input_ids"][:, :1], arguments
            )

        self._owed = self._stem.move(forward, stem, device, join_in=join_in)
        try:
            yield
        finally:
            self._owed = None

    def _call(self, model: nn.Module, keep: Tensor, labels: Tensor, arguments: dict[str, Any]) -> Any:
        """What the head makes of the hidden states at `keep`, whose next ids are `labels` (1, N)."""
        self._keep = keep
        try:
            return model(shift_labels=labels, fused_lm_head=True, **arguments)
        finally:
            self._keep = None

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
        scored = real.clone()
        scored[:, : columns - width] = False  # (B, P + T), the completion tokens
        packed = None
        joint = None
        if self.sharing.settle(model, input_ids.device) and not options:  # a router's loss counts every token
            rows = [ids[own].tolist() for ids, own in zip(input_ids.cpu(), real.cpu(), strict=True)]
            if self._owed is not None and (self._stem.ids or self._owed):
                packed = Packed(rows, self._stem.ids)
                joint = Junction(self._stem, self._owed, packed, rows, input_ids.device)
            else:
                packed = Packed(rows)
                if not worth(size * int(real.sum(1).max()), packed.unique):
                    packed = None
        if packed is not None:
            forward, keep = self._shared(packed, scored, joint)
        else:
            forward, keep = self._separate(input_ids, real, scored)
            if not options.get("output_router_logits"):
                forward["attention_mask"] = None
        # labels are row-major like the kept states
        output = self._call(model, keep, input_ids[scored].unsqueeze(0), forward | options)

        def spread(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            return values.new_zeros(size, columns).masked_scatter(scored, values.squeeze(0))[:, columns - width :]

        log_probs = spread(output.log_probs)
        assert log_probs is not None
        return log_probs, spread(output.entropy), getattr(output, "aux_loss", None)

    @staticmethod
    def _shared(packed: Packed, scored: Tensor, joint: Junction | None) -> tuple[dict[str, Any], Tensor]:
        """Arguments of the forward pass, and where it predicts the scored tokens: places (N,), row by row."""
        keep = []
        for path, count in zip(packed.paths, scored.sum(1).tolist(), strict=True):
            last = len(path) - 1  # hidden state j predicts token j + 1
            keep.append(path[last - count : last] - len(packed.known))
        return packed.whole(scored.device, joint).arguments(), torch.cat(keep).to(scored.device)

    @staticmethod
    def _separate(input_ids: Tensor, real: Tensor, scored: Tensor) -> tuple[dict[str, Any], Tensor]:
        """The same for rows beside each other; which positions (B, L) predict."""
        left = real.int().argmax(1)  # (B,) columns of left padding
        lengths = real.sum(1)  # (B,)
        longest = int(lengths.max())
        offsets = torch.arange(longest, device=input_ids.device)
        source = (left[:, None] + offsets).clamp(max=input_ids.shape[1] - 1)  # (B, L)
        # hidden state j predicts token j + 1
        keep = scored.gather(1, source) & (offsets < lengths[:, None])
        keep = torch.cat([keep[:, 1:], keep.new_zeros(len(keep), 1)], dim=1)  # (B, L)
        return {"input_ids": input_ids.gather(1, source), "attention_mask": (offsets < lengths[:, None]).long()}, keep

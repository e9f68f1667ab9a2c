"""`memfactory` where TRL's asynchronous trainer runs on a CPU: its attention needs FlashAttention 3, and it asks CUDA
for the name of the device. For tests only; arguments are those of `memfactory`."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends_q: torch.Tensor,
    ends_k: torch.Tensor,
    longest_q: int,
    longest_k: int,
    *,
    softmax_scale: float | None = None,
    **options: Any,
) -> torch.Tensor:
    """Causal attention of packed segments, each to the end of its own keys.

    Args:
        query: (N, H, D); key and value (K, G, D) with G a divisor of H; ends are (S + 1,).
    """
    if not options.pop("causal"):
        raise NotImplementedError("only causal attention")
    out = torch.empty_like(query)
    repeat = query.shape[1] // key.shape[1]
    for number in range(len(ends_q) - 1):
        own, seen = slice(*ends_q[number : number + 2].tolist()), slice(*ends_k[number : number + 2].tolist())
        q, k, v = (x.transpose(0, 1)[None] for x in (query[own], key[seen], value[seen]))  # (1, H, T, D)
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        out[own] = scaled_dot_product_attention(q, k, v, mask, scale=softmax_scale)[0].transpose(0, 1)
    return out


def patch() -> None:
    """The two places of TRL that need a GPU."""
    from trl.experimental.async_grpo import async_grpo_trainer, packing

    kernel = SimpleNamespace(flash_attn_varlen_func=attention)
    packing._flash_attn = lambda: kernel  # type: ignore[assignment]
    async_grpo_trainer.get_peak_flops_per_device = lambda accelerator, dtype: None


if __name__ == "__main__":
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from memfactory.cli.main import main

    patch()
    main()

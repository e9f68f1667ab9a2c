"""Matrix products with few rows, on all threads of a CPU.

A decoding step multiplies as many rows as there are sequences. Intel's library, with which torch computes float32 on
x86, takes one thread alone for ``x @ W.T`` with fewer than 64 rows; the same product the other way round,
``(W @ x.T).T``, it divides over all of them. Measured on two cores (AVX-512), W of 576 x 1,536: 2.2 times faster with
16 rows, 2.1 with 32, 2.0 with 48, and slower from 64 rows on and below 16. Sums are added in another order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

ROWS = range(16, 64)
LEAST = 1 << 16
"""Smallest number of weights: below it a product takes as long as what surrounds it."""


def gaining(model: nn.Module) -> list[nn.Linear]:
    """The layers of `model` that have something to gain here; none with one thread, or elsewhere than on x86."""
    if torch.get_num_threads() == 1 or not torch.backends.mkl.is_available():
        return []
    return [
        layer
        for layer in model.modules()
        if type(layer) is nn.Linear
        and "forward" not in vars(layer)  # nobody else stands there
        and type(layer.weight) in (Tensor, nn.Parameter)
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype == torch.float32
        and layer.weight.numel() >= LEAST
    ]


@contextmanager
def turned(layers: Sequence[nn.Linear]) -> Iterator[None]:
    """Inside, `layers` compute products with few rows the other way round. For passes without gradients."""
    if torch.is_autocast_enabled("cpu"):
        yield
        return
    for layer in layers:
        layer.forward = partial(_forward, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward(layer: nn.Linear, states: Tensor) -> Tensor:
    """As `nn.Linear.forward`: (..., I) to (..., O)."""
    rows = states.numel() // states.shape[-1]
    if rows not in ROWS:
        return linear(states, layer.weight, layer.bias)
    out = (layer.weight @ states.reshape(rows, -1).T).T.contiguous()
    if layer.bias is not None:
        out += layer.bias
    return out.view(*states.shape[:-1], -1)

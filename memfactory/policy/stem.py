"""Training on a tree of prefixes that is larger than one pass may be, with every position computed once.

Rows, sorted by their ids, are cut into passes, and these are computed from the last to the first. What a pass has in
common with the one before it is its *stem*: one path from the root, which belongs to earlier rows. For this pass it is
computed without gradients, which costs a third and next to no memory. Its keys and values collect gradients from this
pass and from all that look at it later; the pass to which the ids belong, whose turn comes after those, adds them to
its own while it goes backward:

    rows        a b c d e     passes in turn   3.  a b c d e | f g      stem -
                a b c f g                      2.  h i | j              stem a      owes  a        to the one before
                a h i                          1.  k l                  stem a h    owes  a h
                a h j
                a h k l

By the chain rule the sums are those of one pass over everything. No more than one path is kept at any time, because
stems grow and shrink at their ends only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from memfactory.policy.prefix_sharing import Packed, common

Forward = Callable[..., object]
"""A forward pass over a piece's arguments."""


@dataclass(slots=True)
class Owed:
    """Gradients of keys and values that belong to places of the pass to come."""

    ids: list[int]
    """The path, from the root."""
    first: int
    """How much of it stays a stem: gradients are of what comes after."""
    keys: dict[int, Tensor]
    """By layer, (O, K D)."""
    values: dict[int, Tensor]

    def __bool__(self) -> bool:
        return self.first < len(self.ids)


class Stem:
    """The path that the pass to come continues; at first the empty one."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.keys: dict[int, Tensor] = {}
        """By layer, (S, K D): leaves, whose gradients are those of all passes so far."""
        self.values: dict[int, Tensor] = {}

    @torch.no_grad()
    def move(self, forward: Forward, ids: Sequence[int], device: torch.device, *, join_in: bool = False) -> Owed:
        """Let the stem be `ids`, computing what it does not have in common with the one of now.

        Args:
            forward: the model's forward pass, whose output is not looked at.
            ids: of a path from the root, or none.
            device: where the model computes.
            join_in: compute one id if there is nothing to compute, since another rank has something to.

        Returns:
            what the pass to come has to take over.
        """
        kept = common(self.ids, list(ids))
        owed = Owed(
            self.ids,
            kept,
            {layer: _gradient(leaf)[kept:] for layer, leaf in self.keys.items()},
            {layer: _gradient(leaf)[kept:] for layer, leaf in self.values.items()},
        )
        grown = _Grown(*({layer: leaf[:kept] for layer, leaf in old.items()} for old in (self.keys, self.values)))
        if kept < len(ids):
            _compute(forward, Packed([list(ids)], known=ids[:kept]), device, grown)
        elif join_in:
            _compute(forward, Packed([[0]]), device, _Grown({}, {}))
        self.keys = {layer: _leaf(states, self.keys.get(layer), kept) for layer, states in grown.keys.items()}
        self.values = {layer: _leaf(states, self.values.get(layer), kept) for layer, states in grown.values.items()}
        self.ids = list(ids)
        if not self.ids:
            self.keys, self.values = {}, {}
        return owed


def _compute(forward: Forward, packed: Packed, device: torch.device, grown: _Grown) -> None:
    forward(**packed.whole(device, grown).arguments())


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _leaf(states: Tensor, before: Tensor | None, kept: int) -> Tensor:
    """`states` (S, K D), with what has been collected for the first `kept` of them `before`."""
    leaf = states.clone().requires_grad_()
    if before is not None and before.grad is not None and kept:
        leaf.grad = torch.zeros_like(leaf)
        leaf.grad[:kept] = before.grad[:kept]
    return leaf


@dataclass(slots=True)
class _Grown:
    """A joint that takes down the keys and values of a longer stem, layer by layer."""

    keys: dict[int, Tensor]
    values: dict[int, Tensor]

    def join(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys[layer] = _after(self.keys, layer, keys)
        self.values[layer] = _after(self.values, layer, values)
        return self.keys[layer], self.values[layer]


class Junction:
    """A joint between a pass with gradients, the stem that it continues, and what it is owed.

    Args:
        stem: the stem.
        owed: to the pass.
        packed: the pass.
        sequences: that were packed.
        device: where the model computes.
    """

    def __init__(
        self, stem: Stem, owed: Owed, packed: Packed, sequences: Sequence[list[int]], device: torch.device
    ) -> None:
        self._keys, self._values = stem.keys, stem.values
        self._owed = owed
        self._places: Tensor | None = None  # (O,) of what is owed, among those of the pass
        if owed:
            end = len(owed.ids)
            owner = next((row for row, ids in enumerate(sequences) if ids[:end] == owed.ids), None)
            assert owner is not None, "what is owed belongs to no sequence: passes came in another order"
            self._places = (packed.paths[owner][owed.first : end] - len(stem.ids)).to(device)

    def join(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self._places is not None:
            keys = _TakeOver.apply(keys, self._places, self._owed.keys[layer])
            values = _TakeOver.apply(values, self._places, self._owed.values[layer])
        return _after(self._keys, layer, keys), _after(self._values, layer, values)


def _after(known: dict[int, Tensor], layer: int, states: Tensor) -> Tensor:
    return torch.cat([known[layer], states]) if layer in known else states


class _TakeOver(torch.autograd.Function):
    """The identity; backward, gradients known from elsewhere are added to those of some places."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, places: Tensor, gradient: Tensor) -> Tensor:
        ctx.places, ctx.gradient = places, gradient
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.index_add(0, ctx.places, ctx.gradient.to(gradient.dtype)), None, None


def staged(model: PreTrainedModel) -> bool:
    """Whether passes of `model` can be joined: every layer that attends says which one it is, and nothing is dropped
    at random, since a stem and the pass that it belongs to would drop different things.

    Args:
        model: not wrapped.
    """
    layers = {getattr(module, "layer_idx", None) for module in model.modules()}
    if not layers >= set(range(model.config.get_text_config().num_hidden_layers)):
        return False
    return not any(_drops(module) for module in model.modules())


def _drops(module: nn.Module) -> bool:
    if isinstance(module, nn.Dropout):
        return module.p > 0
    rates = (value for name, value in vars(module).items() if "drop" in name)
    return any(isinstance(rate, float) and rate > 0 for rate in rates)

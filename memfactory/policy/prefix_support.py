"""Whether a model's attention can be routed by a plan of shared prefixes, found out before anything relies on it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import PreTrainedModel

from memfactory.policy.decode_attention import NAME
from memfactory.policy.prefix_sharing import Packed
from memfactory.policy.stem import Junction, Stem, staged

LOG = logging.getLogger("memfactory.prefix_sharing")

_BEGINNING, _ENDINGS, _ENDING = 6, 3, 5
"""Ids of the sequences that a model is tried with."""
_CLOSE = {torch.float32: 1e-4, torch.float64: 1e-8}
_CLOSE_ELSE = 0.1
"""Largest difference of two logits over the largest logit; half precision rounds in every layer."""


def obstacle(model: PreTrainedModel) -> str | None:
    """Why this kind of model computes every sequence by itself, as its configuration says; None: nothing is known.

    Args:
        model: not wrapped; PEFT's base model for adapters.
    """
    config: Any = model.config.get_text_config()
    if model._is_stateful:
        return f"{config.model_type} carries a recurrent state from token to token"
    if any(name.rpartition(".")[2] == "sinks" for name, _ in model.named_parameters()):
        return f"{config.model_type} has attention sinks"
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    if kinds:
        return f"{config.model_type} has layers of {', '.join(kinds)}"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return f"{config.model_type} attends in a sliding window"
    implementation = model.config._attn_implementation
    if implementation not in ("sdpa", NAME):
        return f"its attention is '{implementation}', not 'sdpa'"
    if not model._supports_attention_backend:
        return f"{config.model_type} does not let its attention be chosen"
    return None


def choose(model: PreTrainedModel) -> None:
    """Have `model` attend by plans where it is given one, and as before where not.

    For good, and not while a pass lasts: gradient checkpointing attends again in the backward pass.
    """
    for config in {id(config): config for config in (model.config, model.config.get_text_config())}.values():
        config._attn_implementation = NAME


@torch.no_grad()
def difference(model: nn.Module, vocabulary: int, device: torch.device, *, stems: bool = False) -> str | None:
    """What is different when `model` computes a few short sequences packed and each by itself; None: nothing.

    Args:
        model: may be wrapped; every rank of a sharded model calls this.
        vocabulary: ids that it knows.
        stems: compute their beginning in a pass before.
    """
    begin = [(7 * place + 1) % vocabulary for place in range(_BEGINNING)]
    ends = [[(11 * place + 5 * row + 2) % vocabulary for place in range(_ENDING + row)] for row in range(_ENDINGS)]
    sequences = [begin + end for end in ends] + [ends[0]]
    training = model.training
    model.eval()
    try:
        with _autocasts() as cast:
            alone = [_logits(model, input_ids=torch.tensor([own], device=device)) for own in sequences]
            stem = Stem()
            owed = stem.move(partial(model, use_cache=False), begin if stems else [], device)
            packed = Packed(sequences, known=stem.ids)
            joint = Junction(stem, owed, packed, sequences, device)
            together = _logits(model, **packed.whole(device, joint if stems else None).arguments())
    except Exception as error:  # whatever a model makes of a forward pass it was not written for
        return f"its forward pass does not take a plan: {type(error).__name__}: {error}"
    finally:
        model.train(training)
    scale = max(float(logits.abs().max()) for logits in alone)
    apart = 0.0
    for one, path in zip(alone, packed.paths, strict=True):
        own = path >= len(packed.known)
        apart = max(apart, float((one[own] - together[path[own] - len(packed.known)]).abs().max()))
    if apart <= (_CLOSE_ELSE if any(cast) else _CLOSE.get(alone[0].dtype, _CLOSE_ELSE)) * scale:
        return None
    return f"packed, its logits are {apart:.2g} apart from those of separate sequences"


@contextmanager
def _autocasts() -> Iterator[list[bool]]:
    """Whether each module that computes inside does so under autocast: a wrapped model may, and show float32."""
    found: list[bool] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        found.append(torch.is_autocast_enabled(next((x.device.type for x in args if isinstance(x, Tensor)), "cpu")))

    handle = register_module_forward_hook(note)
    try:
        yield found
    finally:
        handle.remove()


def _logits(model: nn.Module, **arguments: Any) -> Tensor:
    """(L, V)"""
    logits: Tensor = model(**arguments, use_cache=False).logits[0]
    return logits


class Support:
    """Whether sequences of a model are packed; asked again and again, found out once.

    Args:
        model: not wrapped; PEFT's base model for adapters.
        wanted: False: they are not, whatever the model.
    """

    def __init__(self, model: PreTrainedModel, wanted: bool = True) -> None:
        self._vocabulary = int(model.config.get_text_config().vocab_size)
        self._tried = not wanted
        self.available = False
        self.stems = False
        """Whether passes can be joined as well (:mod:`memfactory.policy.stem`)."""
        self._staged = wanted and staged(model)
        if not wanted:
            return
        why = obstacle(model)
        if why is not None:
            self._refuse(why)
        else:
            choose(model)

    @property
    def possible(self) -> bool:
        """Whether they may be: nothing is known against it."""
        return self.available or not self._tried

    def settle(self, model: nn.Module, device: torch.device) -> bool:
        """Whether they are packed; the first call tries `model`, which may be wrapped, on every rank."""
        if not self._tried:
            self._tried = True
            why = difference(model, self._vocabulary, device)
            if why is not None:
                self._refuse(why)
            self.available = why is None
            if self.available and self._staged:
                self.stems = difference(model, self._vocabulary, device, stems=True) is None
        return self.available

    def _refuse(self, why: str) -> None:
        self._tried = True
        LOG.warning("shared prefixes are computed for each sequence again: %s", why)

"""From the trainer's weights to the servers: they are written to a folder, loaded, and checked.

After every update, on all ranks together:

    score the canary with the trainer's weights -> write them -> load them everywhere -> compare the scores

The folder is written under another name first and renamed, so no server ever reads half of it. Names are never used
twice, not even by a run that goes on after it was killed, so no cache can hold what older weights of that name said.
What is written is the adapter of a PEFT model, or else all weights.
"""

from __future__ import annotations

import copy
import secrets
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from peft import get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from memfactory.checkpoints import saving
from memfactory.errors import EngineError
from memfactory.policy.vllm_policy import LOOP
from memfactory.policy.vllm_pool import Canary, Floats, NextToken, Prefixes, ServerPool, Weights
from memfactory.train.ranks import Ranks

_TEXT = "Anna moved to Lisbon in May and sold her car. She reads the morning paper on the train to work."
_LENGTH = 24
"""Fewest tokens of a canary."""
_DRAWN = 8
"""Most prefixes of the canary after which a token is drawn at each update, where it cannot be scored."""
EVERY = 1 << 10
"""More prefixes than a canary has."""
_CACHED = 144
"""Tokens of a prompt that is cached: more than a block of vLLM's cache, which has 128 on a CPU and 16 on a GPU."""


def canary_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A short text as this tokenizer writes it; tokens from all over the vocabulary where it lacks the words."""
    ids: list[int] = tokenizer(_TEXT, add_special_tokens=False)["input_ids"]
    known = [id for id in ids if id != tokenizer.unk_token_id]
    if 2 * len(known) > len(ids):
        return ids
    count = len(tokenizer)
    return [(7 * place) % count for place in range(min(max(_LENGTH, 2), count))]


@torch.no_grad()
def score(model: Any, ids: Sequence[int], **options: Any) -> list[float]:
    """Log-probs of ``ids[1:]`` by `model`, at temperature 1; `options` go to its forward pass."""
    return _picked(_logits(model, ids, **options), ids)


@torch.no_grad()
def _logits(model: Any, ids: Sequence[int], **options: Any) -> torch.Tensor:
    """(T, V) in float32."""
    tokens = torch.tensor([ids], device=model.device)  # (1, T)
    logits: torch.Tensor = model(input_ids=tokens, use_cache=False, **options).logits[0].float()
    return logits


def _picked(logits: torch.Tensor, ids: Sequence[int]) -> list[float]:
    """Log-probs of ``ids[1:]``."""
    wanted = torch.tensor(ids[1:], device=logits.device)
    return [float(value) for value in logits[:-1].log_softmax(-1).gather(1, wanted[:, None])[:, 0]]


def _after(logits: torch.Tensor, lengths: Sequence[int], temperature: float) -> Floats:
    """Log-probs (P, V) of every token after the prefixes of these P `lengths`."""
    found: Floats = (logits[[length - 1 for length in lengths]] / temperature).log_softmax(-1).cpu().numpy()
    return found


@torch.no_grad()
def score_next(model: Any, ids: Sequence[int]) -> list[float]:
    """Log-probs (V,) of every token after `ids`."""
    logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, -1]
    return list(logits.float().log_softmax(-1).tolist())


@dataclass
class WeightSync(ABC):
    """Sends weights to a pool of servers. All ranks call it; the first one sends.

    Args:
        pool: this rank's view of the servers.
        folder: where weights are written; the servers read it under the same path.
        tolerance: the recipe's `canary_tolerance`.
        autocast: context in which the trainer computes.
        temperature: at which turns are drawn, and their log-probs trained.
    """

    pool: ServerPool
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    tolerance: float
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    temperature: float = 1.0
    everywhere: bool = False
    """Each rank has servers of its own, and sends to them what the first one has written."""
    options: Callable[[int], dict[str, Any]] = lambda length: {}
    """What the model's forward pass wants beside so many ids, where its attention is not an ordinary one."""
    drawn: int = _DRAWN
    """Most prefixes of the canary after which a token is drawn, where it cannot be scored."""
    seconds: float = 0.0
    """Spent in all syncs so far."""
    count: int = 0
    _life: str = field(default_factory=lambda: secrets.token_hex(3))
    """Tells the names of this life of a run from those of an earlier one."""
    _before: list[float] | None = None
    _next_before: list[float] | None = None
    _drawn_before: Floats | None = None

    kept = 2
    """Versions that stay on disk."""
    whole = False
    """All weights, and not an adapter."""

    @abstractmethod
    def state(self, model: Any) -> dict[str, torch.Tensor]:
        """What is sent, by name; tensors that lie in pieces on several ranks as they are."""

    @abstractmethod
    def write(self, model: Any, state: dict[str, torch.Tensor], folder: Path) -> None:
        """Write `state`, whole and on the CPU, to `folder` as the servers read it."""

    def __call__(self, model: Any, version: int | None) -> None:
        """Have every server sample from the weights of `model`.

        Raises:
            EngineError: there is nothing to send or it holds NaN; a server cannot take it, is gone, or shows other
                weights. The same error on every rank.
        """
        start = time.perf_counter()
        was_training = model.training
        model.eval()
        ids = canary_ids(self.tokenizer)
        most = min(self.drawn, len(ids) - 1)
        lengths = sorted({1 + place * (len(ids) - 1) // most for place in range(1, most + 1)})
        plain, alone = self.temperature == 1.0, not self.pool.beside
        if plain and alone:  # `ids` are scored too, and log-probs of draws at temperature 1 are hardly any others
            lengths = lengths[:1]
        with self.autocast():
            logits = _logits(model, ids, **self.options(len(ids)))
            longer = (ids * (1 + _CACHED // len(ids)))[:_CACHED]
            following = NextToken(longer, score_next(model, longer), self._next_before) if self.whole else None
        expected = _picked(logits, ids)
        drawn, flat = (_after(logits, lengths, temperature) for temperature in (self.temperature, 1.0))
        ranks = Ranks()
        state = _whole(self.state(model), ranks.main)
        model.train(was_training)
        # one that is an update old is told by its scores, which are more; alone, a draw or eight may hardly move
        drawn_before = None if alone else self._drawn_before
        prefixes = Prefixes(lengths, drawn, drawn_before, self.temperature, None if plain else flat)
        canary = Canary(ids, expected, self._before, self.tolerance, following, prefixes, alone)
        with ranks.together():
            name = f"{self.pool.family}{self._life}-v{self.count}"
            weights = ranks.first(self._written(model, state, name, version) if ranks.main else None)
            LOOP.start(self.pool.hold()).result()
            ranks.gather([])  # no rank mends a server by the weights of before any more
            if ranks.main or self.everywhere:
                LOOP.start(self.pool.publish(weights, canary)).result()
            ranks.gather([])  # all have it: what is older may go
            LOOP.start(self._adopted(weights, canary)).result()
            if ranks.main:
                self._tidy()
        self._before, self._drawn_before = expected, drawn
        self._next_before = list(following.expected) if following is not None else None
        self.count += 1
        self.seconds += time.perf_counter() - start

    async def _adopted(self, weights: Weights, canary: Canary) -> None:
        self.pool.adopt(weights, canary)

    def _written(self, model: Any, state: dict[str, torch.Tensor], name: str, version: int | None) -> Weights:
        if not state:
            raise EngineError("there is no adapter to send", "the model has none", "add `lora: {}` to `model:`")
        spoilt = next((key for key, value in state.items() if not torch.isfinite(value).all()), None)
        if spoilt is not None:
            raise EngineError(
                "the weights are spoilt",
                f"{spoilt} holds NaN or infinity",
                "go on from a checkpoint before it, at a lower rate",
            )
        final, partial = self.folder / name, self.folder / f".{name}.part"
        with saving(partial, remove=True, setting="rollout.vllm.adapters"):
            partial.mkdir(parents=True)
            self.write(model, state, partial)
            partial.rename(final)
        return Weights(name, str(final.resolve()), self.whole, version)

    def _tidy(self) -> None:
        for old in sorted(self.folder.iterdir(), key=lambda place: place.stat().st_mtime)[: -self.kept]:
            shutil.rmtree(old, ignore_errors=True)


class AdapterSync(WeightSync):
    """Sends the adapter of a PEFT model; a server may read the newest again after it had to drop it from memory."""

    def state(self, model: Any) -> dict[str, torch.Tensor]:
        return get_peft_model_state_dict(model) if hasattr(model, "peft_config") else {}

    def write(self, model: Any, state: dict[str, torch.Tensor], folder: Path) -> None:
        model.peft_config["default"].save_pretrained(folder)
        save_file({key: value.contiguous() for key, value in state.items()}, folder / SAFETENSORS_WEIGHTS_NAME)


class FullWeightSync(WeightSync):
    """Sends all weights, see :func:`save_untied`. Only those of now stay on disk."""

    kept = 1
    whole = True

    def state(self, model: Any) -> dict[str, torch.Tensor]:
        return dict(model.state_dict())

    def write(self, model: Any, state: dict[str, torch.Tensor], folder: Path) -> None:
        save_untied(model, state, folder)


def save_untied(model: Any, state: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write a model so that a server can load other weights into it later.

    vLLM, told to load weights again, does not bring a head that is tied to the embedding up to date (0.31: a warning,
    and log-probs that are 2.6 nats off for SmolLM2-135M). So it is given two matrices where the model has one.
    """
    config = copy.deepcopy(model.config)
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = False
    config.save_pretrained(folder)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    own = {name: value.clone() if name in tied else value.contiguous() for name, value in state.items()}
    save_torch_state_dict(own, folder)


def _whole(state: Mapping[str, Any], wanted: bool) -> dict[str, torch.Tensor]:
    """Tensors that lie in pieces on several ranks (FSDP2), put together one after the other on the CPU of those ranks
    where they are `wanted`. Every rank takes part."""
    whole: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if wanted:
            whole[name] = full.detach().cpu()
    return whole

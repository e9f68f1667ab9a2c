"""From the trainer's weights to the servers: the adapter is written to a folder, loaded, and checked.

After every update, on all ranks together:

    score the canary with the trainer's weights -> save the adapter -> load it everywhere -> compare the scores

The folder is written under another name first and renamed, so no server ever reads half an adapter. Names are never
used twice, not even by a run that goes on after it was killed, so no cache can hold what an older adapter of that name
said.
"""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from memfactory.errors import EngineError, boundary
from memfactory.policy.vllm_policy import LOOP
from memfactory.policy.vllm_pool import Adapter, Canary, ServerPool
from memfactory.train.ranks import Ranks

KEPT = 2
"""Adapters that stay on disk: a server may read the newest again after it had to drop it from memory."""
_TEXT = "Anna moved to Lisbon in May and sold her car. She reads the morning paper on the train to work."
_LENGTH = 24
"""Fewest tokens of a canary."""


def canary_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A short text as this tokenizer writes it; tokens from all over the vocabulary where it lacks the words."""
    ids: list[int] = tokenizer(_TEXT, add_special_tokens=False)["input_ids"]
    known = [id for id in ids if id != tokenizer.unk_token_id]
    if 2 * len(known) > len(ids):
        return ids
    count = len(tokenizer)
    return [(7 * place) % count for place in range(min(max(_LENGTH, 2), count))]


@torch.no_grad()
def score(model: Any, ids: Sequence[int]) -> list[float]:
    """Log-probs of ``ids[1:]`` by `model`, at temperature 1."""
    tokens = torch.tensor([ids], device=model.device)  # (1, T)
    logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].float()  # (T - 1, V)
    picked = logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
    return [float(value) for value in picked]


@dataclass
class AdapterSync:
    """Sends the adapter of a PEFT model to a pool of servers. All ranks call it; the first one sends.

    Args:
        pool: this rank's view of the servers.
        folder: where adapters are written; the servers read it under the same path.
        tolerance: the recipe's `canary_tolerance`.
        autocast: context in which the trainer computes.
    """

    pool: ServerPool
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    tolerance: float
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    seconds: float = 0.0
    """Spent in all syncs so far."""
    count: int = 0
    _life: str = field(default_factory=lambda: secrets.token_hex(3))
    """Tells the names of this life of a run from those of an earlier one."""
    _before: list[float] | None = None

    def __call__(self, model: Any, version: int | None) -> None:
        """Have every server sample from the adapter of `model`.

        Raises:
            EngineError: it has none or its weights hold NaN; a server cannot take it, is gone, or shows other weights.
                The same error on every rank.
        """
        start = time.perf_counter()
        was_training = model.training
        model.eval()
        with self.autocast():
            expected = score(model, ids := canary_ids(self.tokenizer))
        state = _whole(get_peft_model_state_dict(model)) if hasattr(model, "peft_config") else {}
        model.train(was_training)
        canary = Canary(ids, expected, self._before, self.tolerance)
        ranks = Ranks()
        with ranks.together():
            name = f"{self.pool.family}{self._life}-v{self.count}"
            adapter = ranks.first(self._send(model, state, canary, name) if ranks.main else None)
        self.pool.adapter, self.pool.canary = adapter, canary
        self._before = expected
        self.count += 1
        self.seconds += time.perf_counter() - start

    def _send(self, model: Any, state: dict[str, torch.Tensor], canary: Canary, name: str) -> Adapter:
        if not state:
            raise EngineError("there is no adapter to send", "the model has none", "add `lora: {}` to `model:`")
        spoilt = next((key for key, value in state.items() if not torch.isfinite(value).all()), None)
        if spoilt is not None:
            raise EngineError(
                "the weights are spoilt",
                f"{spoilt} holds NaN or infinity",
                "go on from a checkpoint before it, at a lower rate",
            )
        with boundary(
            EngineError, f"the adapter could not be written to {self.folder}", "free some room on that disk"
        ):
            path = self._save(model, state, name)
        adapter = Adapter(name, str(path.resolve()))
        LOOP.start(self.pool.publish(adapter, canary)).result()
        for old in sorted(self.folder.iterdir(), key=lambda place: place.stat().st_mtime)[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
        return adapter

    def _save(self, model: Any, state: dict[str, torch.Tensor], name: str) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        final, partial = self.folder / name, self.folder / f".{name}.part"
        try:
            model.peft_config["default"].save_pretrained(partial)
            save_file(
                {key: value.contiguous().cpu() for key, value in state.items()}, partial / SAFETENSORS_WEIGHTS_NAME
            )
            partial.rename(final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return final


def _whole(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Tensors that lie in pieces on several ranks (FSDP2), put together. Every rank takes part."""
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach() for name, value in state.items()
    }

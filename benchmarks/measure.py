"""Clocks and records that all contestants share."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from workload import Spec

LEARNING_RATE = 1e-6
MAX_GRAD_NORM = 1.0
PHASES = ("generate", "recompute", "forward", "backward", "optimizer")
"""What is timed by itself; ``recompute`` is an extra pass for old log-probs. The rest is ``other``."""


@dataclass
class Result:
    """What one contestant did in one optimizer step. Unit of time: seconds of wall clock."""

    name: str
    spec: dict[str, Any]
    total_seconds: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys((*PHASES, "other"), 0.0))
    """By phase; they add up to `total_seconds`."""
    outside_seconds: float = 0.0
    """What `trainer.train()` takes beside the step: data loader, optimizer, last log line. Once per run."""
    cpu_seconds: float = 0.0
    """Of all threads, in the same window. More than 2 x wall or far below says the cores were shared."""
    episodes: int = 0
    rows: int = 0
    prompt_tokens: int = 0
    """Of all rows."""
    generated_tokens: int = 0
    trained_tokens: int = 0
    """Completion tokens that have a loss."""
    real_tokens: int = 0
    """Prompt and completion tokens in training passes (log-probs recomputed for old policies not counted)."""
    computed_tokens: int = 0
    """Positions of the same passes, padding included."""
    real_over_computed_prefill: float = 0.0
    """Tokens of prompts over those that were prefilled; 0 where that was not counted."""
    peak_bytes: int = 0
    """Largest resident set of the process from the end of loading to the end of the step."""
    loaded_bytes: int = 0
    """Resident set before the step: interpreter, libraries, weights."""
    gradient_norm: float = 0.0
    """Before clipping; tells that contestants compute the same kind of thing (their samples differ)."""

    def dump(self) -> dict[str, Any]:
        return asdict(self)


class Clock:
    """Fills `Result.seconds`. Phases do not nest."""

    def __init__(self, result: Result) -> None:
        self.result = result
        self._wall = time.perf_counter()
        self._cpu = time.process_time()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.result.seconds[name] += time.perf_counter() - start

    def stop(self) -> None:
        """End of the step: total, ``other``, CPU seconds and peak memory."""
        result = self.result
        result.total_seconds = time.perf_counter() - self._wall
        result.cpu_seconds = time.process_time() - self._cpu
        result.seconds["other"] = result.total_seconds - sum(result.seconds[phase] for phase in PHASES)
        result.peak_bytes = peak_bytes()


def load(spec: Spec) -> tuple[Any, Any]:
    """(model in float32 and training mode, tokenizer)."""
    tokenizer = AutoTokenizer.from_pretrained(spec.folder)
    model = AutoModelForCausalLM.from_pretrained(spec.folder, dtype=torch.float32, attn_implementation="sdpa")
    return model.train(), tokenizer


def warm_up(model: Any) -> None:
    """Two sampled tokens and one small backward: lazy imports and thread pools are paid before the clock starts."""
    ids = torch.ones((2, 8), dtype=torch.long)
    with torch.no_grad():
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=sampling(model, 2))
    model(input_ids=ids).logits.sum().backward()
    model.zero_grad(set_to_none=True)


def begin(result: Result) -> Clock:
    """Forget the memory peak of loading and start the clock."""
    reset_peak()
    result.loaded_bytes = current_bytes()
    return Clock(result)


def sampling(model: Any, new_tokens: int) -> GenerationConfig:
    """Plain sampling at temperature 1 of exactly `new_tokens` tokens; nothing of the model's own config."""
    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )


def pad_left(prompts: Sequence[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), both (B, longest prompt)."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def generate(model: Any, prompts: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
    """`model.generate` on all `prompts` at once: the completions."""
    ids, mask = pad_left(prompts, model.config.pad_token_id)
    training = model.training
    model.eval()
    with torch.no_grad():
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=sampling(model, new_tokens))
    model.train(training)
    return output[:, ids.size(1) :].tolist()


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    """AdamW as transformers sets it up: fused, no weight decay."""
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)


def optimize(model: Any, optimizer: torch.optim.Optimizer) -> float:
    """Clip, step and clear; the gradient norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad()
    return float(norm)


# Linux keeps the peak per address space and lets it be reset; elsewhere the peak is that of the whole process.
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _status(key: str) -> int | None:
    if not _STATUS.is_file():
        return None
    for line in _STATUS.read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return None


def reset_peak() -> None:
    if _CLEAR.exists():
        try:
            _CLEAR.write_text("5")
        except OSError:  # not permitted in some containers: the peak then includes loading
            return


def current_bytes() -> int:
    """Resident set now, 0 where it cannot be read."""
    return _status("VmRSS") or 0


def peak_bytes() -> int:
    """Largest resident set since :func:`reset_peak`."""
    found = _status("VmHWM")
    if found is not None:
        return found
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

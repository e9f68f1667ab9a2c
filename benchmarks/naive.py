"""Contestant `naive`: the straightforward loop that many agent trainers started from.

One task at a time: its G episodes are generated together, every completion is turned to text, prompt and
text are tokenised again for training, the log-probs of the old policy are computed once more over
prompt and completion with logits for the whole vocabulary, and training takes 4 rows at a time, in the
order of the episodes, padded to the longest of them, again with full logits.
"""

from __future__ import annotations

from typing import Any

import torch
from measure import Result, begin, generate, load, optimize, optimizer_of, pad_left, warm_up
from workload import Spec, Workload

ROWS = 4
"""Rows of one training pass."""


def run(spec: Spec) -> Result:
    """One step."""
    result = Result("naive", spec.dump())
    model, tokenizer = load(spec)
    workload = Workload(spec, tokenizer)
    pad_id = model.config.pad_token_id
    optimizer = optimizer_of(model)
    warm_up(model)
    clock = begin(result)

    texts: list[tuple[str, str, float]] = []  # prompt, completion, advantage; by episode, then turn
    advantages = workload.advantages()
    for task in range(spec.tasks):
        episodes: list[list[tuple[str, str, float]]] = [[] for _ in range(spec.group)]
        for turn in range(spec.turns):
            prompts = [workload.prompt_ids(task, sample, turn) for sample in range(spec.group)]
            with clock.phase("generate"):
                completions = generate(model, prompts, spec.new_tokens)
            result.generated_tokens += sum(map(len, completions))
            for sample, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
                episodes[sample].append((tokenizer.decode(prompt), tokenizer.decode(completion), advantages[sample]))
        texts += [row for episode in episodes for row in episode]

    batches = []
    for start in range(0, len(texts), ROWS):
        rows = texts[start : start + ROWS]
        prompts = [_tokens(tokenizer, row[0]) for row in rows]
        completions = [_tokens(tokenizer, row[1]) for row in rows]
        result.prompt_tokens += sum(map(len, prompts))
        result.trained_tokens += sum(map(len, completions))
        prompt_ids, prompt_mask = pad_left(prompts, pad_id)
        width = max(map(len, completions))
        completion_ids = torch.tensor([ids + [pad_id] * (width - len(ids)) for ids in completions])
        completion_mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in completions])
        batches.append(
            {
                "ids": torch.cat([prompt_ids, completion_ids], dim=1),
                "mask": torch.cat([prompt_mask, completion_mask], dim=1),
                "completion_mask": completion_mask,
                "advantages": torch.tensor([[row[2]] for row in rows]),
            }
        )
    for batch in batches:
        with clock.phase("recompute"), torch.no_grad():
            batch["old"] = _logprobs(model, batch)

    for batch in batches:
        with clock.phase("forward"):
            logprobs = _logprobs(model, batch)
            ratio = (logprobs - batch["old"]).exp()
            loss = -torch.minimum(ratio * batch["advantages"], ratio.clamp(0.8, 1.2) * batch["advantages"])
            loss = (loss * batch["completion_mask"]).sum() / result.trained_tokens
        with clock.phase("backward"):
            loss.backward()
        result.computed_tokens += batch["ids"].numel()
        del logprobs, ratio, loss
    with clock.phase("optimizer"):
        result.gradient_norm = optimize(model, optimizer)
    clock.stop()

    result.episodes, result.rows = spec.episodes, len(texts)
    result.real_tokens = result.prompt_tokens + result.trained_tokens
    return result


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _logprobs(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-probs (B, T) of the completions, from logits (B, P + T, V) of everything."""
    ids = batch["ids"]
    logits = model(input_ids=ids, attention_mask=batch["mask"], use_cache=False).logits
    logprobs = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return logprobs[:, -batch["completion_mask"].size(1) :]

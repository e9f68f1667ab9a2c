"""Contestants `handwritten` and `generate_only`: the least work the step can be done with, by plain torch.

Every turn of all episodes is one `model.generate`. Rows are cut by a token budget, sorted by length and
padded on the right (no mask is needed: causal attention never looks right), the language-model head sees
only positions that predict a completion token, and nothing is computed twice: on-policy, the old
log-probs are the new ones.
"""

from __future__ import annotations

import torch
from measure import Result, begin, generate, load, optimize, optimizer_of, warm_up
from torch.nn import functional
from workload import Spec, Workload


def run(spec: Spec) -> Result:
    """One step."""
    result = Result("handwritten", spec.dump())
    model, tokenizer = load(spec)
    workload = Workload(spec, tokenizer)
    optimizer = optimizer_of(model)
    warm_up(model)
    clock = begin(result)

    rows: list[tuple[list[int], list[int], float]] = []  # prompt, completion, advantage
    advantages = workload.advantages()
    for turn in range(spec.turns):
        prompts = [workload.prompt_ids(t, s, turn) for t in range(spec.tasks) for s in range(spec.group)]
        with clock.phase("generate"):
            completions = generate(model, prompts, spec.new_tokens)
        tokenizer.batch_decode(completions, skip_special_tokens=True)  # the agent reads them
        for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            rows.append((prompt, completion, advantages[number % spec.group]))

    rows.sort(key=lambda row: len(row[0]) + len(row[1]), reverse=True)
    total = sum(len(row[1]) for row in rows)
    start = 0
    while start < len(rows):
        width = len(rows[start][0]) + len(rows[start][1])
        batch = rows[start : start + max(1, spec.budget // width)]
        start += len(batch)
        ids = torch.full((len(batch), width), model.config.pad_token_id)
        keep = torch.zeros((len(batch), width), dtype=torch.bool)
        for i, (prompt, completion, _) in enumerate(batch):
            ids[i, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
            keep[i, len(prompt) - 1 : len(prompt) + len(completion) - 1] = True
        targets = torch.tensor([token for row in batch for token in row[1]])  # (N,)
        weight = torch.tensor([row[2] for row in batch for _ in row[1]])  # (N,)
        with clock.phase("forward"):
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state  # (B, L, H)
            logits = model.lm_head(hidden[keep])  # (N, V)
            logprobs = -functional.cross_entropy(logits, targets, reduction="none")
            ratio = (logprobs - logprobs.detach()).exp()
            clipped = ratio.clamp(0.8, 1.2)
            loss = -torch.minimum(ratio * weight, clipped * weight).sum() / total
        with clock.phase("backward"):
            loss.backward()
        result.real_tokens += sum(len(row[0]) + len(row[1]) for row in batch)
        result.computed_tokens += ids.numel()
        del hidden, logits, logprobs, ratio, clipped, loss
    with clock.phase("optimizer"):
        result.gradient_norm = optimize(model, optimizer)
    clock.stop()

    result.episodes, result.rows = spec.episodes, len(rows)
    result.generated_tokens = result.trained_tokens = total
    result.prompt_tokens = sum(len(row[0]) for row in rows)
    return result


def run_generate_only(spec: Spec) -> Result:
    """One raw `model.generate` per turn over the same prompts and nothing else."""
    result = Result("generate_only", spec.dump())
    model, tokenizer = load(spec)
    workload = Workload(spec, tokenizer)
    prompts = [
        [workload.prompt_ids(t, s, turn) for t in range(spec.tasks) for s in range(spec.group)]
        for turn in range(spec.turns)
    ]
    warm_up(model)
    clock = begin(result)
    for batch in prompts:
        with clock.phase("generate"):
            completions = generate(model, batch, spec.new_tokens)
        result.generated_tokens += sum(map(len, completions))
    clock.stop()
    result.episodes, result.rows = spec.episodes, spec.rows
    result.prompt_tokens = sum(len(prompt) for batch in prompts for prompt in batch)
    return result

"""The arithmetic of one optimizer step over all processes: episodes, groups, rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from memfactory.errors import MemFactoryError, RecipeError

# Defaults of TRL's GRPOConfig, for a recipe that leaves them out; a test compares them with the installed TRL.
PER_DEVICE, ACCUMULATION, GENERATIONS = 8, 1, 8
_TRIED = 1024
"""Most processes that are tried when a message names the numbers that work."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one generation batch and one optimizer step are made of. Sizes count episodes."""

    processes: int
    per_device: int
    """Episodes of one process in one training step (`train.per_device_train_batch_size`)."""
    accumulation: int
    """Training steps in one optimizer step (`train.gradient_accumulation_steps`)."""
    steps_per_generation: int
    """Training steps in one generation batch."""
    generations: int
    """Episodes in one group (`train.num_generations`)."""

    @property
    def per_process(self) -> int:
        """Episodes that one process works through at once."""
        return self.per_device * self.steps_per_generation

    @property
    def generation_batch(self) -> int:
        return self.per_process * self.processes

    @property
    def optimizer_batch(self) -> int:
        return self.per_device * self.accumulation * self.processes

    @property
    def groups(self) -> int:
        """Groups, hence tasks, in one generation batch."""
        return self.generation_batch // self.generations


def batch(train: dict[str, Any], processes: int) -> tuple[Batch | None, list[MemFactoryError]]:
    """The arithmetic of a recipe's `train:` on `processes` processes, as TRL 1.16 does it (grpo_config.py 1094-1133).

    Returns:
        the batch, or None and everything that does not divide, each with the numbers that work.
    """
    size = int(train.get("per_device_train_batch_size", PER_DEVICE))
    accumulation = int(train.get("gradient_accumulation_steps", ACCUMULATION))
    generations = int(train.get("num_generations", GENERATIONS))
    steps, whole = train.get("steps_per_generation"), train.get("generation_batch_size")
    errors: list[MemFactoryError] = []
    if steps is not None and whole is not None:
        why = "TRL computes one from the other"
        return None, [
            RecipeError("train.generation_batch_size and train.steps_per_generation", why, "keep one of them")
        ]
    if whole is not None:
        if whole % (size * processes):
            why = f"it is not a multiple of {size} episodes x {processes} processes"
            fix = f"use {_counts(lambda n: whole % (size * n) == 0)}, or another train.generation_batch_size"
            return None, [RecipeError(f"train.generation_batch_size: {whole}", why, fix)]
        steps = whole // (size * processes)
    found = Batch(processes, size, accumulation, int(steps or accumulation), generations)
    if found.generation_batch % generations:
        why = (
            f"{size} episodes x {processes} processes x {found.steps_per_generation} steps = "
            f"{found.generation_batch} episodes are no whole groups of {generations}"
        )
        fits = _counts(lambda n: found.per_process * n % generations == 0)
        fix = f"use {fits}, or train.per_device_train_batch_size={_next_size(found)}"
        errors.append(RecipeError("train.num_generations", why, fix))
    if train.get("eval_strategy", "no") != "no":
        held_out = int(train.get("per_device_eval_batch_size", generations))
        group = int(train.get("num_generations_eval") or generations)
        if held_out * processes % group:
            why = f"{held_out} x {processes} processes is no multiple of groups of {group}"
            fix = f"train.per_device_eval_batch_size={group}"
            errors.append(RecipeError("train.per_device_eval_batch_size", why, fix))
    return (None, errors) if errors else (found, [])


def kept(train: dict[str, Any], processes: int, episodes: int) -> tuple[dict[str, Any], list[MemFactoryError]]:
    """Overrides of `train:` with which one optimizer step has `episodes` episodes on any number of processes.

    Returns:
        the overrides, or what does not divide, with the numbers that work.
    """
    accumulation = int(train.get("gradient_accumulation_steps", ACCUMULATION))
    if episodes % (processes * accumulation) == 0 and episodes > 0:
        return {"per_device_train_batch_size": episodes // (processes * accumulation)}, []
    why = f"{processes} processes x {accumulation} accumulation steps do not divide {episodes} episodes"
    generations = int(train.get("num_generations", GENERATIONS))
    unit = math.lcm(processes * accumulation, generations)  # whole groups too
    near = sorted({max(unit, episodes // unit * unit), (episodes // unit + 1) * unit})
    fits = _counts(lambda n: episodes > 0 and episodes % (n * accumulation) == 0)
    return {}, [RecipeError(f"--batch {episodes}", why, f"use {fits}, or --batch {' or '.join(map(str, near))}")]


def _counts(works: Callable[[int], bool]) -> str:
    """The numbers of processes that work, as words: the first eight."""
    numbers = [n for n in range(1, _TRIED + 1) if works(n)]
    return f"{_listed(numbers)} processes" if numbers else "another batch size: no number of processes works"


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return f"{shown}, ..." if len(numbers) > 8 else shown


def _next_size(found: Batch) -> int:
    """The next larger episodes per process that make whole groups."""
    size = found.per_device
    while size * found.steps_per_generation * found.processes % found.generations:
        size += 1
    return size

"""Passes as tensors: equally many on every rank, with equally many rows, whatever each rank's episodes did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from memfactory.train.passes import Pass
from memfactory.train.ranks import Ranks
from memfactory.train.rows import collate
from memfactory.train.scoring import CompletionScorer

MicroBatch = dict[str, torch.Tensor]


@dataclass(slots=True)
class Positions:
    """Of this rank."""

    real: int = 0
    """Ids of rows that are trained."""
    computed: int = 0
    """What the backbone computes for them."""


def assemble(
    plan: Sequence[Sequence[Pass]],
    weights: Mapping[int, float],
    scorer: CompletionScorer,
    pad_id: int,
    ranks: Ranks,
    count: Positions,
) -> list[list[MicroBatch]]:
    """The micro-batches of each training step. All ranks call it together.

    Beside what :func:`memfactory.train.rows.collate` gives, each has ``stem_ids`` (S,), what its rows continue,
    and ``stem_pass``, whether a rank has some of them to compute first.

    Args:
        plan: this rank's passes, by training step; equally many steps on every rank.
        weights: of the loss, by id() of the row.
        scorer: what computes them.
        pad_id: the tokenizer's.
        count: positions are added here.
    """
    sizes: list[list[list[tuple[int, int]]]] = ranks.gather(
        [[[(len(part.rows), part.grown) for part in step] for step in plan]]
    )
    found: list[list[MicroBatch]] = []
    for place, step in enumerate(plan):
        passes = max(len(own[place]) for own in sizes)  # every rank does as many as the busiest
        if ranks.count > 1:
            passes = max(passes, 1)  # gradients are exchanged on the last pass of an optimizer step, so there is one
        micro_batches = []
        for number in range(passes):
            part = step[number] if number < len(step) else Pass()
            everywhere = [own[place][number] for own in sizes if number < len(own[place])]
            size = max((rows for rows, _ in everywhere), default=1)
            # rows that fill up are not to begin like the stem, of which no hidden state is computed here
            padding = next(id for id in (pad_id, 0, 1) if id not in part.stem[:1])
            micro = collate(part.rows, [weights[id(row)] for row in part.rows], padding, size)
            micro["stem_ids"] = torch.tensor(part.stem, dtype=torch.long)
            micro["stem_pass"] = torch.tensor(any(grown for _, grown in everywhere))
            micro_batches.append(micro)
            ids = [row.prompt_ids + row.completion_ids for row in part.rows]
            count.real += sum(map(len, ids))
            count.computed += part.grown + scorer.positions(
                [*ids, *[[padding, padding]] * (size - len(ids))],
                part.stem,
                joined=0 < number <= len(step) and bool(step[number - 1].stem),
            )
        found.append(micro_batches)
    return found

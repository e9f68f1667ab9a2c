"""Passes: which rows go forward and backward together, and in which order.

A token budget bounds each pass, so any number of rows fits into bounded memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from memfactory.policy.prefix_sharing import common, unique_ids, worth
from memfactory.train.rows import Row

SCORED = 1
"""Positions that the log-prob of a token counts for beside its own, where prefixes are shared: a larger part of such a
pass is scored, so the head works on more tokens at once."""
GATHERED = 0.04
"""Positions that each id of a row counts for beside: its key and value are gathered, in every layer. With both a pass
takes no more memory than one of separate rows of the same budget (docs/prefix-sharing.md)."""
PASS = 0.02
"""What a pass costs beside its positions, as a share of the budget: of two equal ways to cut, fewer passes win."""
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Pass:
    """Rows that are computed together."""

    rows: list[Row] = field(default_factory=list)
    stem: list[int] = field(default_factory=list)
    """Ids that they continue and a later pass owns (:mod:`memfactory.policy.stem`)."""
    grown: int = 0
    """How many of them the stem of the pass before does not have."""


def plan_passes(rows: Sequence[Row], budget: int, steps: int, *, shared: bool, stems: bool) -> list[list[Pass]]:
    """The passes of each of `steps` training steps, in the order in which they are to be computed.

    Args:
        rows: that are trained.
        budget: positions of a pass.
        shared: what rows begin with is computed once for a pass, if that pays.
        stems: and once for all passes of a step.
    """
    sequences = list(map(_ids, rows))
    shared &= worth(sum(map(len, sequences)), unique_ids(sequences))
    if not (shared and stems):
        dealt = deal(cut_shared(rows, budget) if shared else cut(rows, budget), steps)
        return [[Pass(batch) for batch in batches] for batches in dealt]
    plan = []
    for batches in deal(cut_shared(rows, budget, stems=True), steps):
        if steps > 1:  # the first batch of a step cannot leave anything to the step before
            batches = cut_shared([row for batch in batches for row in batch], budget, stems=True)
        passes: list[Pass] = []
        for batch, stem in zip(batches[::-1], stems_of(batches, budget)[::-1], strict=True):
            before = passes[-1].stem if passes else []
            passes.append(Pass(batch, stem, len(stem) - common(before, stem)))
        plan.append(passes)
    return plan


def cut(rows: Sequence[Row], budget: int) -> list[list[Row]]:
    """Micro-batches of rows of similar length with (rows x longest row) <= `budget`.

    A row longer than the budget gets a micro-batch of its own: it cannot be cut.
    """
    batches: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: row.length, reverse=True):
        # rows come longest first, so the first of a batch sets its width
        if batches and (len(batches[-1]) + 1) * batches[-1][0].length <= budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def cut_shared(rows: Sequence[Row], budget: int, *, stems: bool = False) -> list[list[Row]]:
    """Micro-batches of rows that begin alike, with at most `budget` unique positions each, the head's work counted in.

    Of all ways to cut the rows, sorted by their ids, into neighbours, this is the one that costs least: it cuts where
    little is shared, so a group stays together where it fits. A row longer than the budget gets a micro-batch of its
    own.

    Args:
        stems: what a micro-batch has in common with the one before may be a stem (:func:`stems_of`).
    """
    ordered = sorted(rows, key=_ids)
    own = [(1 + GATHERED) * row.length + SCORED * len(row.completion_ids) for row in ordered]
    shared = [0, *(common(_ids(one), _ids(other)) for one, other in pairwise(ordered))]
    fewest, begins = [0.0], [0]  # for the rows before each one: cost in positions, and where their last cut begins
    for end in range(1, len(ordered) + 1):
        best, begin, beyond, prompt = float("inf"), end - 1, 0.0, ordered[end - 1].length
        for start in range(end - 1, -1, -1):
            prompt = min(prompt, len(ordered[start].prompt_ids))
            beyond += own[start] - shared[start]  # positions that rows before `start` have not computed
            if beyond > budget + _ROUNDING and start < end - 1:
                break
            stem = _stem(shared[start], prompt, budget) if stems else 0
            size = beyond + shared[start] - stem
            if size > budget + _ROUNDING and start < end - 1:
                continue
            cost = fewest[start] + size + (_stem_cost(stem, budget) if stem else 0) + PASS * budget
            if cost < best:
                best, begin = cost, start
        fewest.append(best)
        begins.append(begin)
    batches: list[list[Row]] = []
    end = len(ordered)
    while end:
        batches.append(ordered[begins[end] : end])
        end = begins[end]
    return batches[::-1]


def stems_of(batches: Sequence[Sequence[Row]], budget: int) -> list[list[int]]:
    """For each micro-batch of :func:`cut_shared` with stems, the ids that it leaves to the ones before.

    Its rows have them in common with the last row before, and no token that one of its rows scores is among them or
    comes right after. Empty where computing them once more, with gradients, costs less.
    """
    found: list[list[int]] = []
    before: list[int] = []
    for rows in batches:
        prompt = min(len(row.prompt_ids) for row in rows)
        first = _ids(rows[0])
        found.append(first[: _stem(common(before, first), prompt, budget)])
        before = _ids(rows[-1])
    return found


def _stem(shared: int, prompt: int, budget: int) -> int:
    """Length of the stem where `shared` ids are in common and the shortest prompt has `prompt`."""
    length = max(0, min(shared, prompt - 1))  # hidden state j predicts token j + 1
    return length if _stem_cost(length, budget) < length else 0


def _stem_cost(length: int, budget: int) -> float:
    """In positions of a pass forward and backward: a stem goes forward only, in a pass of its own."""
    return length / 3 + PASS * budget


def deal(batches: Sequence[list[Row]], hands: int) -> list[list[list[Row]]]:
    """Spread micro-batches over `hands` training steps, all in order, sizes differing by at most one."""
    size, extra = divmod(len(batches), hands)
    result, start = [], 0
    for hand in range(hands):
        end = start + size + (hand < extra)
        result.append(list(batches[start:end]))
        start = end
    return result


def _ids(row: Row) -> list[int]:
    return row.prompt_ids + row.completion_ids

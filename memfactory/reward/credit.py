"""Credit: from rewards of episodes and turns to one advantage per turn, before any row exists.

    A_t = alpha * (what the assigner gives of the episode's advantage) + (1 - alpha) * (the turn's own) + shaping

Everything here works on arrays over the whole batch, all ranks together; :mod:`memfactory.reward.system` fills
them from episodes and writes the result back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from memfactory.errors import RecipeError
from memfactory.modules.base import WRITERS
from memfactory.plugins import construct, resolve
from memfactory.recipe import CreditSection, nearest
from memfactory.reward.advantage import Estimator, advantages
from memfactory.reward.shaping import shaped_returns
from memfactory.reward.table import Bools, Floats, Ints, group_mean

Link = tuple[int, int, float]
"""A turn that answers, a turn that wrote what it was shown, and its share in it."""


@dataclass(frozen=True)
class Links:
    """L pairs of a turn that answers and a turn that wrote what it was shown."""

    answer: Ints
    """(L,) index of the turn that answers."""
    writer: Ints
    """(L,) index of the turn that wrote."""
    share: Floats
    """(L,) of all that the answer was shown; those of one answer add up to 1."""

    @classmethod
    def of(cls, parts: Sequence[Sequence[Link]], sizes: Sequence[int]) -> Links:
        """The links of all episodes.

        Args:
            parts: by episode, (turn that answers, turn that wrote, share), turns counted in the episode.
            sizes: turns of each episode.
        """
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        rows = [(start + a, start + w, s) for start, part in zip(starts, parts, strict=False) for a, w, s in part]
        table = np.array(rows, dtype=np.float64).reshape(len(rows), 3)
        return cls(table[:, 0].astype(np.int64), table[:, 1].astype(np.int64), table[:, 2])


@dataclass(frozen=True)
class CreditBatch:
    """N episodes with M turns in all, in order: what a credit assigner sees."""

    rewards: Floats
    """(N,) what episodes are compared by; NaN where there is none."""
    advantages: Floats
    """(N,)"""
    divisors: Floats
    """(N,) what differences of rewards were divided by."""
    groups: Ints
    """(N,)"""
    episode: Ints
    """(M,) index of each turn's episode."""
    module: list[str]
    """(M,)"""
    slot: Ints
    """(M,) turns with the same number are the same turn (n-th of a module) of episodes of one group."""
    last: Bools
    """(M,) whether a turn is the last of its episode."""
    turn_rewards: Floats
    """(M,) aggregated from the dimensions that speak about the turn; NaN where none does or could."""
    potentials: Floats
    """(M,) of the state after the turn; NaN where none is known."""
    links: Links = field(default_factory=lambda: Links.of([], []))
    """Which turns wrote what the answers were shown."""


CreditAssigner = Callable[[CreditBatch], Floats]
"""Gives each turn its share of the episode's outcome: (M,) advantages, NaN for a turn that is not trained.

An assigner with state (a running baseline, an archive) has ``state_dict`` and ``load_state_dict``.
"""


def broadcast(batch: CreditBatch) -> Floats:
    """Every turn gets the advantage of its episode (MemAgent, arXiv 2507.02259, sec. 3)."""
    return batch.advantages[batch.episode]


def last_turn(batch: CreditBatch) -> Floats:
    """The last turn gets it all and the others are not trained: a control."""
    return np.where(batch.last, batch.advantages[batch.episode], np.nan)


ASSIGNERS: dict[str, CreditAssigner] = {"broadcast": broadcast, "last_turn": last_turn}


def build_assigner(name: str) -> CreditAssigner:
    """The assigner a recipe names: one of :data:`ASSIGNERS`, or ``pkg.module:name`` of a function or a class.

    Raises:
        RecipeError: there is none of that name.
    """
    if ":" not in name and name not in ASSIGNERS:
        raise RecipeError(f"credit.assigner: '{name}'", "", nearest(name, list(ASSIGNERS)))
    found: Any = resolve(name) if ":" in name else ASSIGNERS[name]
    assigner: CreditAssigner = construct(found, {}, "credit.assigner") if isinstance(found, type) else found
    return assigner


def turn_advantages(
    batch: CreditBatch, options: CreditSection, estimator: Estimator, assigner: CreditAssigner, *, mixed: bool
) -> Floats:
    """The advantage of every turn, (M,); NaN for a turn that is not trained.

    Args:
        batch: the whole batch.
        options: the recipe's `credit:`.
        estimator: how rewards are compared.
        assigner: how the outcome reaches turns.
        mixed: whether the recipe rewards turns; if not, alpha is 1.
    """
    values = assigner(batch)
    own = values
    if mixed:
        own = advantages(batch.turn_rewards, batch.slot, estimator, options.std_floor).values
    if options.attribute != "none":
        own = attributed(own, batch)
    if mixed or options.attribute != "none":
        values = options.outcome_share * values + (1 - options.outcome_share) * own
    if np.isfinite(batch.potentials).any():
        values = values + shaping_term(batch, options)
    return values


def attributed(own: Floats, batch: CreditBatch) -> Floats:
    """What turns earn themselves, (M,), where turns that write earn what the answers made of their entries.

    own_w = sum over answers a of share(a, w) own_a: the advantage of each answer is dealt out whole among the turns
    whose entries it was shown, and a turn whose entries were shown to none gets nothing. Other turns keep `own`.
    Source: evidence-anchored attribution (Fine-Mem, arXiv 2601.08435), here on advantages instead of rewards.
    """
    writes = np.isin(np.array(batch.module, dtype=object), WRITERS)
    result = np.where(writes, 0.0, own)
    np.add.at(result, batch.links.writer, batch.links.share * np.nan_to_num(own[batch.links.answer]))
    return result


def shaping_term(batch: CreditBatch, options: CreditSection) -> Floats:
    """What potentials add to the advantage of every turn, (M,).

    (S_t - mean of S_t over the same turn of the group) / divisor, with S_t the shaped return minus the reward.
    Subtracting the mean of the slot and not of the episode keeps the mean gradient and lowers its variance. The
    divisor is the group's or, where that is smaller, the median over the batch: rewards that nearly tie must not blow
    potentials up.
    """
    divisors = np.maximum(batch.divisors, np.median(batch.divisors))
    surplus = np.full(len(batch.episode), np.nan)
    ends = np.flatnonzero(batch.last) + 1
    for start, end in zip(np.concatenate([[0], ends[:-1]]), ends, strict=True):
        outcome, own = batch.rewards[batch.episode[start]], batch.potentials[start:end]
        if np.isfinite(outcome) and np.isfinite(own).all():
            surplus[start:end] = shaped_returns(outcome, own, options.gamma, options.lam) - outcome
    with np.errstate(invalid="ignore"):
        term = (surplus - group_mean(surplus, batch.slot)[batch.slot]) / divisors[batch.episode]
    return np.nan_to_num(term)

"""A measured batch as arrays: what ranks exchange, and what everything after measuring works on.

Scores live on episodes and turns; here they are without texts and tokens, so that a batch of thousands of
episodes on several ranks is a few small arrays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter, itemgetter

import numpy as np

from memfactory.episode import Episode, Score
from memfactory.reward.credit import Link, Links
from memfactory.reward.faults import Faults, whose
from memfactory.reward.table import Bools, Floats, Ints, codes

_VALUE = attrgetter("value")
_NONE = Score(None, "not measured")


@dataclass(frozen=True, slots=True)
class Part:
    """One rank's n episodes with m turns."""

    ids: list[str]
    groups: list[str]
    values: Floats
    """(n, D); NaN where a score is None."""
    modules: list[tuple[str, ...]]
    """Of the turns of each episode."""
    turn_values: Floats
    """(m, number of dimensions of turns); NaN where None, or where the dimension says nothing about the turn."""
    reasons: Counter[tuple[str, str]]
    """(dimension, why its score is None)."""
    faults: Faults
    judge: dict[str, float] = field(default_factory=dict)
    """What the judge did since the last batch."""
    links: list[list[Link]] = field(default_factory=list)
    """Of each episode; empty where nothing is attributed."""
    failed: list[str] = field(default_factory=list)
    """Of each episode, whose fault it is that it could not be run to its end; empty where it could."""

    @classmethod
    def of(
        cls,
        episodes: Sequence[Episode],
        names: Sequence[str],
        names_of_turns: Sequence[str],
        faults: Faults,
        attribute: str = "none",
    ) -> Part:
        """The scores of measured `episodes` on the dimensions `names`, and of their turns on `names_of_turns`.

        Args:
            attribute: as in the recipe's `credit:`.
        """
        values = scores_of(episodes, names)
        reasons: Counter[tuple[str, str]] = Counter()
        own = [name for name in names if name not in names_of_turns]
        failed = [whose(episode) for episode in episodes]
        for index in np.flatnonzero(np.isnan(values).any(axis=1)).tolist():
            if failed[index]:
                continue
            scores = episodes[index].scores
            reasons.update((name, scores[name].reason) for name in own if scores[name].value is None)
        turns = [turn for episode in episodes for turn in episode.turns] if names_of_turns else []
        rows = [[turn.scores.get(name, _NONE).value for name in names_of_turns] for turn in turns]
        for turn in turns:
            reasons.update((name, score.reason) for name, score in turn.scores.items() if score.value is None)
        return cls(
            ids=[episode.id for episode in episodes],
            groups=[episode.group for episode in episodes],
            values=values,
            modules=[tuple([turn.module for turn in episode.turns]) for episode in episodes],
            turn_values=_floats(rows, len(names_of_turns)),
            reasons=reasons,
            faults=faults,
            links=[] if attribute == "none" else [links_of(episode, attribute) for episode in episodes],
            failed=failed,
        )


@dataclass(frozen=True)
class Batch:
    """N episodes with M turns in all, in the order of ranks."""

    ids: list[str]
    groups: Ints
    """(N,) codes 0 .. number of groups - 1."""
    values: Floats
    """(N, D)"""
    turn_values: Floats
    """(M, number of dimensions of turns), or none where there are no such dimensions."""
    episode: Ints
    """(M,) index of each turn's episode."""
    module: list[str]
    """(M,)"""
    slot: Ints
    """(M,) equal for the same turn (n-th of a module) of the episodes of a group."""
    last: Bools
    """(M,) whether a turn is the last of its episode."""
    reasons: Counter[tuple[str, str]]
    faults: list[Faults]
    judge: dict[str, float]
    links: Links
    failed: list[str]
    """(N,) whose fault it is that an episode could not be run to its end; empty where it could."""

    @classmethod
    def of(cls, parts: Sequence[Part]) -> Batch:
        """All ranks' parts together."""
        groups = codes([group for part in parts for group in part.groups])
        modules = [own for part in parts for own in part.modules]
        episode = np.repeat(np.arange(len(modules)), [len(own) for own in modules])
        reasons: Counter[tuple[str, str]] = Counter()
        for part in parts:
            reasons.update(part.reasons)
        return cls(
            ids=[name for part in parts for name in part.ids],
            groups=groups,
            values=np.concatenate([part.values for part in parts]),
            turn_values=np.concatenate([part.turn_values for part in parts]),
            episode=episode,
            module=list(chain.from_iterable(modules)),
            slot=_slots(groups, episode, modules),
            last=np.append(episode[1:] != episode[:-1], True) if episode.size else np.zeros(0, dtype=bool),
            reasons=reasons,
            faults=[part.faults for part in parts],
            judge=_together([part.judge for part in parts]),
            links=Links.of([own for part in parts for own in part.links], [len(own) for own in modules]),
            failed=[fault for part in parts for fault in part.failed],
        )

    @property
    def ran(self) -> Ints:
        """Indices of the episodes that were run to their end: those that statistics are about. All, if none was."""
        ran = np.flatnonzero([not fault for fault in self.failed])
        return ran if ran.size else np.arange(len(self.failed))

    def spread(self, values: Floats) -> Floats:
        """(N,) `values` of the episodes in `ran`; NaN where an episode could not be run to its end."""
        spread = np.full(len(self.failed), np.nan)
        spread[self.ran] = values
        spread[[bool(fault) for fault in self.failed]] = np.nan
        return spread

    @property
    def comparable(self) -> Ints:
        """(N,) `groups`, where those that could not be run to their end are apart from all others."""
        return np.where([bool(fault) for fault in self.failed], self.groups.max(initial=-1) + 1, self.groups)

    @property
    def fault_count(self) -> Counter[str]:
        return sum((Counter(own.count) for own in self.faults), Counter())

    @property
    def examples(self) -> list[str]:
        """The first faults, in words."""
        return [example for own in self.faults for example in own.examples][:10]


def _together(judges: Sequence[dict[str, float]]) -> dict[str, float]:
    """The judge's numbers of all ranks: counts are added, rates and times averaged by what they are of."""
    of = {"cache_hit_rate": "asked", "flip_rate": "comparisons", "latency": "requests", "wait": "requests"}
    total: dict[str, float] = {}
    for name in dict.fromkeys(name for own in judges for name in own):
        weights = [own.get(of[name], 0.0) if name in of else 1.0 for own in judges]
        amount = sum(weight * own.get(name, 0.0) for weight, own in zip(weights, judges, strict=True))
        total[name] = amount / max(sum(weights), 1.0) if name in of else amount
    return total


def _slots(groups: Ints, episode: Ints, modules: Sequence[tuple[str, ...]]) -> Ints:
    kinds: dict[tuple[str, int], int] = {}  # (module, occurrence) -> number
    known: dict[tuple[str, ...], list[int]] = {}  # most episodes have the same sequence of modules
    places: list[int] = []
    for own in modules:
        if own not in known:
            seen: Counter[str] = Counter()
            known[own] = []
            for module in own:
                known[own].append(kinds.setdefault((module, seen[module]), len(kinds)))
                seen[module] += 1
        places += known[own]
    return groups[episode] * max(len(kinds), 1) + np.array(places, dtype=np.int64)


def links_of(episode: Episode, attribute: str) -> list[Link]:
    """Which turns of `episode` wrote what its answers were shown, or cite. Entries from before it are nobody's."""
    found: list[Link] = []
    for place in (answer.turn for answer in episode.answers if answer.turn is not None):
        turn = episode.turns[place]
        cited = [entry for entry in turn.retrieved if entry.id in turn.cited] if attribute == "cited" else []
        writers = Counter(entry.turn for entry in cited or turn.retrieved if entry.turn is not None)
        found += [(place, writer, number / writers.total()) for writer, number in writers.items()]
    return found


def scores_of(episodes: Sequence[Episode], names: Sequence[str]) -> Floats:
    """Scores of measured `episodes` on `names`, (n, D); NaN for None."""
    shape = len(episodes), len(names)
    pick = itemgetter(*names, *names[:1])  # one more, because for a single name it would not be a tuple
    picked = (pick(episode.scores)[: len(names)] for episode in episodes)
    try:  # without a Python loop over the scores: there can be a hundred thousand
        return np.fromiter(map(_VALUE, chain.from_iterable(picked)), np.float64, shape[0] * shape[1]).reshape(shape)
    except TypeError:  # a None
        return _floats([[episode.scores[name].value for name in names] for episode in episodes], len(names))


def _floats(rows: Sequence[Sequence[float | None]], width: int) -> Floats:
    """(n, width), NaN for None."""
    return np.array(rows, dtype=np.float64).reshape(len(rows), width)

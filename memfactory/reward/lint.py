"""What in a reward system may go wrong in training, seen from its declaration and from a few scored episodes.

Nothing here refuses to run. A finding names the dimension, says what was seen and what to do; a warning is about
something that has ended runs before, a note about something to know.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
from rich.console import Console
from rich.table import Table

from memfactory.episode import Episode
from memfactory.reward.aggregate import Gated, MinMaxMean, WeightedSum, gate_factor, max_safe_delta
from memfactory.reward.catalogue import WeightedDimension
from memfactory.reward.dimension import Role
from memfactory.reward.measure import measure
from memfactory.reward.system import RewardSystem
from memfactory.reward.table import Floats

ENOUGH = 8
"""Episodes from which a missing spread means something."""
DOMINANT = 0.9
"""Share of the variance from which one dimension decides alone."""
MANY_NONE = 0.25
"""Share of episodes without a score from which a dimension costs too much of a batch, as `max_failed_share`."""


class Level(StrEnum):
    """How much a finding matters."""

    WARNING = "warning"
    NOTE = "note"


class Kind(StrEnum):
    """What a dimension does to the best policy."""

    OUTCOME = "outcome"
    """It is what the policy is trained for."""
    GATE = "gate"
    """It must hold."""
    POTENTIAL = "potential"
    """It says when credit comes, never which policy is best."""
    BONUS = "plain bonus"
    """It is paid on top, so a policy can live on it: farming."""
    WATCHED = "watched"
    """Weight 0: measured and logged."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to know about a reward system."""

    level: Level
    dimension: str
    """Name in the recipe; empty where it is about several."""
    what: str
    why: str
    fix: str = ""

    def __str__(self) -> str:
        head = f"{self.dimension}: {self.what}" if self.dimension else self.what
        return f"{self.level}: {head}\n  {self.why}" + (f"\n  fix: {self.fix}" if self.fix else "")


def kind(weighted: WeightedDimension) -> Kind:
    """What `weighted` is, by role and weight."""
    if weighted.weight == 0:
        return Kind.WATCHED
    return {
        Role.GATE: Kind.GATE,
        Role.OBJECTIVE: Kind.OUTCOME,
        Role.SHAPING: Kind.POTENTIAL,
        Role.BONUS: Kind.BONUS,
    }[weighted.dimension.role]


def lint(system: RewardSystem, episodes: Sequence[Episode] = (), *, scale_rewards: str = "group") -> list[Finding]:
    """Everything found, warnings first.

    Args:
        system: the rewards of a recipe.
        episodes: sample episodes. Those without the system's scores are measured, on copies.
        scale_rewards: TRL's option, which decides how rewards are compared where the recipe does not.
    """
    samples = _Samples(system, episodes)
    found = [
        *_by_declaration(system, scale_rewards),
        *_gate_probes(system, samples),
        *_by_spread(system, samples),
        *_by_weight(system, samples),
        *_by_bonus(system, samples),
        *_by_group(system, samples),
        *_by_gold(system, samples),
    ]
    return sorted(found, key=lambda finding: finding.level is Level.NOTE)


class _Samples:
    """Scored episodes as numbers."""

    def __init__(self, system: RewardSystem, episodes: Sequence[Episode]) -> None:
        names = [weighted.name for weighted in system.dimensions]
        if any(name not in episode.scores for episode in episodes for name in names):
            episodes = deepcopy(list(episodes))
            system.begin().finish(episodes)
        self.episodes = [episode for episode in episodes if not episode.failed]
        self.table = system.table(self.episodes)
        self.values: Floats = self.table.values
        """(N, D), transformed; NaN where None."""
        self.groups = self.table.groups

    def __len__(self) -> int:
        return len(self.episodes)

    @property
    def level(self) -> Level:
        """Of findings that a handful of episodes can also show by chance."""
        return Level.WARNING if len(self) >= ENOUGH else Level.NOTE

    @property
    def many(self) -> str:
        return f"{len(self)} sample episode{'s' * (len(self) != 1)}"

    def where(self, *kinds: Kind, system: RewardSystem) -> list[int]:
        return [k for k, weighted in enumerate(system.dimensions) if kind(weighted) in kinds]


def _scored(system: RewardSystem) -> list[WeightedDimension]:
    """Dimensions that take part in the reward."""
    return [w for w in system.dimensions if kind(w) in (Kind.GATE, Kind.OUTCOME, Kind.BONUS)]


# ---- what the declaration alone says ----------------------------------------------------------


def _by_declaration(system: RewardSystem, scale_rewards: str) -> Iterator[Finding]:
    aggregator = system.aggregator
    scored = _scored(system)
    gates = [w for w in scored if kind(w) is Kind.GATE and not w.dimension.per_turn]
    soft = isinstance(aggregator, Gated) and aggregator.gate == "geometric"
    if gates and soft:
        assert isinstance(aggregator, Gated)
        limit = max_safe_delta(len(gates))
        if aggregator.delta > limit:
            one_broken = np.array([[0.0, *[1.0] * (len(gates) - 1)]])
            factor = float(gate_factor(one_broken, np.zeros(len(gates)), delta=aggregator.delta)[0])
            yield Finding(
                Level.WARNING,
                "",
                f"delta {aggregator.delta:g} is above {limit:.3g}, the largest that is safe for {len(gates)} gates",
                f"an episode that breaks one of them keeps {factor:.2f} of its utility and can beat one that breaks "
                "none and has half the best utility",
                f"aggregate: {{name: gated, delta: {limit:.2g}}}, or gate: veto",
            )
        estimator = system.estimator(scale_rewards)
        if estimator in ("standardized", "batch") and system.credit.std_floor == 0:
            yield Finding(
                Level.WARNING,
                "",
                "dividing by the standard deviation gives back what the gate takes",
                "where every episode of a group breaks the gate, its factor scales all their rewards alike, and the "
                f"advantages ({estimator}) come out as large as in a group where all pass",
                "credit: {std_floor: 0.1}, credit: {advantage: centered}, or aggregate: {gate: veto}",
            )
    if gates and not isinstance(aggregator, Gated):
        name = type(aggregator).__name__
        adds = "adds gates like objectives" if isinstance(aggregator, WeightedSum) else "knows no gates"
        for weighted in gates:
            yield Finding(
                Level.WARNING,
                weighted.name,
                f"a gate under {name}, which {adds}",
                "an episode that breaks it can make up for that elsewhere",
                "aggregate: {name: gated}",
            )
    if len(scored) > 1 and not aggregator.scale_free:
        for weighted in scored:
            column = weighted.column
            if not (math.isfinite(column.low) and math.isfinite(column.high)):
                yield Finding(
                    Level.WARNING,
                    weighted.name,
                    f"its range [{column.low:g}, {column.high:g}] is open, beside other dimensions",
                    "one large score outweighs all others",
                    "give it `transform: {name: clip, low: 0, high: 1}`, or its true `low:` and `high:`",
                )
    for weighted in system.dimensions:
        if kind(weighted) is Kind.POTENTIAL and system.credit.lam < 1:
            yield Finding(
                Level.NOTE,
                weighted.name,
                f"credit.lam {system.credit.lam:g} is below 1",
                "the potential then stands in for the outcome of later turns, which biases credit unless it is exact",
                "credit: {lam: 1.0} leaves what is best as it was",
            )


# ---- what the samples say --------------------------------------------------------------------


def _by_spread(system: RewardSystem, samples: _Samples) -> Iterator[Finding]:
    for k, weighted in enumerate(system.dimensions):
        if not len(samples) or kind(weighted) is Kind.WATCHED:
            continue
        known = samples.values[np.isfinite(samples.values[:, k]), k]
        missing = len(samples) - known.size
        if missing:
            reasons = Counter(e.scores[weighted.name].reason for e in samples.episodes)
            reasons.pop("", None)
            reason = next((text for text, _ in reasons.most_common(1)), "")
            share = missing / len(samples)
            yield Finding(
                Level.WARNING if share > MANY_NONE else Level.NOTE,
                weighted.name,
                f"no value on {missing} of {samples.many}",
                f"e.g. {reason}",
                "see `missing:` for what that does to the episode"
                if weighted.dimension.role is not Role.GATE
                else "a gate without a value fails",
            )
        if known.size < 2 or known.std() > 1e-9 * max(1.0, float(np.abs(known).max())):
            continue
        if weighted.dimension.role is Role.GATE:
            passes = weighted.column.passes(known[:1]).all()
            why = "every episode passes it" if passes else "every episode fails it, so nothing is rewarded"
            level = Level.NOTE if passes else samples.level
            yield Finding(level, weighted.name, f"is {known[0]:g} on all of {samples.many}", why)
        else:
            yield Finding(
                samples.level,
                weighted.name,
                f"is {known[0]:g} on all of {samples.many}",
                "without spread it teaches nothing",
                "look at it with `memfactory rewards test NAME --episode FILE` on episodes of your own model",
            )


def _by_weight(system: RewardSystem, samples: _Samples) -> Iterator[Finding]:
    """Whether one dimension decides: its share of the variance of the weighted terms."""
    keep = samples.where(Kind.OUTCOME, Kind.BONUS, system=system)
    if len(samples) < 4 or len(keep) < 2:
        return
    shares = variance_shares(system, samples.values)
    top = max(keep, key=lambda k: shares[k])
    if shares[top] >= DOMINANT:
        others = ", ".join(f"{system.dimensions[k].name} {shares[k]:.1%}" for k in keep if k != top)
        yield Finding(
            samples.level,
            system.dimensions[top].name,
            f"decides alone: {shares[top]:.1%} of the variance of the weighted terms",
            f"the others hardly count on {samples.many} ({others})",
            "lower its weight"
            + ("" if system.aggregator.scale_free else ", or aggregate: {name: normalize_then_sum}"),
        )


def variance_shares(system: RewardSystem, values: Floats) -> Floats:
    """Share of each dimension in the summed variance of the weighted terms, covariances aside. (N, D) -> (D,)

    Gates, potentials and dimensions of weight 0 have 0. For an aggregator that standardises, only weights count.
    """
    kinds = [kind(weighted) for weighted in system.dimensions]
    variance = np.zeros(len(kinds))
    for k, weighted in enumerate(system.dimensions):
        known = values[np.isfinite(values[:, k]), k]
        if kinds[k] not in (Kind.OUTCOME, Kind.BONUS) or known.size < 2:
            continue
        spread = float(known.std())
        if isinstance(system.aggregator, MinMaxMean):
            low, high = system.aggregator.statistics.get(weighted.name, (0.0, 1.0))
            spread /= high - low if high > low else 1.0
        elif system.aggregator.scale_free:
            spread = float(spread > 0)
        # under the gate, objectives share a weight of 1 and a bonus is added to their mean
        total = 1.0
        if isinstance(system.aggregator, Gated) and kinds[k] is Kind.OUTCOME:
            total = sum(w.weight for w, own in zip(system.dimensions, kinds, strict=True) if own is Kind.OUTCOME)
        variance[k] = (weighted.weight / total * spread) ** 2
    whole = float(variance.sum())
    return variance / whole if whole > 0 else variance


def _by_bonus(system: RewardSystem, samples: _Samples) -> Iterator[Finding]:
    """Dimensions that are paid on top of the outcome, and what they do to the order of episodes."""
    for weighted in system.dimensions:
        if kind(weighted) is not Kind.BONUS:
            if kind(weighted) is Kind.OUTCOME and weighted.dimension.per_turn:
                yield Finding(
                    Level.NOTE,
                    weighted.name,
                    "rewards turns for themselves",
                    "a turn is pushed towards what scores there and then, whatever it does to the answer",
                    "credit: {outcome_share: ...} weighs the two; role: shaping keeps the best policy as it is",
                )
            continue
        if weighted.dimension.per_turn:
            yield Finding(
                Level.WARNING,
                weighted.name,
                "a plain bonus on every turn",
                "each turn that does what it counts is paid, whether or not it helps the answer: it can be farmed",
                "role: shaping, with a function that says how good the state after the turn is",
            )
            continue
        flipped, pairs = _flips(system, weighted, samples)
        seen = f"it turns round {flipped} of {pairs} pairs of {samples.many}" if pairs else "no two sample episodes"
        yield Finding(
            Level.WARNING,
            weighted.name,
            "a plain bonus, no potential",
            "it is paid whatever the outcome, so the policy can learn to collect it instead "
            f"(at most {_reach(weighted):g} of reward; {seen})",
            "scope: turn with role: shaping gives the same hint and cannot be farmed; or keep the weight small",
        )


def _reach(weighted: WeightedDimension) -> float:
    column = weighted.column
    return abs(column.weight) * (column.high - column.low)


def _flips(system: RewardSystem, bonus: WeightedDimension, samples: _Samples) -> tuple[int, int]:
    """Pairs of samples whose order turns round with the bonus, and pairs that have an order without it.

    Pairs inside a group where groups have several episodes, else all: samples are often of different tasks.
    """
    keep = [k for k, weighted in enumerate(system.dimensions) if not weighted.dimension.per_turn]
    without = tuple(replace(c, weight=0.0) if c.name == bonus.name else c for c in samples.table.columns)
    before = system.aggregator(replace(samples.table, columns=without).select(keep)).reward
    after = system.aggregator(samples.table.select(keep)).reward
    alone = len(np.unique(samples.groups)) == len(samples)
    flipped = pairs = 0
    for i in range(len(samples)):
        others = slice(i + 1, None)
        with np.errstate(invalid="ignore"):
            old, new = np.sign(before[others] - before[i]), np.sign(after[others] - after[i])
        comparable = np.isfinite(old) & np.isfinite(new) & (old != 0)
        if not alone:
            comparable &= samples.groups[others] == samples.groups[i]
        pairs += int(comparable.sum())
        flipped += int((comparable & (old != new)).sum())
    return flipped, pairs


def _by_group(system: RewardSystem, samples: _Samples) -> Iterator[Finding]:
    """Groups in which no episode passes every gate."""
    gates = [k for k in samples.where(Kind.GATE, system=system) if not system.dimensions[k].dimension.per_turn]
    counts = np.bincount(samples.groups) if len(samples) else np.zeros(0)
    several = np.flatnonzero(counts > 1)
    if not gates or not several.size:
        return
    passes = np.ones(len(samples), dtype=bool)
    for k in gates:
        passes &= samples.table.columns[k].passes(samples.values[:, k])
    dead = [group for group in several if not passes[samples.groups == group].any()]
    if dead:
        names = ", ".join(system.dimensions[k].name for k in gates)
        yield Finding(
            samples.level,
            "",
            f"in {len(dead)} of {several.size} sample groups no episode passes the gates ({names})",
            "with veto, product or min such a group teaches nothing; with geometric only what little the gate leaves",
            "start from a model that passes sometimes (warm-up), or use `gate: geometric` until it does",
        )


# ---- probes: what a function does on an episode that was made for the purpose ------------------


def _gate_probes(system: RewardSystem, samples: _Samples) -> Iterator[Finding]:
    """Gates that pass an episode in which nothing happened, as `all([])` does."""
    if not len(samples):
        return
    first = samples.episodes[0]
    nothing = Episode(first.task, id=first.id, group=first.group)
    silent = deepcopy(first)
    silent.scores = {}
    for answer in silent.answers:
        answer.text, answer.raw = None, ""
    for weighted in system.dimensions:
        if kind(weighted) is not Kind.GATE or "judge" in weighted.dimension.wants or weighted.dimension.per_turn:
            continue
        for probe, what in (
            (nothing, "an episode without turns and answers"),
            (silent, "an episode without an answer"),
        ):
            own = deepcopy(probe)
            measure([own], [weighted])
            value: Floats = np.array([own.scores[weighted.name].value], dtype=np.float64)  # None becomes NaN
            if not weighted.column.passes(weighted.transformed(value)).all():
                continue
            empty = probe is nothing
            yield Finding(
                Level.WARNING if empty else Level.NOTE,
                weighted.name,
                f"the gate passes {what}",
                "what failed to happen counts as right, as `all([])` does",
                'return Score(None, "nothing to check") there: a gate without a value fails',
            )
            break


def _by_gold(system: RewardSystem, samples: _Samples) -> Iterator[Finding]:
    """Potentials whose value changes with the gold answers."""
    for weighted in system.dimensions:
        if kind(weighted) is not Kind.POTENTIAL or "judge" in weighted.dimension.wants:
            continue
        if _reads_gold(weighted, samples.episodes[:4]):
            yield Finding(
                Level.NOTE,
                weighted.name,
                "the potential reads the gold answers or the evidence",
                "fine in training, where they are known; it cannot score what users bring",
            )


def _reads_gold(weighted: WeightedDimension, episodes: Sequence[Episode]) -> bool:
    plain, blind = deepcopy(list(episodes)), [_without_gold(episode) for episode in episodes]
    measure(plain, [weighted])
    measure(blind, [weighted])
    return [_turn_values(e, weighted.name) for e in plain] != [_turn_values(e, weighted.name) for e in blind]


def _without_gold(episode: Episode) -> Episode:
    own = deepcopy(episode)
    own.task = replace(
        own.task, probes=tuple(replace(probe, answers=("\0",), evidence=()) for probe in own.task.probes), metadata={}
    )
    for answer in own.answers:
        answer.probe = replace(answer.probe, answers=("\0",), evidence=())
    return own


def _turn_values(episode: Episode, name: str) -> list[float | None]:
    return [turn.scores[name].value for turn in episode.turns if name in turn.scores]


# ---- how it is shown -------------------------------------------------------------------------


def print_findings(
    console: Console, system: RewardSystem, episodes: Sequence[Episode], *, scale_rewards: str = "group"
) -> None:
    """Print what each dimension is, and what was found."""
    table = Table("reward", "is", "weight", box=None, pad_edge=False, header_style="bold")
    for weighted in system.dimensions:
        table.add_row(weighted.name, str(kind(weighted)), f"{weighted.weight:g}")
    console.print(table)
    findings = lint(system, episodes, scale_rewards=scale_rewards)
    for finding in findings:
        style = "yellow" if finding.level is Level.WARNING else "dim"
        console.print(str(finding), style=style, markup=False, highlight=False, soft_wrap=True)
    if not findings:
        console.print("nothing to remark", highlight=False)

"""What the linter says of reward systems that are known to go wrong."""

from __future__ import annotations

import pytest

from memfactory import Answer, Episode, Evidence, Probe, Score, StopReason, Task, Turn
from memfactory.recipe import CreditSection
from memfactory.reward.aggregate import Gated, NormalizeThenSum, WeightedSum, max_safe_delta
from memfactory.reward.catalogue import WeightedDimension
from memfactory.reward.dimension import RewardDimension, Role, Scope
from memfactory.reward.lint import Finding, Kind, Level, kind, lint, variance_shares
from memfactory.reward.system import RewardSystem
from memfactory.reward.transform import Clip


def episode(number: int = 0, *, calls: int = 1, quality: float = 0.0, group: str = "g", memory: str = "") -> Episode:
    probe = Probe("Where?", ("Oslo",), (Evidence("Oslo", 0),))
    turns = [Turn("search", [1], [2], [0.0], "x", StopReason.STOP, memory_after=memory, chunk=n) for n in range(calls)]
    task = Task(f"t/{group}", ("Oslo .",), (probe,), {"quality": quality})
    return Episode(task, turns, [Answer(probe, "Oslo")], memory, id=f"{group}/{number}", group=group)


def dimension(function, weight: float = 1.0, name: str = "", **options) -> WeightedDimension:
    made = RewardDimension(name or function.__name__, function, **options)
    return WeightedDimension(made.name, made, weight)


def quality(episode):
    return episode.task.metadata["quality"]


def calls(episode):
    return float(len(episode.turns))


def found(system: RewardSystem, episodes=(), about: str = "", **options) -> list[Finding]:
    return [one for one in lint(system, episodes, **options) if about in str(one)]


# ---- a flat bonus ----------------------------------------------------------------------------


def test_a_flat_bonus_changes_the_ranking_and_is_flagged() -> None:
    """A: one search call, reward .50; B: three calls, reward .35. A bonus of .1 per call makes them .60 and .65."""
    few, many = episode(0, calls=1, quality=0.5), episode(1, calls=3, quality=0.35)
    bonus = dimension(calls, 0.1, role=Role.BONUS, high=10.0)
    plain = RewardSystem([dimension(quality)])
    plain.score([few, many])
    assert (few.reward, many.reward) == pytest.approx((0.5, 0.35))
    system = RewardSystem([dimension(quality), bonus])
    system.score([few, many])
    assert (few.reward, many.reward) == pytest.approx((0.60, 0.65))

    assert kind(bonus) is Kind.BONUS
    (finding,) = found(system, [few, many], "plain bonus")
    assert (finding.level, finding.dimension) == (Level.WARNING, "calls")
    assert "no potential" in finding.what
    assert "1 of 1 pairs" in finding.why
    assert "at most 1 of reward" in finding.why


def test_the_same_hint_as_a_potential_is_not_flagged() -> None:
    potential = dimension(lambda e, turn: turn.chunk / 10, name="phi", scope=Scope.TURN, role=Role.SHAPING)
    assert kind(potential) is Kind.POTENTIAL
    assert not found(RewardSystem([dimension(quality), potential]), about="bonus")


def test_a_bonus_on_every_turn_and_rewards_of_turns() -> None:
    one = dimension(lambda e, turn: 1.0, name="chatty", scope=Scope.TURN, role=Role.BONUS)
    (finding,) = found(RewardSystem([dimension(quality), one]), about="every turn")
    assert (finding.level, finding.dimension) == (Level.WARNING, "chatty")
    other = dimension(lambda e, turn: 1.0, name="step", scope=Scope.TURN)
    (finding,) = found(RewardSystem([dimension(quality), other]), about="for themselves")
    assert (finding.level, finding.dimension) == (Level.NOTE, "step")


def test_weight_zero_is_watched() -> None:
    watched = dimension(calls, 0.0, role=Role.BONUS, high=10.0)
    assert kind(watched) is Kind.WATCHED
    assert not found(RewardSystem([dimension(quality), watched]), about="calls")


# ---- gates -----------------------------------------------------------------------------------


def gates(count: int) -> list[WeightedDimension]:
    return [dimension(lambda e: Score(None, "?"), name=f"gate{n}", role=Role.GATE) for n in range(count)]


@pytest.mark.parametrize(("count", "delta", "flagged"), [(1, 0.01, False), (3, 0.15, True), (9, 0.01, True)])
def test_delta_above_what_is_safe(count: int, delta: float, flagged: bool) -> None:
    system = RewardSystem([dimension(quality), *gates(count)], Gated(delta=delta), CreditSection(advantage="centered"))
    findings = found(system, about="delta")
    assert bool(findings) is flagged
    if flagged:
        assert f"{max_safe_delta(count):.3g}" in findings[0].what
        assert f"{delta:g}" in findings[0].what


def test_nine_gates_at_the_papers_delta_keep_three_fifths() -> None:
    (finding,) = found(RewardSystem([dimension(quality), *gates(9)]), about="delta")
    assert "0.00196" in finding.what
    assert "0.60" in finding.why


@pytest.mark.parametrize("aggregator", [WeightedSum(), NormalizeThenSum()])
def test_gates_that_are_traded(aggregator) -> None:
    (finding,) = found(RewardSystem([dimension(quality), *gates(1)], aggregator), about="a gate under")
    assert (finding.level, finding.dimension) == (Level.WARNING, "gate0")


def test_standardising_gives_back_what_a_gate_takes() -> None:
    about = "dividing by the standard deviation"
    dimensions = [dimension(quality), *gates(1)]
    assert found(RewardSystem(dimensions), about=about)
    assert not found(RewardSystem(dimensions), about=about, scale_rewards="none")
    for credit in (CreditSection(std_floor=0.1), CreditSection(advantage="centered")):
        assert not found(RewardSystem(dimensions, credit=credit), about=about)
    assert not found(RewardSystem(dimensions, Gated(gate="veto")), about=about)
    # and it is so: in a group that fails, advantages are as large as in one that passes
    episodes = [episode(n, quality=n / 4, group=g) for g in ("pass", "fail") for n in range(4)]
    gate = dimension(lambda e: float(e.group == "pass"), name="gate", role=Role.GATE)
    system = RewardSystem([dimension(quality), gate])
    system.begin().finish(episodes)
    system.assess(episodes)
    assert episodes[4].reward == pytest.approx(episodes[0].reward * 0.01 / 1.01)
    assert abs(episodes[7].advantage) > 0.9 * abs(episodes[3].advantage)


def test_a_gate_that_passes_where_nothing_happened() -> None:
    every = dimension(lambda e: float(all(a.text for a in e.answers)), name="every", role=Role.GATE)
    strict = dimension(lambda e: float(len(e.answers) > 0 and bool(e.answers[0].text)), name="strict", role=Role.GATE)
    raises = dimension(lambda e: float(e.answers[0].text == "Oslo"), name="raises", role=Role.GATE)
    system = RewardSystem([dimension(quality), every, strict, raises])
    findings = found(system, [episode()], "the gate passes")
    assert [(one.level, one.dimension) for one in findings] == [(Level.WARNING, "every")]


def test_groups_in_which_nobody_passes() -> None:
    gate = dimension(lambda e: float(e.group == "a"), name="gate", role=Role.GATE)
    samples = [episode(n, quality=n / 4, group=g) for g in "ab" for n in range(4)]
    (finding,) = found(RewardSystem([dimension(quality), gate]), samples, "no episode passes")
    assert "1 of 2" in finding.what
    assert finding.level is Level.WARNING


# ---- spread, weight, range -------------------------------------------------------------------


def test_no_spread_is_a_warning_only_where_there_are_enough_episodes() -> None:
    flat = RewardSystem([dimension(quality), dimension(lambda e: 0.25, name="flat")])
    for count, level in ((8, Level.WARNING), (2, Level.NOTE)):
        findings = found(flat, [episode(n, quality=n / 8) for n in range(count)], "without spread")
        assert [(one.dimension, one.level) for one in findings] == [("flat", level)]


def test_no_value_on_many_episodes() -> None:
    def rare(episode):
        return Score(None, "no citation") if episode.id != "g/0" else 1.0

    (finding,) = found(RewardSystem([dimension(quality), dimension(rare)]), [episode(n) for n in range(8)], "no value")
    assert "7 of 8" in finding.what
    assert "no citation" in finding.why
    assert finding.level is Level.WARNING


def test_one_dimension_that_decides_alone() -> None:
    def other(episode):
        return int(episode.id[-1]) / 80

    samples = [episode(n, quality=n % 2) for n in range(8)]
    system = RewardSystem([dimension(quality), dimension(other)])
    (finding,) = found(system, samples, "decides alone")
    assert finding.dimension == "quality"
    assert not found(RewardSystem(system.dimensions, NormalizeThenSum()), samples, "decides alone")


def test_variance_shares_are_of_the_weighted_terms() -> None:
    import numpy as np

    values = np.array([[0.0, 0.0], [1.0, 1.0]])
    system = RewardSystem([dimension(quality, 3.0), dimension(lambda e: 1.0, 1.0, name="b")])
    assert variance_shares(system, values).tolist() == pytest.approx([0.9, 0.1])
    assert variance_shares(RewardSystem(system.dimensions, WeightedSum()), values).tolist() == pytest.approx(
        [0.9, 0.1]
    )


def test_an_open_range_beside_others() -> None:
    raw = dimension(calls, name="raw", low=float("-inf"), high=float("inf"))
    assert found(RewardSystem([dimension(quality), raw], WeightedSum()), about="is open")
    assert not found(RewardSystem([raw], WeightedSum()), about="is open")
    clipped = WeightedDimension("raw", raw.dimension, transform=Clip())
    assert not found(RewardSystem([dimension(quality), clipped], WeightedSum()), about="is open")


# ---- potentials ------------------------------------------------------------------------------


def test_a_potential_that_reads_the_gold() -> None:
    def held(episode, turn):
        return float(any(e.text in turn.memory_after for p in episode.task.probes for e in p.evidence))

    def grows(episode, turn):
        return min(1.0, len(turn.memory_after) / 10)

    options = {"scope": Scope.TURN, "role": Role.SHAPING}
    system = RewardSystem([dimension(quality), dimension(held, **options), dimension(grows, **options)])
    findings = found(system, [episode(memory="Oslo")], "reads the gold")
    assert [(one.dimension, one.level) for one in findings] == [("held", Level.NOTE)]


def test_a_lambda_below_one_biases_a_potential() -> None:
    phi = dimension(lambda e, turn: 0.5, name="phi", scope=Scope.TURN, role=Role.SHAPING)
    assert found(RewardSystem([dimension(quality), phi], credit=CreditSection(lam=0.9)), about="credit.lam")
    assert not found(RewardSystem([dimension(quality), phi]), about="credit.lam")


# ---- the samples are left alone --------------------------------------------------------------


def test_samples_are_measured_on_copies_and_scores_that_are_there_are_used() -> None:
    asked = []

    def counted(episode):
        asked.append(episode.id)
        return quality(episode)

    system = RewardSystem([dimension(counted)])
    samples = [episode(n, quality=n / 4) for n in range(4)]
    lint(system, samples)
    assert len(asked) == 4
    assert all(not sample.scores for sample in samples)
    system.begin().finish(samples)
    asked.clear()
    lint(system, samples)
    assert asked == []


def test_warnings_come_first_and_say_what_to_do() -> None:
    system = RewardSystem([dimension(quality), dimension(calls, role=Role.BONUS, high=9.0), *gates(1)])
    findings = lint(system, [episode()])
    levels = [one.level for one in findings]
    assert levels == sorted(levels, key=lambda level: level is Level.NOTE)
    assert all(one.fix for one in findings if one.level is Level.WARNING)

"""Episodes that could not be run: no function sees them, and the others are scored as if they had not been."""

from __future__ import annotations

from typing import Any

import pytest

from memfactory.episode import Answer, Episode, Probe, StopReason, Task, Turn
from memfactory.errors import RewardError, ServiceError, StoreError
from memfactory.recipe import CreditSection
from memfactory.reward.aggregate import WeightedSum
from memfactory.reward.catalogue import WeightedDimension
from memfactory.reward.dimension import Missing, RewardDimension, Role, Scope
from memfactory.reward.system import RewardSystem

TASK = Task("t0", (), (Probe("what is the pet of ann ?", ("dog",)),))


def assess(episodes: list[Episode], *dimensions: WeightedDimension, limit: float = 1.0, **credit: Any):
    system = RewardSystem(dimensions or [said()], credit=CreditSection(**credit))
    return system.assess(episodes, system.begin().finish(episodes), max_failed_share=limit)


def group(*rewards: float | None, name: str = "t0") -> list[Episode]:
    """Episodes of one group with one turn each; None: could not be run."""
    made = []
    for number, reward in enumerate(rewards):
        episode = Episode(TASK, id=f"{name}/{number}", group=name)
        if reward is None:
            episode.failed = "service: nobody there: refused\n  fix: start it"
        else:
            episode.turns = [Turn("answer", [1], [2], [-0.5], "x", StopReason.STOP)]
            episode.answers = [Answer(TASK.probes[0], "x", turn=0)]
            episode.memory = str(reward)
        made.append(episode)
    return made


def said(name: str = "said", **options: Any) -> WeightedDimension:
    keys = {key: options.pop(key) for key in ("scope", "role", "missing") if key in options}
    return WeightedDimension(name, RewardDimension(name, lambda episode: float(episode.memory), **keys), **options)


GATE = said("gate", role=Role.GATE)
FILLED = said("filled", missing=Missing.GROUP_MEAN)
DROPPED = said("dropped", missing=Missing.DROP)


@pytest.mark.parametrize("dimensions", [[said()], [said(), GATE], [said(), FILLED], [said(), DROPPED, GATE]])
@pytest.mark.parametrize("advantage", ["standardized", "centered", "rloo", "batch"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_the_others_are_credited_as_if_it_had_not_been(dimensions, advantage, shuffle):
    """Also where a dimension would stand in for what is missing, or a gate fail closed."""
    values = [(0.0, None, 1.0, 0.5), (None, 0.25, 0.75, None), (1.0, 0.0, 0.5, 0.5)]
    mixed = [e for n, own in enumerate(values) for e in group(*own, name=f"g{n}")]
    alone = [e for n, own in enumerate(values) for e in group(*(v for v in own if v is not None), name=f"g{n}")]
    credit = {"advantage": advantage, "shuffle_rewards": shuffle}
    with_failed, without = assess(mixed, *dimensions, **credit), assess(alone, *dimensions, **credit)
    ran = [episode for episode in mixed if not episode.failed]
    if shuffle:  # the draws differ; who takes part does not
        assert sorted(e.reward for e in ran) == sorted(e.reward for e in alone)
    else:
        assert [(e.reward, e.advantage) for e in ran] == [(e.reward, e.advantage) for e in alone]
        assert [e.turns[0].advantage for e in ran] == [e.turns[0].advantage for e in alone]
        metrics = {k: v for k, v in with_failed.metrics.items() if not k.startswith("faults/")}
        assert metrics == pytest.approx(without.metrics, nan_ok=True)
    assert with_failed.failed == 3
    assert with_failed.metrics["faults/service"] == 3
    for episode in mixed:
        if episode.failed:
            assert (episode.reward, episode.advantage) == (None, 0.0)


def test_no_function_sees_it_and_every_dimension_says_why():
    seen: list[str] = []

    def note(name: str, **options: Any) -> WeightedDimension:
        def function(given: Any) -> Any:
            many = given if isinstance(given, list) else [given]
            seen.extend(f"{name} {episode.id}" for episode in many)
            return [1.0] * len(many) if isinstance(given, list) else 1.0

        return WeightedDimension(name, RewardDimension(name, function, **options))

    async def judge(episode: Episode) -> float:
        seen.append(f"judge {episode.id}")
        return 1.0

    def turn(episode: Episode, turn: Turn) -> float:
        seen.append(f"turn {episode.id}")
        return 1.0

    dimensions = [
        note("plain"),
        note("batched", batched=True),
        note("group", scope=Scope.GROUP),
        WeightedDimension("turn", RewardDimension("turn", turn, scope=Scope.TURN)),
        WeightedDimension("judge", RewardDimension("judge", judge)),
    ]
    episodes = group(1.0, None, 0.0)
    result = assess(episodes, *dimensions)
    names = ["plain", "batched", "group", "turn", "judge"]
    assert sorted(seen) == sorted(f"{name} t0/{number}" for name in names for number in (0, 2))
    assert list(episodes[1].scores) == names
    for score in episodes[1].scores.values():
        assert (score.value, score.reason) == (
            None,
            "the episode was not run to its end: service: nobody there: refused",
        )
    assert result.record["faults"]["count"] == {"service": 1}
    assert result.record["faults"]["examples"] == ["nobody there: refused\n  fix: start it"]
    assert result.record["dimensions"]["plain"]["none_share"] == 0
    assert result.record["dimensions"]["plain"]["reasons"] == {}


def test_turns_made_before_the_failure_are_not_trained():
    """Whatever a caller leaves on the episode."""
    episodes = group(1.0, 0.0, 0.5)
    episodes[1].failed = "store: away"
    assess(episodes)
    assert (episodes[1].reward, episodes[1].turns[0].advantage) == (None, 0.0)


def test_the_threshold_names_whose_fault_it_was():
    episodes = group(None, None, 0.5, 1.0)
    episodes[1].failed = "store: disk: full\n  fix: make room"
    with pytest.raises((ServiceError, StoreError)) as error:
        assess(episodes, limit=0.25)
    assert "2 of 4 episodes could not be scored, 1 by a fault of the service and 1 by a fault of the store" in str(
        error.value
    )
    assert "make room" in str(error.value)
    assert "nobody there" in str(error.value)
    assert assess(episodes, limit=0.5).failed == 2
    broken = WeightedDimension("said", RewardDimension("said", lambda episode: 1 / 0))  # mostly the reward's fault
    with pytest.raises(RewardError, match="3 of 3 episodes could not be scored, 1 by a fault of the service"):
        assess(group(None, 0.5, 1.0), broken, limit=0.5)


def test_nothing_but_failures_is_no_crash():
    for dimensions in ([said()], [said(), GATE], [said(), FILLED]):
        episodes = group(None, None)
        assert assess(episodes, *dimensions).failed == 2
        system = RewardSystem(dimensions)
        system.score(episodes)
        assert [episode.reward for episode in episodes] == [None, None]


def test_groups_over_ranks(on_ranks):
    """A part of the group that another rank could not run is no part of it."""
    parts = [group(0.0, None, name="g"), group(1.0, 0.5, name="g")]
    sizes = WeightedDimension(
        "size", RewardDimension("size", lambda own: [float(len(own))] * len(own), 0, 9, scope=Scope.GROUP)
    )

    def work(rank, own, gather):
        system = RewardSystem([said(), sizes], WeightedSum(), CreditSection(advantage="centered"))
        return system.assess(own, system.begin().finish(own, gather), gather=gather, rank=rank)

    for number, part in enumerate(parts):
        for index, episode in enumerate(part):
            episode.id = f"{number}/{index}"
    results = on_ranks(parts, work)
    assert [result.failed for result in results] == [1, 1]
    assert [episode.scores["size"].value for part in parts for episode in part] == [3.0, None, 3.0, 3.0]
    # the mean of the three is that of 0, 1 and .5; the size is the same for all
    assert [episode.advantage for part in parts for episode in part] == pytest.approx([-0.5, 0.0, 0.5, 0.0])

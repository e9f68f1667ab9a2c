"""What every shipped reward must hold to, whatever the episode."""

from __future__ import annotations

import asyncio
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memfactory import Answer, Episode, Evidence, Operation, Probe, Retrieved, Score, StopReason, Task, Turn
from memfactory.plugins import load_file, shipped
from memfactory.reward.catalogue import load_dimension
from memfactory.reward.dimension import RewardDimension, Scope
from memfactory.reward.judge import RuleJudge
from memfactory.runs import episode_from_record

NAMES = sorted(
    f"{path.stem}.{name}"
    for path in shipped("rewards").glob("*.py")
    for name, value in vars(load_file(path)).items()
    if isinstance(value, RewardDimension)
)
SAMPLES = shipped("data") / "samples" / "episodes.jsonl"


def measured(dimension: RewardDimension, episodes: list[Episode]) -> list[Score]:
    """Every score of `dimension` on `episodes` (of one group), checked against its declaration."""
    function = dimension.supply({"judge": RuleJudge()}).function
    if dimension.scope is Scope.GROUP:
        results = list(function(episodes))
        assert len(results) == len(episodes)
    elif dimension.per_turn:
        results = [function(e, turn) for e in episodes for turn in e.turns if dimension.speaks_about(turn)]
    else:
        results = [function(e) for e in episodes]
    if dimension.asynchronous:

        async def wait():
            return await asyncio.gather(*results)

        results = asyncio.run(wait())
    return [dimension.check(result, "here") for result in results]


WORDS = st.lists(st.sampled_from("Leo Mia 25 1,000 Rome the code is not . \n I don't know".split(" ")), max_size=8)
TEXTS = WORDS.map(" ".join) | st.text(max_size=12) | st.sampled_from([r"\boxed{25}", '{"a": 1}', "<think>x</think>"])
PROBES = st.builds(
    Probe,
    TEXTS,
    st.lists(TEXTS, min_size=1, max_size=3).map(tuple),
    st.lists(st.builds(Evidence, TEXTS, st.integers(0, 3)), max_size=3).map(tuple),
)
TURNS = st.builds(
    Turn,
    st.sampled_from(["write", "update", "answer"]),
    st.just([]),
    st.lists(st.integers(0, 9), max_size=5),
    st.just([]),
    TEXTS,
    st.sampled_from(list(StopReason)),
    chunk=st.none() | st.integers(0, 3),
    memory_before=TEXTS,
    memory_after=TEXTS,
    error=st.sampled_from(["", "not JSON"]),
    operations=st.lists(st.builds(Operation, st.just("ADD"), error=st.sampled_from(["", "no"])), max_size=3),
    retrieved=st.lists(st.builds(Retrieved, st.sampled_from(["m1", "m2", "m3"]), TEXTS), max_size=4),
    cited=st.lists(st.sampled_from(["m1", "m2", "m9"]), max_size=3),
)


@st.composite
def groups(draw):
    metadata = draw(st.sampled_from([{}, {"answerable": False}, {"answerable": True}, {"required": ["Leo", "25"]}]))
    stream = tuple(draw(st.lists(TEXTS, max_size=3)))
    task = Task("t", stream, tuple(draw(st.lists(PROBES, max_size=2))), metadata)
    episodes = []
    for _ in range(draw(st.integers(1, 3))):
        answers = [Answer(probe, draw(st.none() | TEXTS), draw(TEXTS)) for probe in task.probes]
        episodes.append(Episode(task, draw(st.lists(TURNS, max_size=4)), answers, draw(TEXTS), group="t"))
    return episodes


@settings(max_examples=60)
@given(groups())
def test_on_any_episode_a_value_in_range_or_none_with_a_reason(episodes):
    for name in NAMES:
        dimension = load_dimension(name)
        for score in measured(dimension, episodes):
            assert score.reason if score.value is None else dimension.low <= score.value <= dimension.high


@settings(max_examples=30)
@given(groups())
def test_measuring_changes_nothing_and_gives_the_same_again(episodes):
    before = repr(episodes)
    for name in NAMES:
        assert measured(load_dimension(name), episodes) == measured(load_dimension(name), episodes)
    assert repr(episodes) == before


def test_there_are_rewards_of_every_kind():
    dimensions = [load_dimension(name) for name in NAMES]
    assert {dimension.scope for dimension in dimensions} == set(Scope)
    assert {str(dimension.role) for dimension in dimensions} == {"gate", "objective", "shaping", "bonus"}


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_says_range_and_how_it_can_be_gamed(name):
    doc = load_dimension(name).doc
    low, high = load_dimension(name).low, load_dimension(name).high
    assert "Gaming:" in doc
    assert f"[{low:g}, {high:g}]" in doc or re.search(r"\b1 if .* else 0\b", doc, re.DOTALL), "no range"


@pytest.mark.parametrize("name", NAMES)
def test_every_option_has_a_type_and_a_default(name):
    for option in load_dimension(name).options.values():
        assert option.annotation is not option.empty
        assert option.default is not option.empty


def samples() -> list[Episode]:
    return [episode_from_record(json.loads(line)) for line in SAMPLES.read_text(encoding="utf-8").splitlines()]


def test_the_sample_episodes_are_whole_groups_of_real_ones():
    episodes = samples()
    by_group = {e.group: [own for own in episodes if own.group == e.group] for e in episodes}
    assert [len(group) for group in by_group.values()] == [8, 8]
    assert SAMPLES.stat().st_size < 200_000
    assert all(e.task.probes[0].evidence for e in episodes)
    assert not any(turn.prompt_ids or turn.completion_ids or turn.logprobs for e in episodes for turn in e.turns)
    for group in by_group.values():
        for name in (
            "answer.exact_match",
            "answer.token_f1",
            "grounding.supported",
            "grounding.supported_writes",
            "length.group_relative",
            "memory.churn",
            "memory.compression",
            "memory.evidence_held",
            "memory.evidence_recall",
            "abstention.calibrated",
        ):
            values = {score.value for score in measured(load_dimension(name), group)}
            assert None not in values
            assert len(values) > 1, f"{name} says nothing on {group[0].group}"


def test_the_sample_episodes_are_scored_as_their_run_scored_them():
    for episode in samples():
        for name in ("answer.exact_match", "answer.token_f1"):
            assert load_dimension(name).function(episode) == pytest.approx(episode.scores[name].value)

"""Synthetic dialogues: the gold answers follow from what is said, and the knobs do what they say."""

from __future__ import annotations

import re
from collections import Counter
from datetime import date, timedelta
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memfactory.environments import Split, build_environment, check_disjoint
from memfactory.environments import dialogue_world as world
from memfactory.environments.dialogues import Ask, Dialogues, Event, Happening, Needs, replay
from memfactory.episode import Episode, Task
from memfactory.errors import MemFactoryError, RecipeError
from memfactory.runs import episode_from_record, episode_record

UNITS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}


@st.composite
def environments(draw: st.DrawFn) -> Dialogues:
    """Any options that fit."""
    speakers = draw(st.integers(1, 4))
    facts, dates = draw(st.integers(1, 6)), draw(st.integers(0, 4))
    changes, distractors = draw(st.integers(0, 6)), draw(st.integers(0, 6))
    retractions = draw(st.integers(0, facts + dates))
    sessions = draw(st.integers(1, 6))
    says = facts + dates + changes + retractions + distractors
    return Dialogues(
        seed=draw(st.integers(0, 10**6)),
        sessions=sessions,
        turns_per_session=-(-says // sessions) + draw(st.integers(0, 3)),
        facts=facts,
        changes=changes,
        retractions=retractions,
        distractors=distractors,
        speakers=speakers,
        relative_dates=dates,
        probes=draw(st.integers(1, facts + dates)),
        ask=draw(st.sampled_from(Ask)),
    )


def read_day(words: str) -> date:
    day, month, year = words.split()
    return date(int(year), world.MONTHS.index(month) + 1, int(day))


def understood(text: str, when: date) -> str:
    """What a reader makes of the words for a value: dates are counted from the day of the session."""
    if text == "today":
        return world.date_words(when)
    if text == "tomorrow":
        return world.date_words(when + timedelta(days=1))
    if match := re.fullmatch(r"in (\w+) (day|week)s?", text):
        days = UNITS[match[1]] * (7 if match[2] == "week" else 1)
        return world.date_words(when + timedelta(days=days))
    return text


def read(task: Task, sessions: int) -> dict[tuple[str, str], str]:
    """State of the facts after `sessions` sessions, from the text alone: none of the labels is looked at."""
    state: dict[tuple[str, str], str] = {}
    for chunk in task.stream[:sessions]:
        head, *lines = chunk.split("\n")
        when = read_day(re.fullmatch(r"date : (.+) \.", head)[1])  # type: ignore[index]
        for line in lines:
            speaker, _, sentence = line.partition(" : ")
            if match := re.search(r"\bmy (\w+) is (?:now )?(.+) \.$", sentence):
                if " of my " not in sentence:
                    state[speaker, match[1]] = understood(match[2], when)
            elif match := re.search(r"\bno (\w+) any more\b", sentence):
                state[speaker, match[1]] = ""
    return state


def events_of(task: Task) -> list[Event]:
    return [Event(**{**event, "operation": Happening(event["operation"])}) for event in task.metadata["events"]]


@given(environments(), st.sampled_from(Split))
@settings(max_examples=60)
def test_gold_answers_follow_from_the_text_and_from_the_events(environment: Dialogues, split: Split) -> None:
    for task in environment.tasks(split, 2):
        assert len(task.probes) == environment.probes
        for probe, note in zip(task.probes, task.metadata["probes"], strict=True):
            held = len(task.stream) if probe.after is None else probe.after
            slot = (note["speaker"], note["fact"])
            value = read(task, held)[slot]
            assert replay(events_of(task), held)[slot].value == value
            assert note["needs_deletion"] == (value == "") == (probe.category == Needs.DELETION)
            if value:
                assert probe.answers == (value,)
            else:
                assert probe.answers == ("none", "nothing", f"no {note['fact']}")
            assert note["needs_date"] == (bool(value) and note["fact"] in world.OCCASIONS)
            assert all(word in probe.question.split() for word in slot)


@given(environments())
@settings(max_examples=60)
def test_evidence_stands_in_its_session_and_before_the_question(environment: Dialogues) -> None:
    for task in environment.tasks(Split.TRAIN, 2):
        for probe in task.probes:
            assert probe.evidence
            for evidence in probe.evidence:
                assert f" {evidence.text} " in task.stream[evidence.chunk].replace("\n", " ")
                assert evidence.chunk < (len(task.stream) if probe.after is None else probe.after)
        for event in events_of(task):
            line = task.stream[event.session].split("\n")[1 + event.turn]
            assert line.startswith(f"{event.speaker} : ")
            assert event.said in line


@given(environments())
@settings(max_examples=60)
def test_distractions_never_answer_a_question(environment: Dialogues) -> None:
    for task in environment.tasks(Split.TEST, 2):
        events = events_of(task)
        told = {event.value for event in events if event.operation != Happening.DISTRACTION}
        for event in events:
            if event.operation == Happening.DISTRACTION:
                assert event.value not in told
        said_elsewhere = {(event.session, event.turn) for event in events}
        values = {value for values in world.ATTRIBUTES.values() for value in values}
        for session, chunk in enumerate(task.stream):
            for turn, line in enumerate(chunk.split("\n")[1:]):
                if (session, turn) not in said_elsewhere:
                    assert not values & set(line.split()), "chatter holds no value"


@given(environments(), st.integers(0, 10**6))
@settings(max_examples=40)
def test_splits_are_disjoint_for_any_seeds(environment: Dialogues, other: int) -> None:
    train = environment.tasks(Split.TRAIN, 3)
    test = Dialogues(**{**vars(environment), "seed": other}).tasks(Split.TEST, 3)
    check_disjoint(train, test)

    def pairs(tasks: Any) -> set[tuple[str, str, str]]:
        return {(e.speaker, e.fact, e.value) for task in tasks for e in events_of(task) if e.value}

    assert not pairs(train) & pairs(test)


@given(environments())
@settings(max_examples=60)
def test_the_knobs_do_what_they_say(environment: Dialogues) -> None:
    task = environment.tasks(Split.TRAIN, 1)[0]
    events = events_of(task)
    count = Counter(event.operation for event in events)
    told = environment.facts + environment.relative_dates
    assert count[Happening.NEW] == told
    assert count[Happening.CHANGED] == environment.changes
    assert count[Happening.RETRACTED] == environment.retractions
    assert count[Happening.DISTRACTION] == environment.distractors
    assert len(task.stream) == environment.sessions == len(task.metadata["sessions"])
    assert all(len(chunk.split("\n")) == 1 + environment.turns_per_session for chunk in task.stream)
    own = [event for event in events if event.operation == Happening.NEW]
    assert sum(event.fact in world.OCCASIONS for event in own) == environment.relative_dates
    assert len({event.speaker for event in own}) == min(
        environment.speakers, max(environment.facts, environment.relative_dates)
    )
    speakers = {speaker for session in task.metadata["sessions"] for speaker in session["speakers"]}
    assert len(speakers) <= environment.speakers
    days = [date.fromisoformat(session["time"]) for session in task.metadata["sessions"]]
    assert days == sorted(set(days))
    # a perfect manager: each fact is added first, updated to another value, deleted at most once and last
    for slot in {(event.speaker, event.fact) for event in own}:
        mine = [e for e in events if (e.speaker, e.fact) == slot and e.operation != Happening.DISTRACTION]
        assert [e.operation for e in mine[:1]] == [Happening.NEW]
        assert all(e.operation == Happening.CHANGED for e in mine[1:-1])
        assert all(a.value != b.value for a, b in pairwise(mine))
    afters = {probe.after for probe in task.probes}
    assert afters == {None} if environment.ask == Ask.END else all(1 <= a <= len(task.stream) for a in afters if a)


@given(environments())
@settings(max_examples=40)
def test_the_vocabulary_is_closed(environment: Dialogues) -> None:
    words = environment.vocabulary()
    assert len(words) == len(set(words))
    for split in Split:
        for task in environment.tasks(split, 2):
            texts = [*task.stream, *(text for probe in task.probes for text in (probe.question, *probe.answers))]
            assert set(" ".join(texts).split()) <= set(words)


def test_values_belong_to_one_list_only() -> None:
    values = [value for values in world.ATTRIBUTES.values() for value in values]
    assert len(values) == len(set(values))
    assert all(len(values) == 10 for values in world.ATTRIBUTES.values())


def test_the_same_call_gives_the_same_tasks() -> None:
    environment = Dialogues(seed=3, relative_dates=1)
    first = environment.tasks(Split.TRAIN, 5)
    assert first == environment.tasks(Split.TRAIN, 5)
    assert first[:2] == environment.tasks(Split.TRAIN, 2)
    assert len({task.stream for task in first}) == 5
    assert first != Dialogues(seed=4, relative_dates=1).tasks(Split.TRAIN, 5)


def test_questions_about_a_past_state_have_the_answer_of_then() -> None:
    environment = Dialogues(sessions=6, facts=2, changes=4, retractions=1, probes=2, ask=Ask.ANY)
    tasks = environment.tasks(Split.TRAIN, 40)
    past = 0
    for task in tasks:
        for probe, note in zip(task.probes, task.metadata["probes"], strict=True):
            now = read(task, len(task.stream))[note["speaker"], note["fact"]]
            past += probe.answers[0] not in (now, "none") or (probe.answers[0] == "none" and now != "")
    assert past > 10
    assert {probe.after for task in tasks for probe in task.probes} == {1, 2, 3, 4, 5, 6}
    assert {probe.category for task in tasks for probe in task.probes} >= {"recall", "update", "deletion"}


def test_probe_fields_survive_the_run_folder_and_older_records_are_read() -> None:
    task = Dialogues(ask=Ask.ANY).tasks(Split.TRAIN, 1)[0]
    record = episode_record(Episode(task, id="e", group="g"))
    assert episode_from_record(record).task.probes == task.probes
    for probe in record["task"]["probes"]:
        del probe["category"], probe["after"]
    old = episode_from_record(record).task.probes[0]
    assert (old.category, old.after) == ("", None)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"sessions": 0}, "too small"),
        ({"changes": -1}, "too small"),
        ({"speakers": 13}, "13 speakers"),
        ({"facts": 0}, "nothing to ask"),
        ({"facts": 9, "speakers": 1}, "9 facts are too many"),
        ({"relative_dates": 7, "speakers": 1}, "7 dates are too many"),
        ({"retractions": 4}, "4 retractions of 3 facts"),
        ({"probes": 4}, "4 probes about 3 facts"),
        ({"sessions": 1, "turns_per_session": 6}, "need 7 turns of 6"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        Dialogues(**options)


def test_endless_generation_needs_a_count() -> None:
    with pytest.raises(RecipeError, match="train_tasks: 256"):
        Dialogues().tasks(Split.TRAIN)


def test_by_name_from_a_recipe() -> None:
    assert build_environment("dialogues", {"ask": "any", "sessions": 5}) == Dialogues(ask=Ask.ANY, sessions=5)
    with pytest.raises(MemFactoryError, match="did you mean 'sessions'"):
        build_environment("dialogues", {"session": 5})

"""The teacher of the dialogues: with perfect habits its episodes are right, with none they are not."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memfactory.agents import RMMGRPO, BankAgent
from memfactory.agents.running import run_episodes
from memfactory.environments import Split, build_environment
from memfactory.environments.dialogue_teacher import DialogueTeacher, Habits, lines_of
from memfactory.environments.dialogues import Ask, Dialogues, Needs
from memfactory.episode import Episode, Task
from memfactory.errors import RecipeError
from memfactory.policy.tiny import tiny_tokenizer
from memfactory.reward.catalogue import WeightedDimension, load_dimension
from memfactory.reward.system import RewardSystem
from memfactory.train.rows import build_rows
from memfactory.train.warmup import _TeacherPolicy, teacher_rows

PERFECT = Habits(update=1.0, delete=1.0, ignore=1.0, pick=1.0, rank=1.0)
NO_HABITS = Habits(update=0.0, delete=0.0, ignore=0.0, pick=0.0, rank=0.0)
WORLD = Dialogues(
    sessions=4,
    turns_per_session=3,
    facts=4,
    changes=2,
    retractions=1,
    distractors=2,
    speakers=2,
    probes=4,
    habits=PERFECT,
)


def agent(extract: str, update: str, answer: str, rerank: dict[str, Any] | None = None, k: int = 40) -> BankAgent:
    """One that is shown all there is, so that only decisions count."""
    return BankAgent(
        extract={"kind": extract},
        update={"kind": update},
        retrieve={"kind": "search", "k": k, "related": 40},
        rerank=rerank,
        answer={"kind": answer},
    )


AGENTS = {
    "words": agent("lines", "words", "words"),
    "json": agent("facts", "crud", "distill"),
    "events": agent("facts", "events", "cite"),
    "one by one": BankAgent(
        extract={"kind": "facts", "per_speaker": True},
        update={"kind": "crud", "per_fact": True},
        retrieve={"kind": "search", "k": 40, "related": 40, "per_speaker": True},
    ),
    "reranked": agent("lines", "words", "direct", {"kind": "model", "m": 1}),
}


def taught(agent: Any, world: Dialogues, tasks: Sequence[Task]) -> list[Episode]:
    """The episodes of the world's teacher, scored."""
    tokenizer = tiny_tokenizer(world.vocabulary())
    episodes = []
    for number, task in enumerate(tasks):
        episodes += run_episodes(agent, [task], _TeacherPolicy(tokenizer, world.teacher(task, number)))
    RewardSystem([WeightedDimension("em", load_dimension("answer.exact_match"))]).score(episodes)
    return episodes


def shares(episodes: Sequence[Episode]) -> dict[str, float]:
    """How many of the questions of each kind were answered right."""
    right: dict[str, list[bool]] = defaultdict(list)
    for episode in episodes:
        for answer in episode.answers:
            right[answer.probe.category].append(answer.text in answer.probe.answers)
    return {kind: sum(found) / len(found) for kind, found in right.items()}


@pytest.mark.parametrize("ask", list(Ask))
@pytest.mark.parametrize("name", list(AGENTS))
def test_with_perfect_habits_every_answer_is_right_and_with_none_few_are(name: str, ask: Ask) -> None:
    perfect = replace(WORLD, ask=ask)
    tasks = perfect.tasks(Split.TRAIN, 40)
    episodes = taught(AGENTS[name], perfect, tasks)
    assert shares(episodes) == {Needs.RECALL: 1.0, Needs.UPDATE: 1.0, Needs.DELETION: 1.0}
    assert all(episode.reward == 1.0 for episode in episodes)
    assert not any(turn.error for episode in episodes for turn in episode.turns)
    assert not any(operation.error for episode in episodes for turn in episode.turns for operation in turn.operations)
    poor = replace(perfect, habits=NO_HABITS)
    found = taught(AGENTS[name], poor, tasks)
    assert sum(episode.reward or 0 for episode in found) / len(found) < 0.35


@pytest.mark.parametrize("name", ["json", "events"])
def test_dates_are_answered_where_the_entries_show_when_they_were_said(name: str) -> None:
    """The plain words of `words` do not: there a date told relative to a day cannot be known, only shown."""
    world = replace(WORLD, facts=1, relative_dates=3, changes=2, retractions=0)
    episodes = taught(AGENTS[name], world, world.tasks(Split.TEST, 40))
    found = shares(episodes)
    assert found[Needs.DATE] == 1.0
    for episode in episodes:
        times = {session["time"] for session in episode.task.metadata["sessions"]}
        for answer in episode.answers:
            turn = episode.turns[answer.turn or 0]
            if answer.probe.category == Needs.DATE:
                assert turn.cited
                (line,) = re.findall(rf"^{turn.cited[0]} \((\S+)\): ", turn.messages[0]["content"], re.MULTILINE)
                assert line in times


def test_a_perfect_manager_leaves_one_entry_for_each_fact_that_holds() -> None:
    for task, episode in zip(tasks := WORLD.tasks(Split.TEST, 30), taught(AGENTS["words"], WORLD, tasks), strict=True):
        held = by_replay(task, len(task.stream))
        assert sorted(line.split(": ", 1)[1] for line in episode.memory.splitlines()) == sorted(held.values())


def by_replay(task: Task, sessions: int) -> dict[tuple[str, str], str]:
    """The newest line about each fact that holds, from the events one by one."""
    held: dict[tuple[str, str], str] = {}
    for event in task.metadata["events"]:
        slot = (event["speaker"], event["fact"])
        if event["session"] >= sessions or event["operation"] == "NONE":
            continue
        if event["operation"] == "DELETE":
            del held[slot]
        else:
            held[slot] = task.metadata["lines"][event["session"]][event["turn"]]
    return held


# ---- each habit by itself --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("habit", "suffers", "stays"),
    [
        ("update", Needs.UPDATE, Needs.RECALL),
        ("delete", Needs.DELETION, Needs.UPDATE),
        ("pick", Needs.RECALL, None),
        ("ignore", None, Needs.RECALL),
    ],
)
def test_a_habit_that_is_missing_costs_what_it_is_for(habit: str, suffers: Needs | None, stays: Needs | None) -> None:
    world = replace(WORLD, habits=replace(PERFECT, **{habit: 0.0}))
    episodes = taught(AGENTS["words"], world, world.tasks(Split.TRAIN, 60))
    found = shares(episodes)
    if suffers is not None:
        assert found[suffers] < 0.6
    if stays is not None:
        assert found[stays] == 1.0
    verbs = {operation.verb for episode in episodes for turn in episode.turns for operation in turn.operations}
    missing = {"update": "UPDATE", "delete": "DELETE", "ignore": "NONE"}.get(habit)
    assert verbs == {"ADD", "UPDATE", "DELETE", "NONE"} - {missing}


def test_without_the_habit_of_ranking_what_is_needed_is_often_left_out() -> None:
    world = replace(WORLD, habits=replace(PERFECT, rank=0.0))
    found = taught(AGENTS["reranked"], world, world.tasks(Split.TRAIN, 40))
    assert 0.1 < sum(episode.reward or 0 for episode in found) / len(found) < 0.8


def test_habits_that_nobody_names_are_perfect() -> None:
    assert Habits() == PERFECT
    built = build_environment("dialogues", {})
    assert isinstance(built, Dialogues)
    assert built.habits == PERFECT


def test_habits_are_shares() -> None:
    world = replace(WORLD, habits=replace(PERFECT, update=0.3))
    verbs = [
        operation.verb
        for episode in taught(AGENTS["words"], world, world.tasks(Split.TRAIN, 200))
        for turn in episode.turns
        for operation in turn.operations
        if _says_a_change(turn.messages[0]["content"])
    ]
    assert len(verbs) > 200
    assert verbs.count("UPDATE") / len(verbs) == pytest.approx(0.3, abs=0.08)


def _says_a_change(prompt: str) -> bool:
    said = prompt.split("fact : ")[1]
    return " is now " in said and " of my " not in said


def test_the_teacher_of_a_seed_decides_alike_and_another_otherwise() -> None:
    world = replace(WORLD, habits=replace(PERFECT, update=0.5, ignore=0.5, pick=0.5))
    tasks = world.tasks(Split.TRAIN, 10)
    tokenizer = tiny_tokenizer(world.vocabulary())

    def rows(seed: int) -> list[list[int]]:
        return [row.completion_ids for row in teacher_rows(AGENTS["words"], world, tasks, tokenizer, 80, seed)]

    assert rows(1) == rows(1) != rows(2)
    assert len(rows(1)) == 80


def test_the_rows_of_the_teacher_are_its_texts_in_the_words_of_the_model() -> None:
    tokenizer = tiny_tokenizer(WORLD.vocabulary())
    (task,) = WORLD.tasks(Split.TRAIN, 1)
    (episode,) = run_episodes(AGENTS["words"], [task], _TeacherPolicy(tokenizer, WORLD.teacher(task, 0)))
    for row, turn in zip(build_rows([episode]), episode.turns, strict=True):
        assert tokenizer.unk_token_id not in row.prompt_ids + row.completion_ids
        assert tokenizer.decode(row.completion_ids, skip_special_tokens=True) == turn.text
        assert row.completion_ids[-1] == tokenizer.eos_token_id
    assert {turn.text.split()[0] for turn in episode.turns if turn.module == "update"} >= {"ADD", "UPDATE", "NONE"}


def test_topics_are_taught_too() -> None:
    """RMM's extraction has the numbers of lines for sources; the teacher's sources are the lines."""
    rmm = RMMGRPO(retrieve={"k": 40, "related": 40, "search": {"name": "bm25"}}, rerank={"m": 3})
    world = replace(WORLD, retractions=0)  # its two actions know no deletion
    episodes = taught(rmm, world, world.tasks(Split.TRAIN, 20))
    assert shares(episodes) == {Needs.RECALL: 1.0, Needs.UPDATE: 1.0}


def test_what_it_cannot_show_is_refused() -> None:
    (task,) = WORLD.tasks(Split.TRAIN, 1)
    with pytest.raises(RecipeError, match="cannot show module 'write'"):
        DialogueTeacher(task, PERFECT, random.Random(0))("write", None)


# ---- what is given ---------------------------------------------------------------------------------

worlds = st.builds(
    lambda seed, sessions, back, facts, changes, retractions, distractors, speakers: Dialogues(
        seed=seed,
        sessions=sessions,
        turns_per_session=-(-(facts + changes + retractions + distractors) // sessions) + 1,
        facts=facts,
        changes=changes,
        retractions=min(retractions, facts),
        distractors=distractors,
        speakers=speakers,
        probes=facts,
        given=max(sessions - back, 0),
    ),
    *(st.integers(0, 10**6), st.integers(2, 6), st.integers(1, 5), st.integers(1, 5), st.integers(0, 5)),
    *(st.integers(0, 3), st.integers(0, 4), st.integers(1, 3)),
)


def value_in(line: str) -> str:
    match = re.search(r"my \w+ is (?:now )?(\w+) \.$", line)
    return match[1] if match else ""


@given(worlds, st.sampled_from(Split))
@settings(max_examples=60)
def test_what_is_given_is_what_a_perfect_manager_had_and_gold_is_what_holds_at_the_end(
    world: Dialogues, split: Split
) -> None:
    for task in world.tasks(split, 2):
        assert len(task.stream) == len(task.metadata["sessions"]) == world.sessions - world.given
        known = by_replay(task, world.given)
        memory = task.metadata["memory"]
        assert {tuple(entry["tags"]): 0 for entry in memory}.keys() == {(who,): 0 for who, _ in known}.keys()
        assert sorted(entry["text"] for entry in memory) == sorted(known.values())
        times = [entry["time"] for entry in memory]
        assert all(time < task.metadata["sessions"][0]["time"] for time in times)
        held = by_replay(task, world.sessions)
        for probe, note in zip(task.probes, task.metadata["probes"], strict=True):
            line = held.get((note["speaker"], note["fact"]))
            assert probe.answers == ((value_in(line),) if line else ("none", "nothing", f"no {note['fact']}"))
            for evidence in probe.evidence:
                if evidence.chunk >= 0:
                    assert evidence.text in task.stream[evidence.chunk]
                elif line:
                    assert any(evidence.text in entry["text"] for entry in memory)


@given(st.integers(0, 10**6))
@settings(max_examples=15)
def test_beginning_with_a_filled_bank_the_teacher_is_right_too(seed: int) -> None:
    world = replace(WORLD, seed=seed, given=3)
    episodes = taught(AGENTS["words"], world, world.tasks(Split.TRAIN, 4))
    assert all(episode.reward == 1.0 for episode in episodes)
    for episode in episodes:
        known = by_replay(episode.task, 3)
        first = episode.turns[0]
        assert len(first.memory_before.splitlines()) == len(known)
        assert all(entry.turn is None for entry in first.retrieved)


def test_questions_are_about_what_is_read_where_they_can_be() -> None:
    world = replace(WORLD, given=3, probes=1)
    for task in world.tasks(Split.TRAIN, 60):
        note = task.metadata["probes"][0]
        fresh = {
            (event["speaker"], event["fact"])
            for event in task.metadata["events"]
            if event["session"] == 3 and event["operation"] != "NONE"
        }
        assert not fresh or (note["speaker"], note["fact"]) in fresh


def test_lines_say_what_the_events_say() -> None:
    for task in WORLD.tasks(Split.TRAIN, 20):
        for text, line in lines_of(task).items():
            assert (line.slot is None) == (" of my " in text)
            assert line.value == value_in(text) or line.slot is None
            assert line.retracted == (" any more" in text)

"""Local re-rolls: groups that begin in one and the same state, from snapshots that stay as they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memfactory.agents import BankAgent
from memfactory.agents.rerolls import chunk_task, places, reroll
from memfactory.agents.running import run_episodes
from memfactory.environments.base import Split
from memfactory.environments.dialogues import Dialogues
from memfactory.episode import Episode, Evidence, Message, Probe, StopReason, Task, Turn
from memfactory.memory.bank import EntryBank
from memfactory.recipe import CreditSection
from memfactory.reward.catalogue import WeightedDimension, load_dimension
from memfactory.reward.system import RewardSystem
from tests.forked import Server

AGENT = BankAgent(
    extract={"kind": "lines"}, update={"kind": "words"}, retrieve={"kind": "search", "k": 1}, answer={"kind": "words"}
)
TASK = Task(
    "t",
    ("ann : my pet is dog .", "ann : my pet is now cat .", "ann : my drink is tea ."),
    (
        Probe("what is the pet of ann ?", ("cat",), (Evidence("cat", 1),)),
        Probe("what is the drink of ann ?", ("tea",), (Evidence("tea", 2),)),
        Probe("what is the name of ann ?", ("ann",)),
    ),
)


class Manager:
    """Adds, or updates the first related entry, by turns where asked to; answers with the last word it is shown."""

    greedy = False

    def __init__(self, *verbs: str) -> None:
        self.verbs, self.asked = verbs, 0
        self.prompts: list[str] = []

    async def generate(self, messages: list[Message], *, module: str, max_tokens: int) -> Turn:
        prompt = messages[0]["content"]
        if module == "answer":
            entries = prompt.split(" question : ")[0].split()
            text = entries[-2] if len(entries) > 2 else "none"
        else:
            self.prompts.append(prompt)
            verb = self.verbs[self.asked % len(self.verbs)]
            self.asked += 1
            text = "ADD" if verb == "ADD" or prompt.startswith("none") else f"UPDATE {prompt.split()[0]}"
        return Turn(module, [len(prompt)], [1], [-0.5], text, StopReason.STOP, messages)

    def split(self, text: str, max_tokens: int) -> list[str]:
        return [text]


def test_a_chunk_with_the_questions_it_answers():
    part = chunk_task(TASK, 1, "t@0.1")
    assert part is not None
    assert part.stream == ("ann : my pet is now cat .",)
    assert [probe.question for probe in part.probes] == ["what is the pet of ann ?"]
    assert part.probes[0].evidence == (Evidence("cat", 0),)
    assert chunk_task(TASK, 0, "x") is None  # nothing that is asked rests on it
    both = Task("b", TASK.stream, (Probe("?", ("x",), (Evidence("dog", 0), Evidence("tea", 2))),))
    assert chunk_task(both, 0, "x") is None  # more is needed than it says
    assert chunk_task(both, 2, "x") is not None


def test_sessions_are_cut_with_the_chunk_and_the_given_memory_is_left_out():
    task = Dialogues(sessions=4, given=2).tasks(Split.TRAIN, 20)[0]
    parts = [(chunk, part) for chunk in (0, 1) if (part := chunk_task(task, chunk, "x")) is not None]
    for chunk, part in parts:
        assert part.metadata["sessions"] == task.metadata["sessions"][chunk : chunk + 1]
        assert "memory" not in part.metadata
    assert task.metadata["memory"]


def base() -> Episode:
    (episode,) = run_episodes(AGENT, [TASK], Manager("ADD"))
    return episode


def test_every_run_begins_in_the_state_before_the_chunk_and_leaves_it_alone():
    episode = base()
    assert places(episode) == [1, 2]
    before = {chunk: list(AGENT.restore(snapshot).entries()) for chunk, snapshot in episode.snapshots.items()}
    policy = Manager("ADD", "UPDATE")
    runs = reroll(AGENT, [episode], policy, 6, seed=0)
    (group,) = {run.group for run in runs}
    chunk = int(group.rpartition(".")[2])
    assert len(set(policy.prompts)) == 1  # all six decisions are made on the same words
    assert {run.turns[0].memory_before for run in runs} == {"\n".join(f"{e.id}: {e.text}" for e in before[chunk])}
    assert {len(run.memory.splitlines()) for run in runs} == {len(before[chunk]), len(before[chunk]) + 1}
    after = {chunk: list(AGENT.restore(snapshot).entries()) for chunk, snapshot in episode.snapshots.items()}
    assert after == before
    assert all(places(run) == [] for run in runs)  # a re-roll is not re-rolled


def test_entries_from_before_belong_to_no_turn_of_the_run():
    run = reroll(AGENT, [base()], Manager("ADD"), 2, seed=0)[0]
    writers = {entry.turn for turn in run.turns for entry in turn.retrieved}
    assert writers <= {None, 0}


def test_a_local_group_is_compared_with_itself_alone():
    """Runs that update answer with the new word, runs that add find the old one: the decision gets the credit."""
    episode = base()
    one = Episode(TASK, episode.turns, episode.answers, snapshots={1: episode.snapshots[1]})
    runs = reroll(AGENT, [one], Manager("ADD", "UPDATE"), 4, seed=0)
    rewards = [WeightedDimension("answer.exact_match", load_dimension("answer.exact_match"))]
    system = RewardSystem(rewards, credit=CreditSection(advantage="centered"))
    everything = [episode, *runs]
    system.begin().finish(everything)
    system.assess(everything)
    updated = ["UPDATE" in run.turns[0].text for run in runs]
    assert sorted(updated) == [False, False, True, True]
    assert [run.turns[0].advantage for run in runs] == [0.5 if good else -0.5 for good in updated]
    assert episode.advantage == 0  # alone in its own group


@pytest.mark.slow
def test_a_training_run_with_rerolls(forked: Server, tmp_path: Path):
    command = [
        *("train", "memory_r1/quickstart", f"output_dir={tmp_path}/run"),
        *("warmup.steps=30", "train.max_steps=2", "train.eval_strategy=no", "environment.test_tasks=8"),
        *("train.per_device_train_batch_size=16", "rollout.rerolls={share: 0.5, count: 4}", "credit.attribute=shown"),
        *("rollout.log_episodes=1000", "environment.train_tasks=32"),
    ]
    forked.run(command)
    lines = [json.loads(line) for line in (tmp_path / "run/episodes.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["split"] == "train"]
    local = [line for line in trained if "reroll" in line["task"]["metadata"]]
    groups = {line["group"] for line in local}
    assert len(local) == 2 * 8 * 4
    assert len(groups) == 16
    for name in groups:
        own = [line for line in local if line["group"] == name]
        assert len(own) == 4
        assert len({line["turns"][0]["memory_before"] for line in own}) == 1
    assert len(trained) == len(local) + 2 * 16


def test_the_bank_of_a_snapshot_is_its_own():
    bank = EntryBank("ann")
    snapshot = bank.snapshot()
    restored = AGENT.restore(snapshot)
    assert restored is not bank
    assert restored.owner == "ann"

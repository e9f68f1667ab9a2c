"""The agent over a bank: an episode by hand, who wrote what, what is asked when, and whose memory is whose."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memfactory.agents import BankAgent, MemoryR1, build_agent
from memfactory.environments import Split
from memfactory.episode import Episode, Evidence, Message, Operation, Probe, StopReason, Task, Turn
from memfactory.errors import DataError, RecipeErrors
from memfactory.memory.bank import EntryBank
from memfactory.memory.entries import Bank, Entry
from memfactory.memory.operations import Refusal
from memfactory.memory.sqlite import SqliteStore
from memfactory.reward.catalogue import WeightedDimension, load_dimension
from memfactory.reward.system import RewardSystem
from memfactory.train.prepare import prepare
from memfactory.train.rows import build_rows

RECIPES = sorted((Path(__file__).parents[2] / "recipes" / "memory_r1").glob("*quickstart.yaml"))


class Scripted:
    """A policy that says what `reply` returns for (module, prompt); it takes a while, so that others can ask too."""

    greedy = True

    def __init__(self, reply: Callable[[str, str], str]) -> None:
        self.reply = reply
        self.calls: list[tuple[str, str, int]] = []
        self.waiting: list[str] = []
        self.together: list[tuple[str, ...]] = []
        """Modules of the calls that waited when one was answered."""

    async def generate(self, messages: list[Message], *, module: str, max_tokens: int) -> Turn:
        (message,) = messages
        self.calls.append((module, message["content"], max_tokens))
        self.waiting.append(module)
        for _ in range(5):
            await asyncio.sleep(0)
        self.together.append(tuple(self.waiting))
        self.waiting.remove(module)
        text = self.reply(module, message["content"])
        ids = [ord(c) for c in text[:50]] or [2]
        return Turn(
            module, [ord(c) for c in message["content"]], ids, [-1.0] * len(ids), text, StopReason.STOP, messages
        )

    def split(self, text: str, max_tokens: int) -> list[str]:
        return [text]


def run(agent: Any, task: Task, policy: Scripted, store: Bank | None = None) -> Episode:
    return asyncio.run(agent.run(task, policy, store))


def say(**texts: Any) -> str:
    return json.dumps([texts])


def between(prompt: str, tag: str) -> str:
    return prompt.split(f"<{tag}>\n")[1].split(f"</{tag}>")[0]


def session(time: str, *speakers: str, when: str = "") -> dict[str, Any]:
    return {"id": "s", "when": when or time, "time": time, "speakers": list(speakers)}


# ---- one episode, walked through by hand ----------------------------------------------------------

TASK = Task(
    "t",
    ("Anna: I live in Rome. I have a dog.", "Anna: I moved to Oslo."),
    (
        Probe("Where does Anna live in the end?", ("Oslo",), (Evidence("Oslo", 1),)),
        Probe("Where does Anna live now?", ("Rome",), after=1),
        Probe("What animal is of Anna?", ("a dog",)),
    ),
    {
        "sessions": [
            session("2024-05-07", "Anna", when="7 May 2024"),
            session("2024-06-01", "Anna", when="1 June 2024"),
        ]
    },
)
EXTRACTED = {
    "Rome": [
        {"text": "Anna lives in Rome", "key": "anna.city", "speaker": "Anna"},
        {"text": "Anna has an animal: a dog", "time": "2020", "speaker": "Anna"},
    ],
    "Oslo": [{"text": "Anna moved to Oslo", "speaker": "Anna"}],
}
UPDATES = {
    "Rome": [
        {"op": "ADD", "text": "Anna lives in Rome"},
        {"op": "UPDATE", "id": "e9", "text": "x"},
        {"op": "ADD", "text": "Anna has an animal: a dog"},
    ],
    "Oslo": [{"op": "UPDATE", "id": "e1", "text": "Anna lives in Oslo"}],
}
BY_HAND = {
    "extract": {"kind": "facts"},
    "update": {"kind": "crud"},
    "retrieve": {"kind": "search", "k": 2, "related": 1, "search": {"stopwords": "english"}},
    "rerank": {"kind": "model", "m": 1},
    "answer": {"kind": "cite"},
}


def by_hand(module: str, prompt: str) -> str:
    if module == "extract":
        return json.dumps(EXTRACTED["Oslo" if "Oslo" in prompt else "Rome"])
    if module == "update":
        return json.dumps(UPDATES["Oslo" if "Oslo" in prompt else "Rome"])
    shown = dict(re.findall(r"(e\d+)(?: \([^)]*\))?: (.*)", between(prompt, "entries")))
    if module == "rerank":
        return " ".join(shown)
    (id, text), *_ = shown.items()
    return f"{text.split(' in ')[-1].split(': ')[-1]} [{id}]"


def test_an_episode_by_hand() -> None:
    policy = Scripted(by_hand)
    agent = BankAgent(**BY_HAND, max_extract_tokens=1, max_update_tokens=2, max_rerank_tokens=3, max_answer_tokens=4)
    episode = run(agent, TASK, policy)

    made = [(turn.module, turn.chunk) for turn in episode.turns]
    assert made == [
        ("extract", 0),
        ("update", 0),
        ("rerank", None),
        ("answer", None),
        ("extract", 1),
        ("update", 1),
        ("rerank", None),
        ("answer", None),
        ("rerank", None),
        ("answer", None),
    ]
    assert {(module, limit) for module, _, limit in policy.calls} == {
        ("extract", 1),
        ("update", 2),
        ("rerank", 3),
        ("answer", 4),
    }
    rome, dog, oslo = "e1: Anna lives in Rome", "e2: Anna has an animal: a dog", "e1: Anna lives in Oslo"
    first, then = f"{rome}\n{dog}", f"{oslo}\n{dog}"
    states = [(turn.memory_before, turn.memory_after) for turn in episode.turns]
    assert states == [("", ""), ("", first), *[(first, first)] * 3, (first, then), *[(then, then)] * 4]
    assert episode.memory == then

    asked, updated = episode.turns[1].operations, episode.turns[5].operations
    assert [(o.verb, o.target, o.error) for o in asked] == [
        ("ADD", "e1", ""),
        ("UPDATE", "e9", Refusal.UNKNOWN_ID),
        ("ADD", "e2", ""),
    ]
    # what an operation leaves out is that of the fact whose words it repeats
    assert [(o.key, o.time, o.tags) for o in (asked[0], asked[2])] == [
        ("anna.city", "2024-05-07", ("Anna",)),
        ("", "2020", ("Anna",)),
    ]
    assert [(o.target, o.time) for o in updated] == [("e1", "2024-06-01")]

    # who wrote what: e1 belongs to the turn of its newest text
    assert episode.turns[1].retrieved == []
    assert [(r.id, r.text, r.turn) for r in episode.turns[5].retrieved] == [("e1", "Anna lives in Rome", 1)]
    assert [[(r.id, r.turn) for r in episode.turns[n].retrieved] for n in (2, 6, 8)] == [
        [("e1", 1)],
        [("e1", 5)],
        [("e2", 1)],
    ]
    assert [(a.text, a.turn, a.probe) for a in episode.answers] == [
        ("Oslo", 7, TASK.probes[0]),
        ("Rome", 3, TASK.probes[1]),
        ("a dog", 9, TASK.probes[2]),
    ]
    assert [episode.turns[n].cited for n in (3, 7, 9)] == [["e1"], ["e1"], ["e2"]]
    assert all(answer.raw == episode.turns[answer.turn or 0].text for answer in episode.answers)
    assert not any(turn.error for turn in episode.turns)

    keys = [turn.prefix_key for turn in episode.turns]
    assert keys[:2] == ["t/extract/0", "t/update/0/0"]
    assert keys[2:4] == ["t/rerank/1", "t/answer/1"]
    assert len(build_rows([episode])) == 10
    assert "held on 7 May 2024" in policy.calls[0][1]
    score(episode)
    assert episode.reward == 1.0


def score(*episodes: Episode, name: str = "answer.exact_match") -> None:
    RewardSystem([WeightedDimension(name, load_dimension(name))]).score(list(episodes))


def test_what_can_be_asked_at_once_is_asked_at_once() -> None:
    policy = Scripted(by_hand)
    run(BankAgent(**BY_HAND), TASK, policy)
    assert ("extract", "extract") in policy.together, "extraction does not look at the bank"
    assert ("rerank", "rerank") in policy.together, "questions that are due together"
    assert not any(calls.count("update") > 1 for calls in policy.together), "updates see what the one before left"


def test_questions_see_the_bank_as_it_is_when_they_are_due() -> None:
    """Every question after every chunk, also before the first and behind the last."""
    chunks = 4
    probes = tuple(Probe(f"question {after}", ("x",), after=after) for after in (3, 0, None, 1, 2, 9, 4, -1))
    task = Task("t", tuple(f"leo: chunk number {n}" for n in range(chunks)), probes)
    agent = BankAgent(extract={"kind": "lines"}, update={"kind": "add"}, answer={"kind": "direct"})
    episode = run(agent, task, Scripted(lambda module, prompt: "y"))
    held = {3: 3, 0: 0, None: 4, 1: 1, 2: 2, 9: 4, 4: 4, -1: 0}
    assert [answer.probe for answer in episode.answers] == list(probes), "in the order of the task"
    for answer in episode.answers:
        lines = [f"e{n + 1}: leo: chunk number {n}" for n in range(held[answer.probe.after])]
        assert episode.turns[answer.turn or 0].memory_before == "\n".join(lines)
    ends = [answer.turn for answer in sorted(episode.answers, key=lambda a: held[a.probe.after])]
    assert ends == sorted(ends), "turns stand in the order in which they were asked"
    assert sorted(ends) == list(range(len(probes))), "rules make no turns"


# ---- where a run begins ---------------------------------------------------------------------------

LINES = BankAgent(extract={"kind": "lines"}, update={"kind": "add"}, answer={"kind": "cite"})


def show(module: str, prompt: str) -> str:
    return " | ".join(between(prompt, "entries").splitlines())


def test_a_run_goes_on_from_a_restored_snapshot_and_leaves_other_forks_alone() -> None:
    said = ("anna: i like tea", "anna: i like milk")
    first = Task("t", said, (Probe("what does anna like", ("tea",)),))
    episode = run(LINES, first, Scripted(show))
    assert list(episode.snapshots) == [0, 1]
    more = Task("t", ("anna: i like juice",), (Probe("what does anna like", ("x",)),))
    restored = [LINES.restore(episode.snapshots[1]) for _ in range(2)]
    before = list(restored[1].entries())
    onward = run(LINES, more, Scripted(show), restored[0])
    assert [entry.text for entry in restored[0].entries()] == ["anna: i like tea", "anna: i like juice"]
    assert [(e.id, e.text) for e in before] == [("e1", "anna: i like tea")]
    assert list(restored[1].entries()) == before, "the other fork"
    assert len(LINES.restore(episode.snapshots[1])) == 1, "the snapshot"
    assert onward.memory == "e1: anna: i like tea\ne2: anna: i like juice"
    shown = {entry.id: entry.turn for entry in onward.turns[-1].retrieved}
    assert shown == {"e1": None, "e2": None}


def test_entries_from_before_belong_to_no_turn_until_one_changes_them() -> None:
    bank = EntryBank("t")
    for text in ("anna drinks tea", "anna drinks milk"):
        bank.apply(Operation("ADD", text=text), turn=0)  # turn 0 of another episode
    reply = {
        "extract": '["anna drinks juice"]',
        "update": say(op="UPDATE", id="e2", text="anna drinks juice"),
        "answer": "[e1][e2] juice",
    }
    agent = BankAgent(answer={"kind": "cite"})
    episode = run(agent, Task("t", ("x",), (Probe("anna drinks", ("juice",)),)), Scripted(lambda m, p: reply[m]), bank)
    extract, update, answer = episode.turns
    assert {r.id: r.turn for r in update.retrieved} == {"e1": None, "e2": None}
    assert {r.id: r.turn for r in answer.retrieved} == {"e1": None, "e2": 1}
    assert answer.cited == ["e1", "e2"]
    assert extract.memory_before == "e1: anna drinks tea\ne2: anna drinks milk"


def test_a_task_may_begin_with_entries() -> None:
    memory = [{"text": "anna drinks tea", "key": "anna.drink", "tags": ["anna"], "time": "2024"}, {"text": "second"}]
    task = Task("t", ("anna: hello",), (Probe("drinks", ("tea",)),), {"memory": memory})
    episode = run(LINES, task, Scripted(show))
    assert episode.memory == "e1: anna drinks tea\ne2: second\ne3: anna: hello"
    assert episode.turns[0].retrieved[0].turn is None
    snapshot = LINES.restore(episode.snapshots[0]).entries()
    assert snapshot[0] == Entry("e1", "anna drinks tea", "anna.drink", ("anna",), "2024", "t", None)
    restored = LINES.restore(episode.snapshots[0])
    again = run(LINES, task, Scripted(show), restored)
    assert again.memory == episode.memory, "what is given is there only once"

    only = Task("t", (), task.probes, {"memory": memory})
    assert LINES.chunks(only, Scripted(show)) == []
    assert run(LINES, only, Scripted(show)).answers[0].text == "e1 (2024): anna drinks tea"
    with pytest.raises(DataError, match="nothing to read"):
        LINES.chunks(Task("t", (), task.probes), Scripted(show))


# ---- modules in other places ----------------------------------------------------------------------


def test_extraction_for_each_speaker_makes_tagged_entries_in_updates_of_their_own() -> None:
    def reply(module: str, prompt: str) -> str:
        if module == "extract":
            who = "anna" if "about anna" in prompt else "leo"
            return say(summary=f"{who} sings") if "hello" in prompt else "NO_TRAIT"
        return "Add()" if module == "update" else "x"

    task = Task(
        "t",
        ("anna: hello\nleo: hello", "anna: bye"),
        (),
        {"sessions": [session("2024-05-07", "anna", "leo"), session("2024-05-08", "anna")]},
    )
    bank = EntryBank("t")
    agent = BankAgent(extract={"kind": "topics"}, update={"kind": "merge"})
    episode = run(agent, task, Scripted(reply), bank)
    assert [(turn.module, turn.chunk) for turn in episode.turns] == [
        ("extract", 0),
        ("extract", 0),
        ("update", 0),
        ("update", 0),
        ("extract", 1),
    ]
    assert [(e.text, e.tags, e.time, e.turn) for e in bank.entries()] == [
        ("anna sings", ("anna",), "2024-05-07", 2),
        ("leo sings", ("leo",), "2024-05-07", 3),
    ]
    assert [turn.prefix_key for turn in episode.turns[2:4]] == ["t/update/0/0", "t/update/0/1"]


@pytest.mark.parametrize(
    ("update", "facts_of_turns"),
    [
        ({"kind": "crud"}, [["a", "c"], ["b"]]),
        ({"kind": "events"}, [["a", "c"], ["b"]]),
        ({"kind": "crud", "per_fact": True}, [["a"], ["b"], ["c"]]),
        ({"kind": "words"}, [["a"], ["b"], ["c"]]),
        ({"kind": "merge"}, [["a"], ["b"], ["c"]]),
        ({"kind": "add"}, []),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_update_for_each_fact_or_for_all_of_a_speaker(update: dict[str, Any], facts_of_turns: Any) -> None:
    facts = [{"text": t, "speaker": who} for t, who in (("a", "anna"), ("b", "leo"), ("c", "anna"))]

    def reply(module: str, prompt: str) -> str:
        if module == "extract":
            return json.dumps(facts)
        if update["kind"] == "words":
            return "ADD"
        if update["kind"] == "merge":
            return "Add()"
        seen = re.findall("^- (.*)$", prompt, re.MULTILINE)
        return json.dumps([{"op": "ADD", "text": text} for text in seen])

    policy, bank = Scripted(reply), EntryBank("t")
    run(BankAgent(update=update), Task("t", ("x",), ()), policy, bank)
    prompts = [prompt for module, prompt, _ in policy.calls if module == "update"]
    shown = [re.findall(r"^- (.*)$|fact : (.*) write", prompt, re.MULTILINE) for prompt in prompts]
    assert [["".join(pair) for pair in one] for one in shown] == facts_of_turns
    assert {(entry.text, entry.tags) for entry in bank.entries()} == {
        ("a", ("anna",)),
        ("b", ("leo",)),
        ("c", ("anna",)),
    }


def test_several_facts_lend_an_operation_only_what_they_share() -> None:
    facts = [{"text": "wedding", "time": "2024-05-07", "key": "k"}, {"text": "dog", "time": "2020", "key": "k"}]
    reply = {"extract": json.dumps(facts), "update": '[{"op": "ADD", "text": "in other words"}]'}
    bank = EntryBank("t")
    run(BankAgent(), Task("t", ("x",), ()), Scripted(lambda m, p: reply[m]), bank)
    (entry,) = bank.entries()
    assert (entry.key, entry.time, entry.tags) == ("k", "", ()), "not the date of a fact it may not speak about"


def test_all_lines_are_added_without_a_model() -> None:
    task = Task("t", ("anna: tea\nleo: tea", "anna: tea"), (), {"sessions": [session("2024-05-07", "anna", "leo")]})
    policy, bank = Scripted(show), EntryBank("t")
    episode = run(BankAgent(extract={"kind": "lines"}, update={"kind": "add"}), task, policy, bank)
    assert (episode.turns, policy.calls) == ([], [])
    assert [(e.text, e.tags, e.time, e.turn) for e in bank.entries()] == [
        ("anna: tea", ("anna",), "2024-05-07", None),
        ("leo: tea", ("leo",), "2024-05-07", None),
        ("anna: tea", ("anna",), "", None),
    ]


def test_memory_r1_shares_what_it_shows_among_the_speakers() -> None:
    """Also where the extraction names no speaker: then entries are nobody's, and are found all the same."""
    for named in (True, False):

        def reply(module: str, prompt: str, named: bool = named) -> str:
            if module == "extract":
                said = re.findall(r"(anna|leo): (.*)", prompt)
                return json.dumps(
                    [{"text": f"{who} {what}"} | ({"speaker": who} if named else {}) for who, what in said]
                )
            if module == "update":
                facts = re.findall("^- (.*)$", prompt, re.MULTILINE)
                return json.dumps({"memory": [{"id": "0", "text": fact, "event": "ADD"} for fact in facts]})
            return "Useful: e1\nAnswer: tea"

        chunk = "\n".join([*(f"anna: tea number {n}" for n in range(6)), "leo: tea with a lot of milk and sugar"])
        task = Task("t", (chunk,), (Probe("who drinks tea", ("x",)),), {"sessions": [session("", "anna", "leo")]})
        episode = run(MemoryR1(retrieve={"k": 4}), task, Scripted(reply))
        shown = [entry.text.split()[0] for entry in episode.turns[-1].retrieved]
        assert sorted(shown) == (["anna", "anna", "leo"] if named else ["anna"] * 4)
        assert episode.turns[-1].cited == ["e1"]


def test_a_reranker_that_names_nothing_it_was_shown_leaves_the_first() -> None:
    task = Task("t", ("anna: tea one\nanna: tea two\nanna: tea three",), (Probe("tea", ("x",)),))
    for said, shown, error in (
        ("e3, e1", ["e3", "e1"], ""),
        ("e9 e3", ["e3"], ""),
        ("e9", ["e1", "e2"], "it named no entry that it was shown"),
        ("none", ["e1", "e2"], "the reply names no entry"),
    ):
        agent = BankAgent(
            extract={"kind": "lines"},
            update={"kind": "add"},
            rerank={"kind": "model", "m": 2},
            answer={"kind": "direct"},
        )
        episode = run(agent, task, Scripted(lambda module, prompt, said=said: said))
        rerank, answer = episode.turns
        assert [r.id for r in rerank.retrieved] == [r.id for r in answer.retrieved] == shown
        assert rerank.error.startswith(error)
        assert bool(rerank.error) == bool(error)


@pytest.mark.parametrize("control", ["empty", "random"])
def test_with_a_control_the_answer_does_not_see_what_was_found(control: str) -> None:
    said = tuple(f"anna: filler {n} words" for n in range(30))
    task = Task("t", (*said, "leo: the pet of leo is goat"), (Probe("what is the pet of leo", ("goat",)),))

    def answer(module: str, prompt: str) -> str:
        return "goat" if "goat" in between(prompt, "entries") else "nothing"

    options = {"extract": {"kind": "lines"}, "update": {"kind": "add"}, "answer": {"kind": "direct"}}
    honest = run(BankAgent(**options, retrieve={"kind": "search", "k": 2}), task, Scripted(answer))
    control_of = BankAgent(**options, retrieve={"kind": "search", "k": 2, "control": control})
    runs = [run(control_of, task, Scripted(answer)) for _ in range(2)]
    score(honest, *runs)
    assert [honest.reward, *(episode.reward for episode in runs)] == [1.0, 0.0, 0.0]
    assert runs[0].turns[0].retrieved == runs[1].turns[0].retrieved, "a run can be repeated"
    assert len(runs[0].turns[0].retrieved) == (2 if control == "random" else 0)


# ---- whose memory it is ---------------------------------------------------------------------------


@pytest.fixture(params=["memory", "sqlite"])
def open_bank(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str], Bank]]:
    if request.param == "memory":
        banks: dict[str, EntryBank] = {}
        yield lambda owner: banks.setdefault(owner, EntryBank(owner))
    else:
        with SqliteStore(tmp_path / "bank.db") as store:
            yield store.bank


def test_two_users_with_the_same_question_see_only_their_own(open_bank: Callable[[str], Bank]) -> None:
    users = {"user-1": "tea", "user-2": "coffee", "user-1'; --": "milk"}
    prompts: dict[str, list[str]] = {}

    async def everybody() -> list[Episode]:
        async def one(user: str, drink: str) -> Episode:
            policy = Scripted(lambda module, prompt: by_words(module, prompt))
            task = Task(
                "same", (f"me: i drink {drink}", f"me: i drink much {drink}"), (Probe("what do i drink", (drink,)),)
            )
            agent = BankAgent(extract={"kind": "lines"}, update={"kind": "words"}, answer={"kind": "words"})
            episode = await agent.run(task, policy, open_bank(user))
            prompts[user] = [prompt for _, prompt, _ in policy.calls]
            return episode

        return await asyncio.gather(*(one(user, drink) for user, drink in users.items()))

    def by_words(module: str, prompt: str) -> str:
        if module == "update":
            return "UPDATE e1" if "e1" in prompt else "ADD"
        return f"e1 {prompt.split('drink much ')[1].split()[0]}"

    episodes = asyncio.run(everybody())
    score(*episodes)
    for episode, (user, drink) in zip(episodes, users.items(), strict=True):
        assert episode.reward == 1.0
        assert episode.memory == f"e1: me: i drink much {drink}"
        assert [entry.owner for entry in open_bank(user).entries()] == [user]
        others = [other for other in users.values() if other != drink]
        assert not any(other in prompt for other in others for prompt in prompts[user])


def random_reply(rng: random.Random) -> Callable[[str, str], str]:
    """Sensible replies drawn at random, right ones and wrong ones; the same seed says the same."""

    def reply(module: str, prompt: str) -> str:
        ids = [*re.findall(r"\be\d+\b", prompt), "e1", "e9", "x"]
        words = [rng.choice("anna leo tea milk rome oslo".split()) for _ in range(3)]
        if module == "extract":
            return json.dumps([{"text": " ".join(words[:n]), "key": words[0]} for n in range(rng.randint(0, 3))])
        if module == "update":
            verbs = ["ADD", "UPDATE", "DELETE", "NONE", "WHAT"]
            asked = [
                {
                    "op": rng.choice(verbs),
                    "id": rng.choice(ids),
                    "text": " ".join(rng.sample(words, rng.randint(0, 3))),
                }
                for _ in range(rng.randint(0, 4))
            ]
            return json.dumps(asked) if rng.random() < 0.9 else "no JSON"
        if module == "rerank":
            return " ".join(rng.sample(ids, min(2, len(ids))))
        return f"{words[0]} [{rng.choice(ids)}]"

    return reply


@given(st.integers(0, 10**9))
@settings(max_examples=40)
def test_the_episode_is_the_same_on_every_bank(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    probes = tuple(Probe(f"anna tea {n}", ("x",), after=n % 4) for n in range(4))
    task = Task("t", tuple(f"anna: chunk {n}" for n in range(4)), probes)
    agent = BankAgent(
        retrieve={"kind": "search", "k": 3, "related": 2}, rerank={"kind": "model", "m": 2}, answer={"kind": "cite"}
    )
    episodes = []
    with SqliteStore(tmp_path_factory.mktemp("banks") / "bank.db") as store:
        for bank in (EntryBank("t"), store.bank("t")):
            episodes.append(run(agent, task, Scripted(random_reply(random.Random(seed))), bank))
            assert text(bank) == episodes[-1].memory
    first, second = (asdict(episode) | {"snapshots": list(episode.snapshots)} for episode in episodes)
    assert first == second


def text(bank: Bank) -> str:
    return "\n".join(f"{entry.id}: {entry.text}" for entry in bank.entries())


# ---- what it is worth -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_right_answers_out_score_wrong_ones_by_the_rewards_of_the_recipe(path: Path) -> None:
    prepared = prepare(path, splits=())
    for task in prepared.environment.tasks(Split.TEST, 5):
        gold = {probe.question: probe.answers[0] for probe in task.probes}

        def answering(right: bool, gold: dict[str, str] = gold) -> Scripted:
            def reply(module: str, prompt: str) -> str:
                if module == "update":
                    return "ADD"
                asked = next(question for question in gold if question in prompt)
                return f"e1 {gold[asked] if right else 'wrong'}"

            return Scripted(reply)

        right, wrong = (run(prepared.agent, task, answering(truth)) for truth in (True, False))
        garbage = run(prepared.agent, task, Scripted(lambda module, prompt: "{["))
        for episode in (right, wrong, garbage):
            episode.group = task.id
        prepared.rewards.score([right, wrong, garbage])
        assert right.reward is not None
        assert right.reward > (wrong.reward or 0.0)
        assert right.reward > (garbage.reward or 0.0)
        assert right.scores["answer.exact_match"].value == 1.0
        assert wrong.scores["answer.exact_match"].value == garbage.scores["answer.exact_match"].value == 0.0


def test_a_reply_that_cannot_be_used_is_on_its_turn_and_the_run_goes_on() -> None:
    episode = run(BankAgent(), TASK, Scripted(lambda module, prompt: "I would rather not."))
    assert [turn.module for turn in episode.turns] == ["extract", "answer", "extract", "answer", "answer"]
    assert all(turn.error for turn in episode.turns)
    assert [answer.text for answer in episode.answers] == [None] * 3
    assert episode.memory == ""
    score(episode)
    assert episode.reward == 0.0


def test_what_is_remembered_is_recorded_unless_turned_off() -> None:
    for record, expected in ((True, True), (False, False)):
        episode = run(BankAgent(**BY_HAND, record_memory=record), TASK, Scripted(by_hand))
        assert any(turn.memory_after for turn in episode.turns) is expected
        assert "Oslo" in episode.memory
    assert run(BankAgent(**BY_HAND, record_final_memory=False), TASK, Scripted(by_hand)).memory == ""


def test_all_that_is_wrong_with_the_modules_is_said_at_once() -> None:
    with pytest.raises(RecipeErrors) as error:
        build_agent(
            "compose",
            {
                "extract": {"kind": "fcts"},
                "update": {"per_fact": True},
                "retrieve": {"kind": "search", "k": "many", "search": {"name": "bm26"}},
                "answer": {"kind": "distill", "promt": "x"},
            },
        )
    said = str(error.value)
    for word in (
        "agent.extract.kind",
        "facts",
        "agent.update.kind",
        "agent.retrieve.k",
        "agent.answer.promt",
        "prompt",
    ):
        assert word in said

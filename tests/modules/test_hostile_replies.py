"""100,000 replies that went wrong, through every module, a bank and whole episodes: typed errors, and nothing else.

Replies begin as what a good model writes and are then cut, doubled, mixed, nested and filled with what breaks
programs. A bank is held against a plain dict.
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import pytest

from memfactory.agents import BankAgent
from memfactory.episode import Episode, Message, Operation, Probe, StopReason, Task, Turn
from memfactory.errors import ModelOutputError
from memfactory.memory.bank import EntryBank
from memfactory.memory.operations import Refusal
from memfactory.modules import build_module
from memfactory.modules.entry_answer import Reply
from memfactory.modules.facts import Fact
from memfactory.modules.updates import TOO_MANY
from memfactory.reward.catalogue import WeightedDimension, load_dimension
from memfactory.reward.system import RewardSystem

REFUSALS = {"", TOO_MANY, *(refusal.value for refusal in Refusal)}

GOOD = {
    ("extract", "facts"): [
        '[{"text": "Anna lives in Rome", "key": "anna.city", "time": "2024-05-07", "source": "I live in Rome"}]',
        '```json\n{"facts": ["Anna has a dog", "Leo has a goat"]}\n```',
        '[{"text": "Leo lives in Oslo", "speaker": "leo"}, {"fact": "Anna has a dog"}]',
    ],
    ("extract", "topics"): [
        '{"extracted_memories": [{"summary": "Anna runs", "reference": [0, 2]}]}',
        '[{"summary": "Leo lives in Oslo", "reference": [1]}, {"summary": "Anna has a dog"}]',
        "NO_TRAIT",
    ],
    ("update", "crud"): [
        '[{"op": "ADD", "text": "Anna has a dog"}, {"op": "UPDATE", "id": "e1", "text": "Anna lives in Oslo"}]',
        '[{"op": "DELETE", "id": "e2"}, {"op": "NONE"}, {"op": "ADD", "text": "x", "tags": ["a", "b"], "key": "k"}]',
    ],
    ("update", "events"): [
        '{"memory": [{"id": "e1", "text": "Anna", "event": "UPDATE", "old_memory": "x"}, {"id": "e3"}]}',
        '{"memory": [{"id": "0", "text": "Anna lives in Rome", "event": "ADD"}, {"id": "e2", "event": "DELETE"}]}',
    ],
    ("update", "merge"): ["Merge(e1, Anna (a nurse) runs every Monday.)", "Add()", "It is a new topic: Add()"],
    ("update", "words"): ["ADD", "UPDATE e1", "DELETE e2", "NONE", "add"],
    ("rerank", "model"): ["e1, e2, e3", "The best is e2."],
    ("answer", "distill"): ["Useful: e1, e2\nAnswer: Rome", "Useful: none\n**Answer:** nothing"],
    ("answer", "cite"): ["She lives in Rome. [e1, e2]", "<think>e1 says [Rome].</think>I do not know. [NO_CITE]"],
    ("answer", "direct"): ["Rome", "<think>e1</think>\nin Rome"],
    ("answer", "words"): ["e1 rome", "rome e1"],
}
MODULES = {name: build_module(name[0], {"kind": name[1]}) for name in GOOD}
EVERY = [text for texts in GOOD.values() for text in texts]
BREAKING = [
    *("[", "]", "{", "}", "(", ")", '"', "'", ",", ":", "\\", "\n", "\x00", "\ud800", "\udfff", "\u202e", "\ufeff"),
    *(
        "<think>",
        "</think>",
        "null",
        "true",
        "NaN",
        "-Infinity",
        "1e999",
        "9" * 5000,
        "-0",
        "0x1",
        "\\ud83d",
        "\\u0000",
    ),
    *("{{ 7 * 7 }}", "{% for x in y %}", "'; DROP TABLE entries; --", "%s", "${x}", "e0", "e1", "e2", "e" + "9" * 40),
    *("[[[[[[[[", '{"a":' * 40, '"op"', '"text"', '"id"', '"memory"', '"tags"', "Merge(", "Add()", "answer:", "[e1]"),
    *("\U0001f600", "é" * 50, "שלום", "𝓮1", "e١", "ADD ", "UPDATE ", "DELETE ", "NONE ", "\r", "\u2028", " " * 300),
]
SWAPS = ['"x"', "1", "-7", "1.5", "null", "true", "[]", "{}", '["e1"]', '{"id": "e1"}', "1" * 30, '"\\ud800"', '"e2"']


def spoiled(rng: random.Random, name: tuple[str, str]) -> str:
    """A good reply, mostly for the module called `name`, after up to four accidents."""
    text = rng.choice(GOOD[name] if rng.random() < 0.9 else EVERY)
    for _ in range(rng.choice((0, 1, 1, 2, 3, 4))):
        a, b = sorted((rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)))
        what = rng.randrange(9)
        if what == 0:
            text = text[:a]
        elif what == 1:
            text = text[:a] + text[b:]
        elif what == 2:
            text = text[:b] + text[a:]
        elif what == 3:
            text = text[:a] + rng.choice(BREAKING) + text[a:]
        elif what == 4:
            text = text[:a] + rng.choice(EVERY) + text[b:]
        elif what == 5:  # another value behind a colon
            before, colon, behind = text.rpartition(":") if rng.random() < 0.5 else text.partition(":")
            text = before + colon + rng.choice(SWAPS) + behind[rng.randrange(12) :]
        elif what == 6:
            text = (
                rng.choice(("[", '{"memory": ', '{"facts": [', "```json\n", "[["))
                + text
                + rng.choice(("]", "}", "]}", ""))
            )
        elif what == 7:
            text = text.replace(rng.choice(("e1", "e2", "ADD", "Anna", '"', ",")), rng.choice(BREAKING))
        else:
            text = " ".join((text, text))
        text = text[:4000]
    return text


class Plain:
    """What a bank does, as a dict: ids in the order of adding, never given twice."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.given = 0

    def take(self, done: Operation) -> None:
        if done.error or done.verb == "NONE":
            return
        if done.verb == "ADD":
            self.given += 1
            assert done.target == f"e{self.given}"
            self.texts[done.target] = done.text
        elif done.verb == "UPDATE":
            assert done.target in self.texts
            self.texts[done.target] = done.text
        else:
            assert done.verb == "DELETE"
            del self.texts[done.target]


def check(role: str, result: Any) -> None:
    """What a module may hand to an agent."""
    if role == "extract":
        assert isinstance(result, list)
        assert len(result) <= 256
        assert all(type(fact) is Fact and fact.text.strip() == fact.text != "" for fact in result)
        for fact in result:
            for field in (fact.text, fact.key, fact.time, fact.source, fact.speaker):
                assert type(field) is str
    elif role == "update":
        assert len(result) <= 257
        assert all(type(operation) is Operation for operation in result)
    elif role == "rerank":
        assert 1 <= len(result) <= 5
        assert all(type(id) is str for id in result)
    else:
        assert type(result) is Reply
        assert result.text.strip()
        assert all(type(id) is str for id in result.cited)


@pytest.mark.slow
def test_100_000_replies_through_every_parser_and_a_bank() -> None:
    rng = random.Random(0)
    bank, plain = EntryBank(), Plain()
    names = list(GOOD)
    parsed, refused = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    errors: set[str] = set()
    slowest = 0.0
    for number in range(100_000):
        name = rng.choice(names)
        text = spoiled(rng, name)
        for role, kind in (name, rng.choice(names)):
            name, module = (role, kind), MODULES[role, kind]
            began = time.perf_counter()
            try:
                result = module.parse(text)
            except ModelOutputError:
                refused[name] += 1
                continue
            finally:
                slowest = max(slowest, time.perf_counter() - began)
            parsed[name] += 1
            check(role, result)
            if role != "update":
                continue
            if len(bank) > 50:
                bank, plain = EntryBank(), Plain()
            before = list(bank.entries()) if number % 50 == 0 else None
            done = [bank.apply(operation, turn=number) for operation in result]
            errors |= {operation.error for operation in done}
            for operation in done:
                plain.take(operation)
            assert plain.texts == {entry.id: entry.text for entry in bank.entries()}
            if before is not None and all(operation.error for operation in done):
                assert list(bank.entries()) == before
    assert errors <= REFUSALS
    assert {Refusal.UNKNOWN_VERB, Refusal.WRONG_TYPE, Refusal.MISSING_ID, Refusal.UNKNOWN_ID, ""} < errors
    # the accidents leave some replies whole and spoil others, for every module
    assert min(parsed.values()) > 2000
    assert min(refused.values()) > 100
    assert slowest < 2


class Hostile:
    """A policy that writes spoiled replies."""

    greedy = True

    def __init__(self, seed: int, agent: BankAgent) -> None:
        self.rng = random.Random(seed)
        options = {
            "extract": agent.extract,
            "update": agent.update,
            "rerank": {"kind": "model"},
            "answer": agent.answer,
        }
        self.names = {module: (module, str(chosen["kind"])) for module, chosen in options.items()}

    async def generate(self, messages: list[Message], *, module: str, max_tokens: int) -> Turn:
        await asyncio.sleep(0)
        (message,) = messages
        message["content"].encode()  # what a tokenizer refuses, or an endpoint, must never stand in a prompt
        # no text of a model that decodes tokens holds half a character; the escapes in JSON do
        text = spoiled(self.rng, self.names[module]).encode(errors="replace").decode()
        return Turn(module, [3], [4, 2], [-1.0, -1.0], text, StopReason.STOP, messages)

    def split(self, text: str, max_tokens: int) -> list[str]:
        return [text]


AGENTS = [
    BankAgent(
        extract={"kind": extract},
        update={"kind": update},
        retrieve={"kind": "search", "k": 4, "related": 3, "per_speaker": update == "events"},
        rerank={"kind": "model", "m": 2} if rerank else None,
        answer={"kind": answer},
    )
    for extract, update, rerank, answer in (
        ("facts", "crud", True, "distill"),
        ("facts", "events", False, "words"),
        ("topics", "merge", True, "cite"),
        ("lines", "words", False, "direct"),
        ("facts", "merge", False, "cite"),
    )
]
TASK = Task(
    "t",
    tuple(f"anna: I live in Rome, number {n}\nleo: And I have a goat" for n in range(3)),
    (Probe("Where does Anna live?", ("the gold that nobody says",)), Probe("And Leo?", ("nor this",), after=1)),
    {"sessions": [{"when": "1 May", "time": "2024-05-01", "speakers": ["anna", "leo"]}] * 3},
)


@pytest.mark.slow
def test_2_000_episodes_of_spoiled_replies() -> None:
    async def everything() -> list[Episode]:
        pairs = [(number, AGENTS[number % len(AGENTS)]) for number in range(2000)]
        return await asyncio.gather(*(agent.run(TASK, Hostile(n, agent), EntryBank("t")) for n, agent in pairs))

    episodes = asyncio.run(everything())
    RewardSystem([WeightedDimension("em", load_dimension("answer.exact_match"))]).score(episodes)
    entries = 0
    for episode in episodes:
        assert episode.reward == 0.0
        assert [answer.probe for answer in episode.answers] == list(TASK.probes)
        plain = Plain()
        for number, turn in enumerate(episode.turns):
            assert {operation.error for operation in turn.operations} <= REFUSALS
            for operation in turn.operations:
                plain.take(operation)
            assert turn.memory_after == "\n".join(f"{id}: {text}" for id, text in plain.texts.items())
            assert all(entry.turn is not None and entry.turn < number for entry in turn.retrieved)
        assert episode.memory == episode.turns[-1].memory_after
        entries += plain.given
    assert entries > 1000, "many a spoiled reply still adds something"

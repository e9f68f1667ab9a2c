"""How the synthetic dialogues are done: what a manager, a reranker and an answerer should decide, or a poor one would.

A teacher knows the events of its task and reads the entries it is shown by looking their lines up. With `Habits` below
1 it does what is wrong some of the time, so that a warm-up leaves something to learn.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from memfactory.environments.dialogue_world import NOTHING
from memfactory.episode import Operation, Task
from memfactory.errors import RecipeError
from memfactory.memory.entries import Entry, Verb
from memfactory.modules import ChooseState, EntriesState, Fact, ReadState, Reply, UpdateState

Slot = tuple[str, str]
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Habits:
    """How often a teacher does the right thing, in [0, 1]."""

    update: Share = 1.0
    """A fact that took another value changes its entry. Else it is added beside it."""
    delete: Share = 1.0
    """A fact that was taken back deletes its entry. Else the line is added."""
    ignore: Share = 1.0
    """What is no fact of the speakers is not kept. Else it is added."""
    pick: Share = 1.0
    """The answer rests on the entry that holds it. Else on any entry that says something."""
    rank: Share = 1.0
    """The entries that a question needs are chosen first. Else entries at random."""


@dataclass(frozen=True, slots=True)
class Line:
    """What a line of a dialogue says."""

    slot: Slot | None
    """Speaker and fact; None for chatter and facts of others."""
    value: str
    """What holds from then on; empty for chatter and for what was taken back."""
    retracted: bool = False


def lines_of(task: Task) -> dict[str, Line]:
    """What each line of the task says that tells something, the same words always the same."""
    sessions: Sequence[str] = task.metadata["lines"]
    found = {}
    for event in task.metadata["events"]:
        text = sessions[event["session"]][event["turn"]]
        own = event["operation"] != Verb.NONE.value
        slot = (event["speaker"], event["fact"]) if own else None
        found[text] = Line(slot, event["value"], event["operation"] == Verb.DELETE.value)
    return found


class DialogueTeacher:
    """Decides for any module of a bank agent; made anew for each demonstration."""

    def __init__(self, task: Task, habits: Habits, rng: random.Random) -> None:
        self.task, self.habits, self.rng = task, habits, rng
        self.lines = lines_of(task)
        notes: Sequence[Mapping[str, Any]] = task.metadata["probes"]
        self.asked: dict[str, Slot] = {
            probe.question: (note["speaker"], note["fact"]) for probe, note in zip(task.probes, notes, strict=True)
        }
        self._roles: dict[str, Callable[[Any], Any]] = {
            "extract": self._extract,
            "update": self._update,
            "rerank": self._rerank,
            "answer": self._answer,
        }

    def __call__(self, module: str, state: Any) -> Any:
        """The result of `module` in `state`.

        Raises:
            RecipeError: it has nothing to teach such a module.
        """
        if module not in self._roles:
            raise RecipeError(
                f"warmup: the teacher of dialogues cannot show module '{module}'",
                "it knows how a bank is kept: extract, update, rerank, answer",
                "use agent.name: compose, memory_r1 or rmm, or leave out warmup:",
            )
        return self._roles[module](state)

    def _extract(self, state: ReadState) -> list[Fact]:
        said = [line for line in state.chunk.splitlines() if line in self.lines]
        wanted = [line for line in said if self.lines[line].slot and state.speaker in ("", line.split(" : ")[0])]
        return [Fact(line, time=state.time, source=line) for line in wanted]

    def _update(self, state: UpdateState) -> list[Operation]:
        done: list[Operation] = []
        added: dict[Slot, int] = {}
        """By what it is about, the place in `done` of what this reply adds: no later fact of it could name an id."""
        for fact in state.facts:
            operation, line = self._one(fact, state.related), self.lines.get(fact.text)
            slot = line.slot if line is not None else None
            if slot in added and self._does(self.habits.update):
                assert line is not None
                done[added[slot]] = Operation(Verb.NONE.value) if line.retracted else operation
                continue
            if slot is not None and operation.verb == Verb.ADD.value:
                added[slot] = len(done)
            done.append(operation)
        return done

    def _one(self, fact: Fact, related: Sequence[Entry]) -> Operation:
        line, add = self.lines.get(fact.text), Operation(Verb.ADD.value, "", fact.text)
        if line is None or line.slot is None:
            return Operation(Verb.NONE.value) if self._does(self.habits.ignore) else add
        held = self._about(line.slot, related)
        if not held:
            return Operation(Verb.NONE.value) if line.retracted else add
        if line.retracted:
            return Operation(Verb.DELETE.value, held[0].id) if self._does(self.habits.delete) else add
        return Operation(Verb.UPDATE.value, held[0].id, fact.text) if self._does(self.habits.update) else add

    def _rerank(self, state: ChooseState) -> list[str]:
        candidates = list(state.candidates)
        needed = self._about(self.asked[state.question], candidates)
        if not needed or not self._does(self.habits.rank):
            self.rng.shuffle(candidates)
            return [entry.id for entry in candidates[: state.m]]
        others = [entry for entry in candidates if entry not in needed]
        return [entry.id for entry in [*needed, *others][: state.m]]

    def _answer(self, state: EntriesState) -> Reply:
        needed = self._about(self.asked[state.question], state.entries)
        if not self._does(self.habits.pick):
            speaking = [entry for entry in state.entries if (line := self.lines.get(entry.text)) and line.value]
            needed = [self.rng.choice(speaking)] if speaking else []
        if not needed:
            return Reply(NOTHING[0])
        return Reply(self.lines[needed[0].text].value or NOTHING[0], (needed[0].id,))

    def _about(self, slot: Slot, entries: Sequence[Entry]) -> list[Entry]:
        """Entries that speak about `slot`, in the order in which they are shown."""
        return [entry for entry in entries if (line := self.lines.get(entry.text)) and line.slot == slot]

    def _does(self, chance: float) -> bool:
        return self.rng.random() < chance

"""Synthetic dialogues over sessions, with facts that are told, change and are taken back.

Each session is a chunk: its date, then one line for each turn, ``anna : my pet is now goat .``. Facts belong to
speakers; among them stand chatter and facts of people who are never asked about. What happened when is kept in the
task, so the gold answer of any question after any session follows from replaying it (:func:`replay`).

Tasks come from generators seeded with (seed, split, index). The splits are disjoint by construction whatever the
seeds: a speaker and a value that go together in one split never do in the other
(:func:`memfactory.environments.dialogue_world.allowed`), though both splits use all words.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date, timedelta
from enum import StrEnum
from typing import Any

from memfactory.environments import dialogue_world as world
from memfactory.environments.base import Split
from memfactory.environments.dialogue_teacher import DialogueTeacher, Habits
from memfactory.environments.dialogue_world import ATTRIBUTES, NAMES, NOTHING, OCCASIONS, RELATIVE
from memfactory.environments.fact_words import seeded
from memfactory.episode import Evidence, Probe, Task
from memfactory.errors import RecipeError
from memfactory.memory.entries import Verb
from memfactory.memory.operations import entry_id

Slot = tuple[str, str]
"""Speaker and what the fact is about: at most one value holds at a time."""

_FIRST_DAY = date(2024, 1, 1)
_LONGEST_GAP = 9
"""Days between two sessions, at most."""


class Ask(StrEnum):
    """When the questions are asked."""

    END = "end"
    """After the last session."""
    ANY = "any"
    """After any session in or after the one that first tells the fact: `Probe.after` says which. Only for agents
    that ask then; one that reads on first is asked about a state that is past."""


class Happening(StrEnum):
    """What a turn does to the facts, and by its value what a perfect manager would do to a bank."""

    NEW = "ADD"
    CHANGED = "UPDATE"
    RETRACTED = "DELETE"
    DISTRACTION = "NONE"


class Needs(StrEnum):
    """What the latest word on the asked fact was: `Probe.category`. A retracted date is a deletion."""

    RECALL = "recall"
    """Told once."""
    UPDATE = "update"
    """Told, then changed."""
    DELETION = "deletion"
    """Taken back: there is nothing any more."""
    DATE = "date"
    """A day told relative to that of its session."""


@dataclass(frozen=True, slots=True)
class Event:
    """A turn that says a fact."""

    session: int
    turn: int
    """Its place in the session, from 0."""
    speaker: str
    fact: str
    """What it is about, e.g. ``pet``."""
    operation: Happening
    value: str
    """What holds from now on, dates resolved; empty for a retraction."""
    said: str
    """The words of the session that say so."""


@dataclass(frozen=True)
class Dialogues:
    """Environment ``dialogues``.

    ``metadata["events"]`` lists the events of all sessions in order (:class:`Event` as mappings; ``operation`` is ADD,
    UPDATE, DELETE or NONE), ``metadata["lines"]`` what was said in each, ``metadata["sessions"]`` date and speakers of
    each session that is read, ``metadata["memory"]`` the entries to begin with, and ``metadata["probes"]``, parallel
    to ``Task.probes``, whom and what each asks about and whether it ``needs_update``, ``needs_deletion``,
    ``needs_date``.
    """

    seed: int = 0
    sessions: int = 4
    turns_per_session: int = 4
    """Turns that say no fact are chatter."""
    facts: int = 3
    """Facts that are told and may be asked about, at most one a turn."""
    changes: int = 1
    """How often some fact takes another value, over the whole dialogue."""
    retractions: int = 1
    """Facts that are taken back, for good."""
    distractors: int = 2
    """Turns that tell a fact of the same kind about somebody else. Its value never answers a question."""
    speakers: int = 2
    """People who tell facts by turns. When there are fewer facts than people, some only chat."""
    relative_dates: int = 0
    """Further facts that are dates, told like ``my exam is in two days .`` and asked as a date."""
    probes: int = 1
    """Questions, each about another fact."""
    ask: Ask = Ask.END
    given: int = 0
    """Sessions that a perfect manager has read before: what they leave stands in ``metadata["memory"]``, the stream
    begins after them, and what is asked about was, where it can be, said in the sessions that are left. With all but
    one given, a task is Memory-R1's single step: one session, one bank, the questions linked to it."""
    habits: Habits = field(default_factory=Habits)
    """How well the warm-up teacher does its job."""

    def __post_init__(self) -> None:
        told = self.facts + self.relative_dates
        turns = self.sessions * self.turns_per_session
        says = told + self.changes + self.retractions + self.distractors
        counts = (self.facts, self.changes, self.retractions, self.distractors, self.relative_dates)
        for wrong, why, fix in (
            (
                min(counts) < 0 or min(self.sessions, self.turns_per_session, self.probes) < 1,
                "a number is too small",
                "sessions, turns_per_session and probes begin at 1, the others at 0",
            ),
            (not 1 <= self.speakers <= len(NAMES), f"{self.speakers} speakers", f"give 1 to {len(NAMES)}"),
            (told < 1, "there is nothing to ask about", "give facts or relative_dates"),
            (
                self.facts > self.speakers * len(ATTRIBUTES),
                f"{self.facts} facts are too many",
                f"at most {len(ATTRIBUTES)} for each speaker",
            ),
            (
                self.relative_dates > self.speakers * len(OCCASIONS),
                f"{self.relative_dates} dates are too many",
                f"at most {len(OCCASIONS)} for each speaker",
            ),
            (self.retractions > told, f"{self.retractions} retractions of {told} facts", "use fewer retractions"),
            (
                not 0 <= self.given < self.sessions,
                f"{self.given} sessions given of {self.sessions}",
                "leave at least one to read",
            ),
            (
                self.given > 0 and self.ask == Ask.ANY,
                "given sessions and questions after any session do not go together",
                "use ask: end",
            ),
            (self.probes > told, f"{self.probes} probes about {told} facts", "use fewer probes or more facts"),
            (
                says > turns,
                f"facts, changes, retractions and distractors need {says} turns of {turns}",
                "use more sessions or turns_per_session",
            ),
        ):
            if wrong:
                raise RecipeError("environment dialogues", why, fix)

    def tasks(self, split: Split, count: int | None = None) -> Sequence[Task]:
        if count is None:
            raise RecipeError(
                f"environment.{split}_tasks: missing",
                "dialogues generates without end",
                f"say how many tasks, e.g. {split}_tasks: 256",
            )
        return [self._task(Split(split), index) for index in range(count)]

    def vocabulary(self) -> list[str]:
        """Every word a task, a prompt of the ``words`` set or an answer can hold, in a fixed order."""
        last = _FIRST_DAY + timedelta(days=366 + _LONGEST_GAP * self.sessions + max(RELATIVE))
        prompts = "the . ? : which and question memory section write answer none no fact update choose".split()
        verbs = [verb.value for verb in Verb]
        ids = [entry_id(number) for number in range(1, self.sessions * self.turns_per_session + 1)]
        return list(dict.fromkeys([*prompts, *verbs, *ids, *world.words(_FIRST_DAY.year, last.year)]))

    def teacher(self, task: Task, seed: int) -> DialogueTeacher:
        """What a teacher with these `habits` decides for each module of a bank agent."""
        return DialogueTeacher(task, self.habits, seeded("dialogues", "teacher", self.seed, seed))

    def _task(self, split: Split, index: int) -> Task:
        rng = seeded("dialogues", self.seed, split, index)
        people = rng.sample(NAMES, self.speakers)
        days = [_FIRST_DAY + timedelta(days=rng.randrange(366))]
        while len(days) < self.sessions:
            days.append(days[-1] + timedelta(days=rng.randint(1, _LONGEST_GAP)))
        slots = self._slots(rng, people)
        lines = [[(rng.choice(people), world.chat(rng)) for _ in range(self.turns_per_session)] for _ in days]
        events = []
        for event, sentence in self._events(rng, split, people, days, slots):
            events.append(event)
            lines[event.session][event.turn] = (event.speaker, sentence)
        spoken = [[f"{speaker} : {sentence}" for speaker, sentence in said] for said in lines]
        stream = tuple("\n".join([world.header(day), *said]) for day, said in zip(days, spoken, strict=True))
        probes = []
        notes = []
        asked = rng.sample(slots, len(slots))
        if self.given:
            said = [event for event in events if event.session >= self.given]
            fresh = {(one.speaker, one.fact) for one in said if one.operation != Happening.DISTRACTION}
            asked.sort(key=lambda slot: slot not in fresh)
        for slot in asked[: self.probes]:
            first = next(
                event.session
                for event in events
                if event.operation == Happening.NEW and (event.speaker, event.fact) == slot
            )
            after = rng.randint(first + 1, self.sessions) if self.ask == Ask.ANY else None
            probe, note = _probe(slot, events, days, after, self.given)
            probes.append(probe)
            notes.append(note)
        return Task(
            id=f"dialogues/{split}/{self.seed}/{index}",
            stream=stream[self.given :],
            probes=tuple(probes),
            metadata={
                "events": [{**asdict(event), "operation": str(event.operation)} for event in events],
                "sessions": [
                    {
                        "id": str(number),
                        "when": world.date_words(day),
                        "time": day.isoformat(),
                        "speakers": list(dict.fromkeys(speaker for speaker, _ in said)),
                    }
                    for number, (day, said) in enumerate(zip(days, lines, strict=True))
                ][self.given :],
                "probes": notes,
                "lines": spoken,
                "memory": _memory(events, spoken, days, self.given),
            },
        )

    def _slots(self, rng: random.Random, people: Sequence[str]) -> list[Slot]:
        """What is told, dealt to the people one after the other."""
        slots = []
        for kinds, count in ((sorted(ATTRIBUTES), self.facts), (sorted(OCCASIONS), self.relative_dates)):
            shuffled = {person: rng.sample(kinds, len(kinds)) for person in people}
            slots += [(people[n % len(people)], shuffled[people[n % len(people)]].pop()) for n in range(count)]
        return slots

    def _events(
        self, rng: random.Random, split: Split, people: Sequence[str], days: Sequence[date], slots: list[Slot]
    ) -> Iterator[tuple[Event, str]]:
        """Events in order, each with its sentence. The first about a slot tells it, the last may take it back."""
        retracted = set(rng.sample(slots, self.retractions))
        about: list[Slot | None] = [*slots, *sorted(retracted), *(rng.choice(slots) for _ in range(self.changes))]
        about += [None] * self.distractors
        rng.shuffle(about)
        left = {slot: about.count(slot) for slot in slots}
        places = sorted(rng.sample(range(self.sessions * self.turns_per_session), len(about)))
        # one value of each half of a list is kept for distractions, so that none of them is ever an answer
        kept = {fact: {rng.randrange(0, 10, 2), rng.randrange(1, 10, 2)} for fact in sorted(ATTRIBUTES)}
        used: dict[Slot, list[str]] = {slot: [] for slot in slots}
        for place, slot in zip(places, about, strict=True):
            session, turn = divmod(place, self.turns_per_session)
            if slot is None:
                speaker, fact = rng.choice(people), rng.choice(sorted(ATTRIBUTES))
                number = next(n for n in sorted(kept[fact]) if world.allowed(split, speaker, n))
                value = ATTRIBUTES[fact][number]
                sentence = world.say_distraction(rng, fact, value)
                yield Event(session, turn, speaker, fact, Happening.DISTRACTION, value, value), sentence
                continue
            speaker, fact = slot
            left[slot] -= 1
            if slot in retracted and not left[slot]:
                sentence = world.say_retracted(rng, fact)
                yield Event(session, turn, speaker, fact, Happening.RETRACTED, "", f"no {fact} any more"), sentence
                continue
            if fact in OCCASIONS:
                options = [
                    (world.date_words(day), words)
                    for offset, words in RELATIVE.items()
                    if world.allowed(split, speaker, (day := days[session] + timedelta(days=offset)).toordinal())
                ]
            else:
                options = [
                    (value, value)
                    for number, value in enumerate(ATTRIBUTES[fact])
                    if number not in kept[fact] and world.allowed(split, speaker, number)
                ]
            options = [option for option in options if option[0] not in used[slot][-1:]]
            # a value that was not there before, while there is one
            value, said = rng.choice([option for option in options if option[0] not in used[slot]] or options)
            changed = bool(used[slot])
            used[slot].append(value)
            sentence = (world.say_changed if changed else world.say_new)(rng, fact, said)
            happening = Happening.CHANGED if changed else Happening.NEW
            yield Event(session, turn, speaker, fact, happening, value, said), sentence


def replay(events: Iterable[Event], sessions: int) -> dict[Slot, Event]:
    """The latest event about each fact when the first `sessions` sessions have been held, distractions aside."""
    latest: dict[Slot, Event] = {}
    for event in events:
        if event.session < sessions and event.operation != Happening.DISTRACTION:
            latest[event.speaker, event.fact] = event
    return latest


def _memory(
    events: Sequence[Event], spoken: Sequence[Sequence[str]], days: Sequence[date], sessions: int
) -> list[dict[str, Any]]:
    """The bank that a perfect manager has after `sessions` sessions: the newest line about each fact that holds."""
    return [
        {
            "text": spoken[event.session][event.turn],
            "tags": [event.speaker],
            "time": days[event.session].isoformat(),
        }
        for event in replay(events, sessions).values()
        if event.operation != Happening.RETRACTED
    ]


def _probe(
    slot: Slot, events: Sequence[Event], days: Sequence[date], after: int | None, given: int = 0
) -> tuple[Probe, dict[str, Any]]:
    speaker, fact = slot
    latest = replay(events, len(days) if after is None else after)[slot]
    deleted = latest.operation == Happening.RETRACTED
    dated = fact in OCCASIONS and not deleted
    chunk = latest.session - given  # before 0: in the memory that is given
    evidence = [Evidence(latest.said, chunk)]
    if dated:  # "tomorrow" says nothing without the day it was said on
        evidence.append(Evidence(world.date_words(days[latest.session]), chunk))
    if deleted:
        needs = Needs.DELETION
    elif dated:
        needs = Needs.DATE
    else:
        needs = Needs.UPDATE if latest.operation == Happening.CHANGED else Needs.RECALL
    answers = (*NOTHING, f"no {fact}") if deleted else (latest.value,)
    note = {
        "speaker": speaker,
        "fact": fact,
        "needs_update": latest.operation == Happening.CHANGED,
        "needs_deletion": deleted,
        "needs_date": dated,
    }
    return Probe(world.question(speaker, fact), answers, tuple(evidence), str(needs), after), note

"""An agent over a bank of entries, put together from modules: extract, update, retrieve, rerank, answer.

    for each chunk      extract its facts -> find related entries -> update the bank
    for each question   retrieve entries -> rerank them (or not) -> answer

Memory-R1 and RMM are this agent with other modules (:mod:`memfactory.agents.presets`); a recipe can put any of them
together, and classes of its own beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeVar

from memfactory.agents.asking import ask
from memfactory.agents.base import Longest
from memfactory.episode import Answer, Episode, Operation, Probe, Retrieved, Task, Turn
from memfactory.errors import DataError, MemFactoryError, RecipeErrors, attempt
from memfactory.loops import together
from memfactory.memory.bank import BankSnapshot, EntryBank
from memfactory.memory.entries import Bank, Entry, Verb
from memfactory.memory.operations import entry_number
from memfactory.modules.entry_answer import EntriesState, Reply
from memfactory.modules.facts import Fact, ReadState
from memfactory.modules.kinds import build_module
from memfactory.modules.rerank import ChooseState
from memfactory.modules.retrieve import Retrieval, Retriever
from memfactory.modules.updates import UpdateState
from memfactory.policy.base import Policy

Options = Mapping[str, Any]
"""``kind`` of a module and the fields of its class, see :mod:`memfactory.modules.kinds`."""
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class BankAgent:
    """See the module's docstring. One object runs any number of episodes; each has a bank of its own.

    Extraction does not look at the bank, so that of all chunks is asked at once; updates follow each other, because
    each sees what the one before left; questions due at the same time are asked at once.

    A task with ``metadata["memory"]``, a list of ``{"text"}`` and perhaps `key`, `tags`, `time`, begins with those
    entries; the bank gives them ids of its own.
    """

    extract: Options = field(default_factory=lambda: {"kind": "facts"})
    update: Options = field(default_factory=lambda: {"kind": "crud"})
    retrieve: Options = field(default_factory=lambda: {"kind": "search"})
    rerank: Options | None = None
    """None: the answer sees what was retrieved."""
    answer: Options = field(default_factory=lambda: {"kind": "distill"})
    max_extract_tokens: int = 1024
    """Token limit of an extraction turn."""
    max_update_tokens: int = 1024
    max_rerank_tokens: int = 64
    max_answer_tokens: int = 512
    entry_order: Literal["rank", "bank"] = "rank"
    """Order in which an answer is shown its entries. ``rank``: best first. ``bank``: as they were added, oldest first,
    so that their place says when and not how well they fit."""
    record_memory: bool = True
    """Keep the whole bank as text on every turn that changes it: what reports show and rewards on memory read. Its
    size times the number of updates; turn it off for banks of thousands of entries."""
    record_final_memory: bool = True
    """Keep the whole bank as text in `Episode.memory` when the episode ends: what rewards on memory and reports read.
    `memfactory serve` turns it off, and writes it for a request that asks for its episode."""

    def __post_init__(self) -> None:
        errors: list[MemFactoryError] = []
        for name in ("extractor", "updater", "retriever", "reranker", "answerer"):
            attempt(lambda name=name: getattr(self, name), errors)  # type: ignore[misc]
        if errors:
            raise RecipeErrors("agent", errors)

    @cached_property
    def extractor(self) -> Any:
        return build_module("extract", self.extract)

    @cached_property
    def updater(self) -> Any:
        return build_module("update", self.update)

    @cached_property
    def retriever(self) -> Retriever:
        built: Retriever = build_module("retrieve", self.retrieve)
        return built

    @cached_property
    def reranker(self) -> Any:
        return build_module("rerank", self.rerank) if self.rerank is not None else None

    @cached_property
    def answerer(self) -> Any:
        return build_module("answer", self.answer)

    @property
    def modules(self) -> list[Any]:
        """Its modules in the order in which they are asked."""
        parts = [self.extractor, self.updater, self.retriever, self.reranker, self.answerer]
        return [part for part in parts if part is not None]

    def chunks(self, task: Task, policy: Policy) -> list[str]:
        """What will be read: the chunks as the environment cut them.

        Raises:
            DataError: the task has nothing to read and no memory to begin with.
        """
        if not task.stream and not task.metadata.get("memory"):
            raise DataError(f"task {task.id}", "it has nothing to read and no memory", "remove the row")
        return list(task.stream)

    def answer_state(self, task: Task, probe: Probe, texts: Sequence[str]) -> EntriesState:
        """What the answer sees when the bank holds `texts` and nothing else."""
        entries = tuple(Entry(f"e{place}", text, owner=task.id) for place, text in enumerate(texts, 1) if text)
        return EntriesState(probe.question, entries, str(task.metadata.get("asked_on", "")))

    def longest(self, task: Task, chunks: Sequence[str]) -> list[Longest]:
        """The longest prompts on `task`. An entry can be as long as a reply that wrote it, or as what was given."""
        given = [str(entry.get("text") or "") for entry in task.metadata.get("memory", ())]
        sessions, asked = task.metadata.get("sessions", ()), str(task.metadata.get("asked_on", ""))
        question = max((probe.question for probe in task.probes), key=len, default="")
        entry = self.max_update_tokens if hasattr(self.updater, "render") else self.max_extract_tokens
        written = 0 if not chunks and given else entry
        found = []
        if chunks and hasattr(self.extractor, "render"):
            place = max(range(len(chunks)), key=lambda place: len(chunks[place]))
            session = sessions[place] if place < len(sessions) else {}
            who = tuple(session.get("speakers", ()))
            state = ReadState(chunks[place], str(session.get("when", "")), str(session.get("time", "")), who, *who[:1])
            read = self.extractor.render(state)
            fix = "let the environment cut shorter chunks, or lower agent.max_extract_tokens"
            found.append(Longest("a turn that reads", self.extractor.name, read, 0, self.max_extract_tokens, fix))
        if chunks and hasattr(self.updater, "render"):
            most = self.max_extract_tokens + self.retriever.related * entry
            update = self.updater.render(UpdateState((), ()))
            fix = "lower agent.retrieve.related or agent.max_update_tokens"
            found.append(
                Longest("an update", self.updater.name, update, most, self.max_update_tokens, fix, likely=False)
            )
        shown = self.retriever.k
        fix = "lower agent.retrieve.k or the token limits of the agent"
        if self.reranker is not None:
            if hasattr(self.reranker, "render"):
                choose = self.reranker.render(ChooseState(question, (), self.reranker.m))
                limit = self.max_rerank_tokens
                found.append(
                    Longest("a reranking", self.reranker.name, choose, shown * written, limit, fix, likely=False)
                )
            shown = self.reranker.m
        answer = self.answerer.render(EntriesState(question, (), asked))
        limit = self.max_answer_tokens
        found.append(Longest("an answer", self.answerer.name, answer, shown * written, limit, fix, likely=False))
        return found

    def restore(self, snapshot: BankSnapshot) -> EntryBank:
        """A bank of its own in the state of `snapshot`, which stays as it is: where re-rolls begin."""
        bank = EntryBank(snapshot.owner)
        bank.restore(snapshot)
        return bank

    async def run(self, task: Task, policy: Policy, store: Bank | None = None) -> Episode:
        bank = store if store is not None else EntryBank(task.id)
        run = _Run(self, task, policy, bank)
        return await run.everything()


class _Run:
    """One episode under way."""

    def __init__(self, agent: BankAgent, task: Task, policy: Policy, bank: Bank) -> None:
        self.agent, self.task, self.policy, self.bank = agent, task, policy, bank
        self.episode = Episode(task)
        given = task.metadata.get("memory", ())
        for entry in given if given and not len(bank) else ():
            bank.apply(_given(entry))
        self.written: set[str] = set()
        """Entries that this episode wrote. The turns of others are not turns of this episode."""
        self.retrieval: Retrieval
        self.sessions: Sequence[Mapping[str, Any]] = task.metadata.get("sessions", ())
        self.answers: dict[int, Answer] = {}
        """By number of the question; they may be asked in another order."""

    async def everything(self) -> Episode:
        task, episode = self.task, self.episode
        self.retrieval = await self.agent.retriever.opened(self.bank)
        readings = await together(self.read(index) for index in range(len(task.stream)))
        await self.ask_due(0)
        for index, (turns, facts) in enumerate(readings):
            episode.snapshots[index] = self.bank.snapshot()
            for turn in turns:
                turn.memory_before = turn.memory_after = self.memory()
            episode.turns += turns
            await self.learn(index, facts)
            await self.ask_due(index + 1)
        episode.answers = [self.answers[number] for number in range(len(task.probes))]
        episode.memory = text_of(self.bank) if self.agent.record_final_memory else ""
        return episode

    def memory(self) -> str:
        return text_of(self.bank) if self.agent.record_memory else ""

    # ---- reading -----------------------------------------------------------------------------

    async def read(self, index: int) -> tuple[list[Turn], list[Fact]]:
        """The facts of a chunk, and the turns that found them."""
        extractor, session = self.agent.extractor, self.session(index)
        state = ReadState(
            self.task.stream[index],
            str(session.get("when", "")),
            str(session.get("time", "")),
            tuple(session.get("speakers", ())),
        )
        if hasattr(extractor, "apply"):
            return [], list(extractor.apply(state))
        states = [replace(state, speaker=who) for who in state.speakers] if extractor.per_speaker else []
        asked = [
            ask(
                self.policy,
                extractor,
                one,
                max_tokens=self.agent.max_extract_tokens,
                chunk=index,
                prefix_key=f"{self.task.id}/extract/{index}",
            )
            for one in states or [state]
        ]
        turns, facts = [], list[Fact]()
        for one, (turn, found) in zip(states or [state], await together(asked), strict=True):
            turns.append(turn)
            facts += [
                replace(fact, time=fact.time or state.time, speaker=fact.speaker or one.speaker)
                for fact in found or ()
            ]
        return turns, facts

    def session(self, index: int) -> Mapping[str, Any]:
        return self.sessions[index] if index < len(self.sessions) else {}

    # ---- updating ----------------------------------------------------------------------------

    async def learn(self, index: int, facts: Sequence[Fact]) -> None:
        """Bring the bank up to date with the facts of a chunk."""
        updater = self.agent.updater
        # the facts of different speakers apart, so that it is known of whom each new entry speaks
        by_speaker: dict[str, list[Fact]] = {}
        for fact in facts:
            by_speaker.setdefault(fact.speaker, []).append(fact)
        batches = [[fact] for fact in facts] if updater.per_fact else list(by_speaker.values())
        for number, batch in enumerate(batches):
            looks_up = getattr(updater, "looks_up", True)
            related = await self.related([fact.text for fact in batch]) if looks_up else ()
            state = UpdateState(tuple(batch), related)
            if hasattr(updater, "apply"):
                self.change(updater.apply(state), turn=None)
                continue
            turn, operations = await ask(
                self.policy,
                updater,
                state,
                max_tokens=self.agent.max_update_tokens,
                chunk=index,
                prefix_key=f"{self.task.id}/update/{index}/{number}",
            )
            turn.memory_before = self.memory()
            turn.retrieved = self.shown(state.related)
            completed = [_completed(operation, batch) for operation in operations or ()]
            turn.operations = self.change(completed, turn=len(self.episode.turns))
            turn.memory_after = self.memory()
            self.episode.turns.append(turn)

    async def related(self, texts: list[str]) -> tuple[Entry, ...]:
        return await self.retrieval.aside(lambda: self.retrieval.related(texts))

    def change(self, operations: Sequence[Operation], turn: int | None) -> list[Operation]:
        """Carry out `operations`; those that cannot be come back with their reason."""
        done = [self.bank.apply(operation, turn=turn) for operation in operations]
        changed = [one.target for one in done if not one.error and one.verb != Verb.NONE.value]
        self.written.update(changed)
        self.retrieval.follow(list(dict.fromkeys(changed)))
        return done

    # ---- answering ---------------------------------------------------------------------------

    async def ask_due(self, read: int) -> None:
        """Ask the questions that are due when `read` chunks have been read."""
        last = len(self.task.stream)
        due = [
            (number, probe)
            for number, probe in enumerate(self.task.probes)
            if min(max(probe.after, 0) if probe.after is not None else last, last) == read
        ]
        asked = await together(self.reply(number, probe) for number, probe in due)
        for (number, _), (turns, answer) in zip(due, asked, strict=True):
            answer.turn = len(self.episode.turns) + len(turns) - 1
            self.episode.turns += turns
            self.answers[number] = answer

    async def reply(self, number: int, probe: Probe) -> tuple[list[Turn], Answer]:
        agent, task, question = self.agent, self.task, probe.question
        speakers = list(dict.fromkeys(who for session in self.sessions for who in session.get("speakers", ())))
        entries = await self.retrieval.aside(lambda: self.retrieval.answering(question, speakers, seed=task.id))
        turns = []
        if agent.reranker is not None:
            turn, entries = await self.rerank(number, question, entries)
            turns.append(turn)
        if agent.entry_order == "bank":
            entries = tuple(sorted(entries, key=lambda entry: entry_number(entry.id) or 0))
        when = str(task.metadata.get("asked_on", ""))
        turn, reply = await ask(
            self.policy,
            agent.answerer,
            EntriesState(question, entries, when),
            max_tokens=agent.max_answer_tokens,
            prefix_key=f"{task.id}/answer/{number}",
        )
        turn.retrieved = self.shown(entries)
        turns.append(turn)
        for one in turns:
            one.memory_before = one.memory_after = self.memory()
        found: Reply | None = reply
        turn.cited = list(found.cited) if found is not None else []
        return turns, Answer(probe, found.text if found is not None else None, turn.text)

    def shown(self, entries: Sequence[Entry]) -> list[Retrieved]:
        """`entries` as a turn records them, with the turn of this episode that wrote each."""
        return [Retrieved(entry.id, entry.text, entry.turn if entry.id in self.written else None) for entry in entries]

    async def rerank(self, number: int, question: str, entries: tuple[Entry, ...]) -> tuple[Turn, tuple[Entry, ...]]:
        """The entries that the reranker keeps, best first; where it names none that was there, the first ones."""
        reranker = self.agent.reranker
        by_id = {entry.id: entry for entry in entries}
        if hasattr(reranker, "choose"):
            turn = reranker.choose(question, entries, greedy=self.policy.greedy)
            turn.prefix_key = f"{self.task.id}/rerank/{number}"
            ids: list[str] | None = [turn.choice.candidates[place] for place in turn.choice.chosen]
        else:
            turn, ids = await ask(
                self.policy,
                reranker,
                ChooseState(question, entries, reranker.m),
                max_tokens=self.agent.max_rerank_tokens,
                prefix_key=f"{self.task.id}/rerank/{number}",
            )
        kept = tuple(by_id[id] for id in ids or () if id in by_id)
        if ids is not None and not kept and entries:
            turn.error = "it named no entry that it was shown"
        chosen = kept or entries[: reranker.m]
        turn.retrieved = self.shown(chosen)
        return turn, chosen


def text_of(bank: Bank) -> str:
    """A bank as text, an entry on each line: ``e3: anna lives in paris``."""
    return "\n".join(f"{entry.id}: {entry.text}" for entry in bank.entries())


def _given(entry: Mapping[str, Any]) -> Operation:
    """An entry of ``metadata["memory"]`` as the ADD that brings it in."""
    texts = {name: str(entry.get(name) or "") for name in ("text", "key", "time")}
    return Operation(Verb.ADD.value, "", texts["text"], texts["key"], tuple(entry.get("tags") or ()), texts["time"])


def _completed(operation: Operation, facts: Sequence[Fact]) -> Operation:
    """`operation` with what it leaves out: from the fact whose words it repeats, or else what all `facts` share."""
    if operation.error or operation.verb not in (Verb.ADD.value, Verb.UPDATE.value):
        return operation
    about = [fact for fact in facts if fact.text == operation.text][:1] or facts
    shared = {name: _common([getattr(fact, name) for fact in about]) for name in ("text", "key", "time", "speaker")}
    return replace(
        operation,
        text=operation.text or shared["text"],
        key=operation.key or shared["key"],
        time=operation.time or shared["time"],
        tags=operation.tags or ((shared["speaker"],) if shared["speaker"] else ()),
    )


def _common(values: Sequence[str]) -> str:
    """The one value there is; empty where there are several."""
    return values[0] if len(set(values)) == 1 else ""

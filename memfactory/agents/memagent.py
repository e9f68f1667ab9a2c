"""MemAgent (arXiv 2507.02259): read chunk by chunk, rewrite a short memory, answer from it alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

from memfactory.agents.asking import ask
from memfactory.agents.base import Longest
from memfactory.episode import Answer, Episode, Probe, Task
from memfactory.errors import DataError
from memfactory.memory import TextMemory
from memfactory.modules import (
    AnswerFormat,
    AnswerState,
    FinalAnswer,
    PromptOrder,
    RecurrentMemory,
    WriteState,
    prompt_set,
)
from memfactory.policy.base import Policy


class Overflow(StrEnum):
    """What to do with a document of more than `max_chunks` chunks. There is no silent choice."""

    ERROR = "error"
    TRUNCATE_END = "truncate_end"
    """Keep the first `max_chunks` chunks."""
    TRUNCATE_CENTER = "truncate_center"
    """Keep the first and the last chunks and drop the middle, as MemAgent's data loader does."""


@dataclass(frozen=True)
class MemAgent:
    """One text memory; the question (or all of a task's questions, one a line) is known while reading.

    Every chunk gives one ``write`` turn, the question one ``answer`` turn, so an episode over
    n chunks has n + 1 turns and, since each rewrites the context, n + 1 rows.
    """

    prompt: str = "document"
    """Name of a prompt set, see :mod:`memfactory.modules.prompts`."""
    order: PromptOrder = PromptOrder.SHARED
    """``shared``: instructions, question, chunk, then memory. ``paper``: memory before the chunk."""
    answer_format: AnswerFormat = AnswerFormat.BOXED
    max_memory_tokens: int = 1024
    """Token limit of a write turn, hence of the memory. Unit: tokens of the policy."""
    max_answer_tokens: int = 1024
    """Token limit of the answer turn."""
    chunk_tokens: int | None = None
    """Cut each piece of the stream into chunks of at most this many tokens; None takes the
    stream's pieces as they are."""
    max_chunks: int | None = None
    """Most chunks read per task; None for no limit."""
    on_overflow: Overflow = Overflow.ERROR
    wipe_memory: bool = False
    """Control experiment: forget everything just before the answer. An honest task then scores 0."""

    @cached_property
    def writer(self) -> RecurrentMemory:
        return RecurrentMemory(prompt_set(self.prompt, self.order))

    @cached_property
    def answerer(self) -> FinalAnswer:
        return FinalAnswer(prompt_set(self.prompt, self.order), AnswerFormat(self.answer_format))

    @property
    def modules(self) -> list[Any]:
        """Its modules in the order in which they are asked."""
        return [self.writer, self.answerer]

    def chunks(self, task: Task, policy: Policy) -> list[str]:
        """The chunks that will be read, in order.

        Raises:
            DataError: the task has no chunk, more than `max_chunks` under ``on_overflow: error``, or a question that
                is due before the end.
        """
        for probe in task.probes:
            if probe.after is not None and probe.after < len(task.stream):
                raise DataError(
                    f"task {task.id}",
                    f"'{probe.question}' is to be asked after chunk {probe.after} of {len(task.stream)}, and MemAgent "
                    "answers when it has read everything",
                    "use an agent over a bank (agent.name: memory_r1), or ask at the end (environment.ask: end)",
                )
        pieces = list(task.stream)
        if self.chunk_tokens is not None:
            pieces = [piece for text in pieces for piece in policy.split(text, self.chunk_tokens)]
        if not pieces:
            raise DataError(f"task {task.id}", "its document is empty", "remove the row or give it a context")
        limit = self.max_chunks
        if limit is None or len(pieces) <= limit:
            return pieces
        if self.on_overflow == Overflow.ERROR:
            raise DataError(
                f"task {task.id}",
                f"its document has {len(pieces)} chunks, more than agent.max_chunks = {limit}",
                "raise agent.max_chunks or agent.chunk_tokens, or set agent.on_overflow to truncate_end "
                "or truncate_center",
            )
        if self.on_overflow == Overflow.TRUNCATE_END:
            return pieces[:limit]
        head = (limit + 1) // 2
        return pieces[:head] + pieces[len(pieces) - (limit - head) :]

    def answer_state(self, task: Task, probe: Probe, texts: Sequence[str]) -> AnswerState:
        """What the answer sees when its memory is `texts`."""
        return AnswerState(probe.question, "\n".join(texts))

    def longest(self, task: Task, chunks: Sequence[str]) -> list[Longest]:
        """The longest prompts on `task`, cut into `chunks`: the memory can be as long as a reply that wrote it."""
        question = "\n".join(probe.question for probe in task.probes)
        asked = max((probe.question for probe in task.probes), key=len, default="")
        read = self.writer.render(WriteState(question, max(chunks, key=len, default=""), ""))
        memory, answer = self.max_memory_tokens, self.max_answer_tokens
        shorter = "use smaller chunks (agent.chunk_tokens) or a shorter memory (agent.max_memory_tokens)"
        fix = "use a shorter memory (agent.max_memory_tokens) or answer (agent.max_answer_tokens)"
        return [
            Longest("a turn that reads", self.writer.name, read, memory, memory, shorter),
            Longest(
                "an answer", self.answerer.name, self.answerer.render(AnswerState(asked, "")), memory, answer, fix
            ),
        ]

    async def run(self, task: Task, policy: Policy, store: TextMemory | None = None) -> Episode:
        memory = store if store is not None else TextMemory()
        episode = Episode(task)
        question = "\n".join(probe.question for probe in task.probes)
        # who comes with a memory may ask without anything new to read
        chunks = self.chunks(task, policy) if task.stream or store is None else []
        for index, chunk in enumerate(chunks):
            turn, text = await ask(
                policy,
                self.writer,
                WriteState(question, chunk, memory.text),
                max_tokens=self.max_memory_tokens,
                chunk=index,
                prefix_key=f"{task.id}/write/{index}",
            )
            turn.memory_before = memory.text
            if text is not None:  # otherwise the memory stays as it was
                memory.write(text, turn=len(episode.turns))
            turn.memory_after = memory.text
            episode.turns.append(turn)

        if self.wipe_memory:
            memory.write("", turn=len(episode.turns) - 1)
        for number, probe in enumerate(task.probes):
            turn, answer = await ask(
                policy,
                self.answerer,
                AnswerState(probe.question, memory.text),
                max_tokens=self.max_answer_tokens,
                prefix_key=f"{task.id}/answer/{number}",
            )
            turn.memory_before = turn.memory_after = memory.text
            episode.answers.append(Answer(probe, answer, turn.text, len(episode.turns)))
            episode.turns.append(turn)
        episode.memory = memory.text
        return episode

"""An agent of one's own: before it rewrites its memory it asks whether the chunk matters at all.

docs/adding-a-module-and-agent.md explains this file step by step. It needs only public names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from memfactory import Answer, Episode, ModelOutputError, Task
from memfactory.agents import MemAgent, ask
from memfactory.environments.fact_words import FactWords, seeded
from memfactory.memory import TextMemory
from memfactory.modules import AnswerState, WriteState, strip_reasoning


@dataclass(frozen=True)
class Look:
    """What the filter sees: the memory is not among it, so a group's prompts are all the same."""

    question: str
    chunk: str


@dataclass(frozen=True)
class Filter:
    """Decides whether a chunk matters: (question, chunk) to True or False."""

    prompt: str
    name: str = "filter"

    def render(self, state: Look) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.prompt.format(question=state.question, chunk=state.chunk)}]

    def parse(self, text: str) -> bool:
        """Whether the reply says `keep`.

        Raises:
            ModelOutputError: its first word is neither `keep` nor `skip`.
        """
        first = strip_reasoning(text).lower().split()[:1]
        if first not in (["keep"], ["skip"]):
            raise ModelOutputError("the reply starts with neither 'keep' nor 'skip'", text[:40])
        return first == ["keep"]


@dataclass(frozen=True)
class CarefulAgent(MemAgent):
    """MemAgent with a filter turn before every write turn. Its options are MemAgent's and these two."""

    filter_prompt: str = (
        "Question: {question}\nSection:\n{chunk}\n"
        "Does the section help to answer the question? Reply with one word, keep or skip."
    )
    max_filter_tokens: int = 4
    """Token limit of a filter turn."""

    @cached_property
    def filter(self) -> Filter:
        return Filter(self.filter_prompt)

    async def run(self, task: Task, policy: Any, store: TextMemory | None = None) -> Episode:
        memory = store if store is not None else TextMemory()
        episode = Episode(task)
        question = task.probes[0].question

        for index, chunk in enumerate(self.chunks(task, policy)):
            turn, matters = await ask(
                policy,
                self.filter,
                Look(question, chunk),
                max_tokens=self.max_filter_tokens,
                prefix_key=f"{task.id}/filter/{index}",
            )
            turn.memory_before = turn.memory_after = memory.text
            episode.turns.append(turn)
            if matters is False:  # None: the reply could not be used, and then it reads on
                turn.chunk = index  # the turn that settled this chunk: capture and retention count one for each
                continue

            turn, text = await ask(
                policy,
                self.writer,
                WriteState(question, chunk, memory.text),
                max_tokens=self.max_memory_tokens,
                chunk=index,
                prefix_key=f"{task.id}/write/{index}",
            )
            turn.memory_before = memory.text
            if text is not None:
                memory.write(text, turn=len(episode.turns))
            turn.memory_after = memory.text
            episode.turns.append(turn)

        turn, answer = await ask(
            policy,
            self.answerer,
            AnswerState(question, memory.text),
            max_tokens=self.max_answer_tokens,
            prefix_key=f"{task.id}/answer",
        )
        turn.memory_before = turn.memory_after = memory.text
        episode.answers.append(Answer(task.probes[0], answer, turn.text, len(episode.turns)))
        episode.turns.append(turn)
        episode.memory = memory.text
        return episode


@dataclass(frozen=True)
class FilteredFactWords(FactWords):
    """The quickstart's tasks, with words and a teacher for the filter. Only the tiny model needs this."""

    def vocabulary(self) -> list[str]:
        return [*super().vocabulary(), "keep", "or", "skip"]

    def teacher(self, task: Task, seed: int) -> Iterator[str]:
        """`keep` and a memory, or `skip`, for each chunk; then the answer. It forgets as its parent does."""
        rng = seeded(self.seed, "filter", seed)
        asked, words, chunk_of = (task.metadata[key] for key in ("asked", "facts", "chunk_of"))
        noted: set[str] = set()
        for chunk in range(len(task.stream)):
            here = {category for category in asked if chunk_of[category] == chunk}
            # one time in five it keeps what does not matter, so that both replies can be explored
            if not here and rng.random() < 0.8:
                yield "skip"
                continue
            yield "keep"
            if rng.random() < self.forget:
                noted.clear()
            noted |= here
            yield " . ".join(f"{c} {words[c]}" for c in asked if c in noted) or "none"
        yield " ".join(f"{category} {words[category] if category in noted else 'none'}" for category in asked)

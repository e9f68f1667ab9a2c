"""Baselines of an agent: the same model, the same answering module, another way to what it answers from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Protocol

from memfactory.agents.asking import ask
from memfactory.episode import Answer, Episode, Probe, Retrieved, Task
from memfactory.errors import DataError, EngineError, RecipeError
from memfactory.memory.entries import Entry
from memfactory.policy.base import Policy
from memfactory.recipe import nearest
from memfactory.search.bm25 import BM25Searcher

_TEMPLATE = 64
"""Tokens left for what a chat template puts around a message."""


class Baseline(StrEnum):
    """What the answer is shown in the place of a memory."""

    FULL_CONTEXT = "full_context"
    """Everything there is to read. Where it does not fit the model, its middle is left out."""
    NO_MEMORY = "no_memory"
    """Nothing: what can be known or guessed from the question."""
    BM25 = "bm25"
    """The chunks that BM25 finds for the question."""
    ORACLE = "oracle"
    """The evidence, as the dataset marks it: what a perfect memory would hold."""


def chosen(names: Sequence[str], *, every: bool = False) -> list[Baseline]:
    """The baselines called `names`, or `every` one.

    Raises:
        RecipeError: there is none of a name.
    """
    known = [kind.value for kind in Baseline]
    for name in names:
        if name not in known:
            raise RecipeError(f"--baseline {name}: there is none", "", nearest(name, known))
    return [kind for kind in Baseline if every or kind.value in names]


class Answering(Protocol):
    """An agent whose answering module can be asked on its own."""

    answerer: Any
    max_answer_tokens: int

    def answer_state(self, task: Task, probe: Probe, texts: Sequence[str]) -> Any:
        """What `answerer` sees when `texts` are all there is, best first."""
        ...

    def chunks(self, task: Task, policy: Policy) -> list[str]: ...


@dataclass(frozen=True)
class BaselineAgent:
    """Answers the questions of a task from texts that no memory chose; one turn for each question."""

    agent: Any
    """Whose answering module is asked, see :class:`Answering`."""
    kind: Baseline
    k: int = 5
    """Chunks that BM25 finds; fewer where they do not fit the model."""

    def __post_init__(self) -> None:
        if not hasattr(self.agent, "answer_state"):
            raise RecipeError(
                f"baselines: {type(self.agent).__name__} has no `answer_state`",
                "a baseline asks the agent's own answering module",
                "give the agent `answer_state(task, probe, texts)`, or leave out --baselines and --baseline",
            )

    @property
    def modules(self) -> list[Any]:
        return [self.agent.answerer]

    async def run(self, task: Task, policy: Policy, store: Any = None) -> Episode:
        """See :meth:`memfactory.agents.base.Agent.run`.

        Raises:
            DataError: the evidence is wanted and the task names none.
            EngineError: not even the question fits the model.
        """
        episode = Episode(task)
        for number, probe in enumerate(task.probes):
            texts = self._fitting(task, probe, self._texts(task, probe, policy), policy)
            turn, reply = await ask(
                policy,
                self.agent.answerer,
                self.agent.answer_state(task, probe, texts),
                max_tokens=self.agent.max_answer_tokens,
                prefix_key=f"{task.id}/answer/{number}",
            )
            turn.retrieved = [Retrieved(f"e{place}", text) for place, text in enumerate(texts, 1)]
            text = getattr(reply, "text", reply)
            episode.answers.append(Answer(probe, text, turn.text, len(episode.turns)))
            episode.turns.append(turn)
        return episode

    def _texts(self, task: Task, probe: Probe, policy: Policy) -> list[str]:
        read = task.stream if probe.after is None else task.stream[: max(probe.after, 0)]
        if self.kind is Baseline.NO_MEMORY:
            return []
        if self.kind is Baseline.FULL_CONTEXT:
            return list(read)
        if self.kind is Baseline.ORACLE:
            if not probe.evidence:
                raise DataError(
                    f"task {task.id}", "its dataset marks no evidence", "leave the task out, see `answerable`"
                )
            return list(dict.fromkeys(evidence.text for evidence in probe.evidence))
        pieces = list(read)
        cut = getattr(self.agent, "chunk_tokens", None)
        if cut is not None:
            pieces = [piece for text in pieces for piece in policy.split(text, cut)]
        searcher = BM25Searcher(task.id)
        searcher.put(Entry(str(place), text, owner=task.id) for place, text in enumerate(pieces))
        return [hit.entry.text for hit in searcher.search(probe.question, self.k)]

    def _fitting(self, task: Task, probe: Probe, texts: list[str], policy: Policy) -> list[str]:
        """As much of `texts` as the model takes beside the question and its answer."""
        limit = getattr(policy, "max_positions", None)
        if limit is None or not texts:
            return texts
        asked = self.agent.answerer.render(self.agent.answer_state(task, probe, [""]))
        around = sum(len(policy.split(message["content"], 1)) for message in asked) + _TEMPLATE
        room = limit - self.agent.max_answer_tokens - around
        if room <= 0:
            raise EngineError(
                f"task {task.id}: the question does not fit the model",
                f"{around} tokens and an answer of up to {self.agent.max_answer_tokens}, of {limit} positions",
                "lower agent.max_answer_tokens",
            )
        if self.kind is Baseline.FULL_CONTEXT:
            return [_without_middle("\n".join(texts), room, policy)]
        kept: list[str] = []
        for text in texts:
            room -= len(policy.split(text, 1)) + 8  # ids and separators around an entry
            if room < 0:
                break
            kept.append(text)
        return kept


def answerable(kind: Baseline, tasks: Sequence[Task]) -> list[Task]:
    """`tasks` with those of their questions that `kind` has something to answer from; a task without one is left out.

    The evidence is there where the dataset marks it, the whole and what BM25 finds where there is something to read.
    """
    if kind is Baseline.NO_MEMORY:
        return list(tasks)
    if kind is not Baseline.ORACLE:
        return [task for task in tasks if task.stream]
    found = []
    for task in tasks:
        probes = tuple(probe for probe in task.probes if probe.evidence)
        if probes:
            found.append(task if len(probes) == len(task.probes) else replace(task, probes=probes))
    return found


def _without_middle(text: str, room: int, policy: Policy) -> str:
    """`text` cut to `room` tokens: its beginning and its end."""
    tokens = policy.split(text, 1)
    if len(tokens) <= room:
        return text
    head = room // 2
    return "".join(tokens[:head]) + "".join(tokens[len(tokens) - (room - head) :])

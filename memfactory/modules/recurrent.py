"""Recurrent memory: rewrite the whole memory after each chunk (MemAgent, arXiv 2507.02259, sec. 3)."""

from __future__ import annotations

from dataclasses import dataclass

from memfactory.episode import Message
from memfactory.modules.parsing import strip_reasoning
from memfactory.modules.prompts import PromptSet


@dataclass(frozen=True, slots=True)
class WriteState:
    """What a rewrite sees: the question, one chunk, and the memory so far."""

    question: str
    chunk: str
    memory: str


@dataclass(frozen=True, slots=True)
class RecurrentMemory:
    """Renders (question, memory, chunk) and takes the whole reply as the new memory."""

    prompts: PromptSet
    name: str = "write"

    def render(self, state: WriteState) -> list[Message]:
        content = self.prompts.render_write(question=state.question, memory=state.memory, chunk=state.chunk)
        return [{"role": "user", "content": content}]

    def parse(self, text: str) -> str:
        """The new memory: the reply without its reasoning block.

        An empty reply is a legal, if bad, memory: the policy chose to forget.

        Raises:
            ModelOutputError: a reasoning block was opened and never closed, so there is no reply.
        """
        return strip_reasoning(text)

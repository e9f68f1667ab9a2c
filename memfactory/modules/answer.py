"""The final answer, from question and memory alone."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from memfactory.episode import Message
from memfactory.errors import ModelOutputError
from memfactory.modules.parsing import last_boxed, strip_reasoning
from memfactory.modules.prompts import PromptSet


class AnswerFormat(StrEnum):
    """How an answer is marked in the reply."""

    BOXED = "boxed"
    r"""The last ``\boxed{...}`` in the last 300 characters (MemAgent's rule)."""
    PLAIN = "plain"
    """The whole reply."""


@dataclass(frozen=True, slots=True)
class AnswerState:
    """What the answer sees."""

    question: str
    memory: str


@dataclass(frozen=True, slots=True)
class FinalAnswer:
    """Renders (question, memory) and extracts the answer from the reply."""

    prompts: PromptSet
    format: AnswerFormat = AnswerFormat.BOXED
    name: str = "answer"

    def render(self, state: AnswerState) -> list[Message]:
        return [{"role": "user", "content": self.prompts.render_answer(question=state.question, memory=state.memory)}]

    def parse(self, text: str) -> str:
        """The answer as written.

        Raises:
            ModelOutputError: the reply is all reasoning, empty, or has no closed box where one is asked for.
        """
        reply = strip_reasoning(text)
        if self.format is AnswerFormat.PLAIN:
            if not reply:
                raise ModelOutputError("the reply is empty")
            return reply
        boxed = last_boxed(reply)
        if boxed is None:
            raise ModelOutputError("the reply holds no closed \\boxed{...} in its last 300 characters")
        return boxed

"""Prompt sets: the words around question, chunk and memory, in the paper's order or a shared one.

``paper`` is MemAgent's order: question, memory, then the chunk. Members of a group differ from the
memory on, so nothing after it can be shared. ``shared`` puts what the group has in common first
(instructions, question, chunk) and the memory last, so one prefix serves the whole group in
generation and in training.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import jinja2

from memfactory.errors import RecipeError
from memfactory.modules.base import JINJA


class PromptOrder(StrEnum):
    """Where the memory stands in the prompt."""

    PAPER = "paper"
    SHARED = "shared"


@dataclass(frozen=True)
class PromptSet:
    """Templates (Jinja) of one agent. Variables: `question`, `memory`, and `chunk` in `write`."""

    write: str
    """Prompt of a memory rewrite."""
    answer: str
    """Prompt of the final answer: the question and the memory alone."""
    empty_memory: str
    """What stands in the memory's place before the first write."""

    @cached_property
    def _compiled(self) -> dict[str, jinja2.Template]:
        return {"write": JINJA.from_string(self.write), "answer": JINJA.from_string(self.answer)}

    def render_write(self, *, question: str, memory: str, chunk: str) -> str:
        return self._compiled["write"].render(question=question, memory=memory or self.empty_memory, chunk=chunk)

    def render_answer(self, *, question: str, memory: str) -> str:
        return self._compiled["answer"].render(question=question, memory=memory or self.empty_memory)


_DOCUMENT_INTRO = (
    "You are reading a long document one section at a time to answer a question at the end. You see "
    "each section once; only your notes are kept. Rewrite the notes: keep everything in them that "
    "still matters and add what this section says that helps to answer the question.\n"
)
_DOCUMENT_ANSWER = (
    "You have read a long document section by section and kept notes. Answer the question from the "
    "notes alone and put the answer in \\boxed{}.\n"
    "<question>{{ question }}</question>\n<notes>\n{{ memory }}\n</notes>\nAnswer:"
)

_SENTENCE_WRITE = "Copy the one sentence from the notes or the text that answers the question."
_SENTENCE_ANSWER = "Answer with one short sentence."

PROMPT_SETS: dict[str, dict[PromptOrder, PromptSet]] = {
    # For instruction-tuned models; the answer is boxed, as MemAgent's verifier expects.
    "document": {
        PromptOrder.PAPER: PromptSet(
            write=_DOCUMENT_INTRO
            + "<question>{{ question }}</question>\n<notes>\n{{ memory }}\n</notes>\n"
            + "<section>\n{{ chunk }}\n</section>\nNew notes:",
            answer=_DOCUMENT_ANSWER,
            empty_memory="(nothing yet)",
        ),
        PromptOrder.SHARED: PromptSet(
            write=_DOCUMENT_INTRO
            + "<question>{{ question }}</question>\n<section>\n{{ chunk }}\n</section>\n"
            + "<notes>\n{{ memory }}\n</notes>\nNew notes:",
            answer=_DOCUMENT_ANSWER,
            empty_memory="(nothing yet)",
        ),
    },
    # For small instruction-tuned models: few words, one sentence of notes, a short plain answer.
    "sentence": {
        PromptOrder.PAPER: PromptSet(
            write="Question: {{ question }}\nNotes: {{ memory }}\nText: {{ chunk }}\n" + _SENTENCE_WRITE,
            answer="Notes: {{ memory }}\nQuestion: {{ question }}\n" + _SENTENCE_ANSWER,
            empty_memory="nothing",
        ),
        PromptOrder.SHARED: PromptSet(
            write="Question: {{ question }}\nText: {{ chunk }}\nNotes: {{ memory }}\n" + _SENTENCE_WRITE,
            answer="Notes: {{ memory }}\nQuestion: {{ question }}\n" + _SENTENCE_ANSWER,
            empty_memory="nothing",
        ),
    },
    # For the word-level quickstart model.
    "words": {
        PromptOrder.PAPER: PromptSet(
            write="question : {{ question }} memory : {{ memory }} section : {{ chunk }} write memory",
            answer="question : {{ question }} memory : {{ memory }} write answer",
            empty_memory="none",
        ),
        PromptOrder.SHARED: PromptSet(
            write="question : {{ question }} section : {{ chunk }} memory : {{ memory }} write memory",
            answer="question : {{ question }} memory : {{ memory }} write answer",
            empty_memory="none",
        ),
    },
}


def prompt_set(name: str, order: PromptOrder | str) -> PromptSet:
    """The prompt set `name` in `order`.

    Raises:
        RecipeError: no such set; the message names those that exist.
    """
    if name not in PROMPT_SETS:
        raise RecipeError(
            f"agent.prompt: no prompt set is called '{name}'", "", f"choose one of {', '.join(sorted(PROMPT_SETS))}"
        )
    return PROMPT_SETS[name][PromptOrder(order)]

"""Memory operations that agents are composed of. Each renders and parses; none does I/O."""

from memfactory.modules.answer import AnswerFormat, AnswerState, FinalAnswer
from memfactory.modules.base import WRITERS, Module
from memfactory.modules.parsing import last_boxed, strip_reasoning
from memfactory.modules.prompts import PROMPT_SETS, PromptOrder, PromptSet, prompt_set
from memfactory.modules.recurrent import RecurrentMemory, WriteState

__all__ = [
    "PROMPT_SETS",
    "WRITERS",
    "AnswerFormat",
    "AnswerState",
    "FinalAnswer",
    "Module",
    "PromptOrder",
    "PromptSet",
    "RecurrentMemory",
    "WriteState",
    "last_boxed",
    "prompt_set",
    "strip_reasoning",
]

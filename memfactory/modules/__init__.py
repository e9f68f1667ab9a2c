"""Memory operations that agents are composed of. Each renders and parses; none does I/O."""

from memfactory.modules.answer import AnswerFormat, AnswerState, FinalAnswer
from memfactory.modules.base import WRITERS, Module, Rule, Teachable
from memfactory.modules.entry_answer import EntriesState, Reply
from memfactory.modules.facts import Fact, ReadState
from memfactory.modules.kinds import KINDS, build_module
from memfactory.modules.parsing import last_boxed, strip_reasoning
from memfactory.modules.prompts import PROMPT_SETS, PromptOrder, PromptSet, prompt_set
from memfactory.modules.recurrent import RecurrentMemory, WriteState
from memfactory.modules.rerank import ChooseState
from memfactory.modules.updates import UpdateState

__all__ = [
    "KINDS",
    "PROMPT_SETS",
    "WRITERS",
    "AnswerFormat",
    "AnswerState",
    "ChooseState",
    "EntriesState",
    "Fact",
    "FinalAnswer",
    "Module",
    "PromptOrder",
    "PromptSet",
    "ReadState",
    "RecurrentMemory",
    "Reply",
    "Rule",
    "Teachable",
    "UpdateState",
    "WriteState",
    "build_module",
    "last_boxed",
    "prompt_set",
    "strip_reasoning",
]

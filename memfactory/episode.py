"""The records: what one episode of a memory agent is, from task to credit.

Read this file first; the rest of the library can be predicted from it. An environment makes a
:class:`Task`. An agent runs it against a policy and returns an :class:`Episode` made of
:class:`Turn` s. Reward dimensions put a :class:`Score` on the episode, credit puts an advantage on
each turn, and only then are rows for the trainer cut.

Tokens are the record, text is a view of it: ``prompt_ids``, ``completion_ids`` and ``logprobs`` come
from the sampler and nothing downstream tokenises again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

Message = dict[str, str]
"""One chat message, ``{"role": ..., "content": ...}``, as chat templates take it."""


class StopReason(StrEnum):
    """Why a turn ended. Logged as shares per step, because a silent cut poisons an episode."""

    STOP = "stop"
    """The model ended its turn itself (an end-of-sequence token, which is part of the completion)."""
    LENGTH = "length"
    """The turn reached its token limit; no end-of-sequence token is in the completion."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """A span of the stream that a probe depends on: used to measure capture and retention."""

    text: str
    chunk: int
    """Index into :attr:`Task.stream` of the chunk that holds `text`; below 0 where it stands in the memory that the
    task begins with."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A question, every accepted answer (aliases), and where the answer stands in the stream."""

    question: str
    answers: tuple[str, ...]
    evidence: tuple[Evidence, ...] = ()
    category: str = ""
    """Kind of question, as its dataset writes it (LoCoMo: ``1`` to ``5``); empty where there are no kinds."""
    after: int | None = None
    """Asked once this many chunks of the stream have been read; None: after the last one."""


@dataclass(frozen=True, slots=True)
class Task:
    """One problem: a stream read piece by piece, and questions asked afterwards.

    `stream` holds chunks that the environment cut, or one whole document, which an agent with
    ``chunk_tokens`` cuts by the policy's own tokenizer.
    """

    id: str
    stream: tuple[str, ...]
    probes: tuple[Probe, ...]
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Score:
    """What a reward dimension measured: a value, or None with the reason it could not be measured.

    None is not zero: a failed measurement must not look like a bad answer.
    """

    value: float | None
    reason: str = ""

    def __post_init__(self) -> None:
        if self.value is None and not self.reason:
            raise ValueError("a Score without a value needs a reason, e.g. Score(None, 'judge timed out')")
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"a Score must be finite, got {self.value}; return None with a reason instead")


@dataclass(frozen=True, slots=True)
class Operation:
    """One change of the memory that a module asked for, e.g. ADD or UPDATE."""

    verb: str
    target: str = ""
    """Id of the entry it changes; empty where it makes a new one."""
    text: str = ""
    key: str = ""
    tags: tuple[str, ...] = ()
    time: str = ""
    """When what it says was said or true, as ISO 8601; empty where unknown."""
    error: str = ""
    """Why it could not be carried out; empty when it was."""


@dataclass(frozen=True, slots=True)
class Retrieved:
    """One entry that a turn was shown from memory."""

    id: str
    text: str
    turn: int | None = None
    """Index in the episode of the turn that wrote it; None where no turn of this episode did."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A draw of some candidates by a small model that is no language model, e.g. the linear reranker."""

    candidates: tuple[str, ...]
    """Ids of the entries it chose from."""
    chosen: tuple[int, ...]
    """Places in `candidates`, in the order in which they were drawn."""
    logprob: float
    """Of this draw, given its noise; nan where nothing was drawn by chance."""
    features: Any = None
    """What its learner needs to compute the gradient. Kept in memory for the update, written to no file."""


@dataclass(slots=True)
class Turn:
    """One decision of the policy: exactly what it saw, exactly what it sampled."""

    module: str
    """Name of the memory operation that asked, e.g. ``write`` or ``answer``."""
    prompt_ids: list[int]
    completion_ids: list[int]
    """Sampled ids, including the end-of-sequence token when `stop` is ``STOP``."""
    logprobs: list[float]
    """Log-probability of each completion id at the sampling temperature, before top-k/top-p/min-p."""
    text: str
    """The completion decoded without special tokens: a view for parsing, never trained on."""
    stop: StopReason
    messages: list[Message] = field(default_factory=list)
    """The prompt as messages: a view for the report."""
    policy_version: int = 0
    """Optimizer steps behind the weights that sampled this turn."""
    trainable: bool = True
    prefix_key: str = ""
    """Turns of a group with the same key were prompted with the same instructions, question and
    chunk, so their prompts may share a prefix (see ``Row.shared_prefix``)."""
    chunk: int | None = None
    """Index of the chunk this turn read; None for a turn that reads no chunk."""
    memory_before: str = ""
    memory_after: str = ""
    error: str = ""
    """Why the module could not use the text; empty when it could."""
    operations: list[Operation] = field(default_factory=list)
    """What the text asked the memory to do, for modules that edit entries."""
    retrieved: list[Retrieved] = field(default_factory=list)
    """Entries the prompt showed, best first."""
    cited: list[str] = field(default_factory=list)
    """Ids of the entries that the text says it used."""
    choice: Choice | None = None
    """The draw behind this turn where no language model made it; such a turn has no tokens and gives no row."""
    scores: dict[str, Score] = field(default_factory=dict)
    """Scores of the dimensions with scope turn or module that speak about this turn."""
    advantage: float = 0.0
    """Credit of this turn, set by the credit assigner before rows exist."""
    counts: tuple[int, int] | None = None
    """Prompt and completion tokens of a turn whose ids are not here: an endpoint's, or one read from a file."""

    @property
    def tokens(self) -> tuple[int, int]:
        """How many tokens prompt and completion have."""
        return self.counts if self.counts is not None else (len(self.prompt_ids), len(self.completion_ids))


@dataclass(slots=True)
class Answer:
    """The answer to one probe. `text` is None when nothing in the output could be taken as one."""

    probe: Probe
    text: str | None
    raw: str = ""
    turn: int | None = None
    """Index in the episode of the turn that gave it; None where it is not recorded."""


@dataclass(slots=True)
class Episode:
    """One run of an agent over a task: the unit of credit.

    Group statistics, weights and metrics count episodes, never turns or rows.
    """

    task: Task
    turns: list[Turn] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    memory: str = ""
    """Final memory as text."""
    id: str = ""
    group: str = ""
    """Episodes of one group answer the same task and are compared with each other."""
    scores: dict[str, Score] = field(default_factory=dict)
    """Every dimension by name; for one that scores turns, the mean over the turns it speaks about."""
    reward: float | None = None
    """Aggregated reward; None when it could not be measured, and then it is in no baseline."""
    advantage: float = 0.0
    failed: str = ""
    """Why it could not be run to its end, ``FAULT: message``: a service or a store failed. Empty where it was. Such an
    episode has no turns, is in no statistic and trains nothing."""
    snapshots: dict[int, Any] = field(default_factory=dict)
    """State of the store before each chunk was read, by its index, to run on from there; written to no file."""

    @property
    def answer(self) -> Answer | None:
        """The answer to the first probe, the only one in single-question tasks."""
        return self.answers[0] if self.answers else None

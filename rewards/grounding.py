"""Rewards on faithfulness: does the memory say only what was read?

The rules compare words: an unsupported word is a strong sign of an invented fact, but words in a new order can say
something new, and a true paraphrase counts against the memory. `supported_judge` reads the meaning.
"""

from collections.abc import Mapping

from memfactory import Episode, Score, Turn, reward
from memfactory.modules import WRITERS
from memfactory.reward import matching
from memfactory.reward.judge import Judge, Rubric


@reward(role="gate")
def supported(episode: Episode) -> float:
    """|words of the final memory that occur in the stream or a question| / |words of it|, in [0, 1].

    Distinct content words: repeating a supported word does not hide an invented one. 0 for a memory without any.
    Source: the groundedness gate of SearchLLM (arXiv 2603.10473, section 3.2), as a word rule of our own.
    Gaming: copy the text, or the question. As a gate it asks for nothing else; `memory.within_budget` and
    `memory.evidence_recall` see to the rest.
    """
    return matching.support(episode.memory, [*episode.task.stream, _questions(episode)]) or 0.0


@reward(module=WRITERS)
def supported_writes(episode: Episode, turn: Turn) -> float:
    """|new words that occur in this turn's chunk or a question| / |new words|, in [0, 1].

    New are the distinct content words of the memory after the turn that it did not hold before. 1 where a memory stays
    without new words, 0 for a memory without content words. Where an agent cuts its own chunks, the whole stream
    stands in for the chunk. For the turns of modules that write memory, and on those turns alone.
    Gaming: add nothing, or copy the chunk. Where there is nothing to note yet, any copied word beats an empty memory:
    keep the weight small. An invention counts against the turn that wrote it, not against those that keep it.
    """
    before, after = set(matching.content_words(turn.memory_before)), set(matching.content_words(turn.memory_after))
    if not after:
        return 0.0
    share = matching.support(" ".join(after - before), [*_read(episode, turn), _questions(episode)])
    return 1.0 if share is None else share


def _by_words(fields: Mapping[str, str]) -> float | None:
    share = matching.support(fields["memory"], [fields["source"], fields["question"]])
    return None if share is None else float(share == 1.0)


SUPPORTED = Rubric(
    name="memory-supported",
    version="1",
    instructions=(
        "The memory is notes that somebody took while reading the source, in order to answer the question. Compare it "
        "with the source. Answer yes if every statement of the memory follows from the source, in whatever words. "
        "Answer no if it states anything that the source does not say or contradicts. What the memory leaves out does "
        "not matter."
    ),
    labels={"yes": 1.0, "no": 0.0},
    rule=_by_words,
)


@reward(role="gate")
async def supported_judge(episode: Episode, *, judge: Judge) -> Score:
    """1 if a judge finds that every statement of the final memory follows from the stream, else 0; 0 if it is empty.

    Without an endpoint the rubric's rule stands in: 1 if every content word is supported (see `supported`). A judge
    that fails gives None, and a gate without a value fails closed.
    Source: hallucination judges of SearchLLM (arXiv 2603.10473, section 3.2).
    Gaming: say less, down to one safe word. Put `memory.evidence_recall` or an answer reward beside it.
    """
    if not episode.memory.strip():
        return Score(0.0, "the memory is empty")
    source = "\n".join(episode.task.stream)
    return await judge.grade(SUPPORTED, memory=episode.memory, source=source, question=_questions(episode))


def _questions(episode: Episode) -> str:
    return "\n".join(probe.question for probe in episode.task.probes)


def _read(episode: Episode, turn: Turn) -> tuple[str, ...]:
    """What `turn` read, or the whole stream where turns did not read the stream's own pieces one by one."""
    stream = episode.task.stream
    chunks = {own.chunk for own in episode.turns if own.chunk is not None}
    if turn.chunk is not None and chunks == set(range(len(stream))):
        return (stream[turn.chunk],)
    return stream

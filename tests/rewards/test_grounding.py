"""Rewards on faithfulness: what is written must have been read."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfactory import Episode, Probe, Score, StopReason, Task, Turn
from memfactory.errors import JudgeError
from memfactory.reward.catalogue import load_dimension
from memfactory.reward.judge import RuleJudge

STREAM = ("The code of Leo is 25.", "Mia moved to Rome in 1,999. The mill is not open.")


def episode(memory="", memories=(), chunks=None, stream=STREAM, question="Where does Mia live?"):
    turns = [
        Turn("write", [], [], [], text, StopReason.STOP, chunk=i if chunks is None else chunks[i], memory_after=text)
        for i, text in enumerate(memories)
    ]
    for earlier, later in pairwise(turns):
        later.memory_before = earlier.memory_after
    return Episode(Task("t", tuple(stream), (Probe(question, ("Rome",)),)), turns, memory=memory)


def supported(memory, **options):
    return load_dimension("grounding.supported").function(episode(memory, **options))


def writes(one):
    dimension = load_dimension("grounding.supported_writes")
    return [dimension.function(one, turn) for turn in one.turns if dimension.speaks_about(turn)]


@pytest.mark.parametrize(
    ("memory", "value"),
    [
        ("", 0),
        ("the of and", 0),  # says nothing
        ("Leo: 25", 1),
        ("Leo's code is 25, Mia lives in Rome", 5 / 6),  # leo code 25 mia rome; not lives
        ("Mia lives in Rome live", 3 / 4),  # live is in the question
        ("Leo: 26", 1 / 2),
        ("Leo Leo Leo Leo: 26", 1 / 2),  # repeating the true part hides nothing
        ("the mill is open", 1),
        ("1999", 1),
        ("25.5", 0),
        ("none", 0),
    ],
)
def test_supported(memory, value):
    assert supported(memory) == pytest.approx(value)


def test_negations_are_content():
    assert supported("not open", stream=("The mill is open.",)) == 0.5
    assert supported("not open") == 1


def test_words_are_found_without_spaces():
    assert supported("北京", stream=("我住在北京。",)) == 1
    assert supported("东京", stream=("我住在北京。",)) == 0.5


WORDS = st.lists(st.sampled_from("leo mia code rome 25 paris 99 the is".split()), max_size=10)


@given(WORDS, st.randoms())
def test_word_order_and_repetition_do_not_matter(words, rng):
    value = supported(" ".join(words))
    shuffled = words * 2
    rng.shuffle(shuffled)
    assert supported(" ".join(shuffled)) == value
    assert 0 <= value <= 1


@given(WORDS)
def test_an_invented_word_costs_and_reading_more_never_does(words):
    memory = " ".join(words)
    if supported(memory) > 0:
        assert supported(f"{memory} zanzibar") < supported(memory)
    assert supported(memory, stream=(*STREAM, "Paris 99")) >= supported(memory)


def test_writes_are_compared_with_their_own_chunk():
    one = episode(memories=("Leo 25 Rome", "Leo 25 Rome", "Leo 25 Rome Mia", ""), stream=(*STREAM, "Nothing.", "End."))
    # Rome is two chunks too early; then nothing new; Mia is in the question; then all is forgotten
    assert writes(one) == pytest.approx([2 / 3, 1, 1, 0])
    assert writes(episode(memories=("Leo 25", "Leo 25 Rome"))) == [1, 1]


def test_an_agent_that_cuts_its_own_chunks_is_compared_with_the_whole_stream():
    assert writes(episode(memories=("Leo Rome",), chunks=[0])) == [1]  # one turn on a stream of two
    assert writes(episode(memories=("Leo Rome", "Leo Rome Paris"), chunks=[5, 9])) == [1, 0]
    assert writes(episode(memories=("Leo Rome", "Leo Rome"), chunks=[0, 1])) == [0.5, 1]


def test_turns_that_do_not_write_are_left_alone():
    one = episode(memories=("Leo",), stream=STREAM[:1])
    one.turns.append(Turn("answer", [], [], [], "Paris", StopReason.STOP, memory_before="Leo", memory_after="Leo"))
    dimension = load_dimension("grounding.supported_writes")
    assert dimension(one).value == 1
    assert "supported_writes" not in one.turns[-1].scores


# ---- the judge ---------------------------------------------------------------------------------


def judged(memory, judge):
    dimension = load_dimension("grounding.supported_judge").supply({"judge": judge})
    return asyncio.run(dimension.function(episode(memory)))


class Recording:
    """A judge that says yes, and what it was asked."""

    def __init__(self, error=None):
        self.asked = []
        self.error = error

    async def grade(self, rubric, /, **fields):
        self.asked.append((rubric.name, fields))
        if self.error:
            raise self.error
        return Score(1.0, "yes")


@pytest.mark.parametrize(("memory", "value"), [("Leo: 25", 1), ("Leo: 26", 0), ("", 0), ("Mia lives in Rome", 0)])
def test_without_an_endpoint_the_rule_grades(memory, value):
    assert judged(memory, RuleJudge()).value == value


def test_the_rule_cannot_tell_about_words_without_content():
    assert judged("of the", RuleJudge()).value is None


def test_the_judge_sees_memory_source_and_question_and_an_empty_memory_asks_nothing():
    judge = Recording()
    assert judged("anything", judge).value == 1
    [(name, fields)] = judge.asked
    assert name == "memory-supported"
    assert fields == {"memory": "anything", "source": "\n".join(STREAM), "question": "Where does Mia live?"}
    assert judged(" \n", judge).value == 0
    assert len(judge.asked) == 1


def test_a_judge_that_fails_is_no_verdict():
    error = JudgeError("judge", "timed out", "wait")
    with pytest.raises(JudgeError, match="timed out"):
        judged("anything", Recording(error))

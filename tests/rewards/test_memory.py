"""Rewards on the memory: what it holds, and how well it is kept."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfactory import Episode, Evidence, Probe, Score, StopReason, Task, Turn
from memfactory.reward.catalogue import load_dimension

FACTS = ("The code of Leo is 25.", "Mia lives in Rome", "25")
STREAM = ("one two three four five six seven eight nine ten", "eleven twelve thirteen fourteen fifteen")


def episode(memory="", facts=FACTS, stream=STREAM, memories=(), tokens=()):
    evidence = tuple(Evidence(text, 0) for text in facts)
    turns = [
        Turn("write", [1], [7] * (tokens[i] if tokens else 0), [], text, StopReason.STOP, chunk=i, memory_after=text)
        for i, text in enumerate(memories)
    ]
    for earlier, later in pairwise(turns):
        later.memory_before = earlier.memory_after
    return Episode(Task("t", tuple(stream), (Probe("?", ("25",), evidence),)), turns, memory=memory)


def score(name, one, *turns, **options):
    result = load_dimension(f"memory.{name}").function(one, *turns, **options)
    return result.value if isinstance(result, Score) else result


WORDS = st.lists(st.sampled_from("leo mia code rome 25 lives of in is the".split()), max_size=12).map(" ".join)

# ---- evidence ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memory", "value"),
    [
        ("", 0),
        ("25", 1 / 3),
        ("Leo: 25. mia LIVES in Rome!", 2 / 3),
        ("the code of leo is 25; Mia lives in Rome", 1),
        ("125 252", 0),  # whole words
        ("Leo's code is 25", 1 / 3),  # evidence is compared as text
    ],
)
def test_evidence_recall(memory, value):
    assert score("evidence_recall", episode(memory)) == pytest.approx(value)


def test_no_evidence_is_no_zero():
    for facts in ((), ("...",)):
        one = episode("anything", facts=facts, memories=("a",))
        for result in (
            load_dimension("memory.evidence_recall").function(one),
            load_dimension("memory.evidence_held").function(one, one.turns[0]),
        ):
            assert result.value is None
            assert "no evidence" in result.reason


@given(st.permutations(FACTS), WORDS)
def test_the_order_and_repetition_of_evidence_do_not_matter(facts, memory):
    expected = score("evidence_recall", episode(memory))
    assert score("evidence_recall", episode(memory, facts=[*facts, *facts])) == pytest.approx(expected)


@given(WORDS, WORDS)
def test_more_memory_never_holds_less_and_saying_it_twice_adds_nothing(memory, more):
    before = score("evidence_recall", episode(memory))
    assert score("evidence_recall", episode(f"{memory}\n{more}")) >= before
    assert score("evidence_recall", episode(f"{memory} . {memory}", facts=("25", "rome", "leo"))) == score(
        "evidence_recall", episode(memory, facts=("25", "rome", "leo"))
    )


def test_evidence_held_is_a_potential_per_turn():
    one = episode(memories=("25", "25 Mia lives in Rome", "nothing"))
    assert [score("evidence_held", one, turn) for turn in one.turns] == pytest.approx([1 / 3, 2 / 3, 0])
    dimension = load_dimension("memory.evidence_held")
    assert (dimension.role, dimension.scope) == ("shaping", "turn")
    # a turn that does not write keeps what was held: the potential is defined everywhere
    one.turns.append(Turn("answer", [], [], [], "25", StopReason.STOP, memory_after="25"))
    assert dimension(one).value == pytest.approx((1 / 3 + 2 / 3 + 0 + 1 / 3) / 4)


# ---- size --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "value"),
    [(0, 0), (1, 14 / 15), (3, 0.8), (15, 0), (40, 0)],
)
def test_compression(words, value):
    assert score("compression", episode("w " * words)) == pytest.approx(value)


def test_compression_of_nothing_read_is_unknown():
    assert score("compression", episode("x", stream=())) is None


@given(st.integers(1, 50), st.integers(0, 50))
def test_a_longer_memory_never_compresses_better(words, more):
    assert score("compression", episode("w " * (words + more))) <= score("compression", episode("w " * words))


@pytest.mark.parametrize(("words", "value"), [(0, 1), (9, 1), (10, 1), (11, 0.9), (15, 0.5), (20, 0), (100, 0)])
def test_within_budget(words, value):
    assert score("within_budget", episode("w " * words), words=10) == pytest.approx(value)


def test_within_budget_looks_at_the_largest_memory_and_at_tokens():
    assert score("within_budget", episode("w", memories=("w " * 15, "w")), words=10) == 0.5
    long = episode("w", memories=("w", "w"), tokens=(150, 90))
    assert score("within_budget", long, tokens=100) == 0.5
    assert score("within_budget", long, tokens=150) == 1
    assert score("within_budget", episode("w", memories=("w",)), tokens=100) is None  # no tokens in the record
    assert score("within_budget", episode("w"), words=0) == 0
    assert load_dimension("memory.within_budget").role == "gate"


# ---- repetition and change ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memory", "n", "value"),
    [
        ("", 3, 0),
        (" .", 3, 0),
        ("word", 3, 1),
        ("no no", 3, 0.5),
        ("a b a b", 2, 1),  # the article is no word: b b is one 2-gram
        ("x b x b", 2, 2 / 3),  # x b, b x, x b
        ("x y z x y z", 3, 3 / 4),
        ("tool hammer . tool hammer", 3, 0.5),  # its 3-grams are all different, its entries are not
        ("Leo: 25\nMia: 30\nLeo: 25.\nleo 25", 3, 0.5),
        ("one two three four five", 3, 1),
    ],
)
def test_redundancy(memory, n, value):
    assert score("redundancy", episode(memory), n=n) == pytest.approx(value)


@given(WORDS.filter(lambda text: text.replace("the", "").strip()), st.integers(2, 4))
def test_saying_everything_again_never_raises_it(memory, times):
    again = score("redundancy", episode("\n".join([memory] * times)))
    assert again <= min(score("redundancy", episode(memory)), 1 / times)


@pytest.mark.parametrize(
    ("before", "after", "value"),
    [
        ("", "x", 1),  # the first note
        ("", "", 0),
        ("x y", "", 0),
        ("x y", "x y", 1),
        ("x y", "y x", 1),
        ("x y", "p q", 0),
        ("x y", "x y z", 2 / 3),
        ("x x y", "x y y", 2 / 4),  # min 1+1 over max 2+2
        ("Leo: 25", "leo 25!", 1),
    ],
)
def test_churn(before, after, value):
    turn = Turn("write", [], [], [], after, StopReason.STOP, memory_before=before, memory_after=after)
    assert score("churn", episode(), turn) == pytest.approx(value)


@given(WORDS, WORDS, st.randoms())
def test_churn_is_a_symmetric_multiset_jaccard(first, second, rng: random.Random):
    def churn(before, after):
        turn = Turn("write", [], [], [], "", StopReason.STOP, memory_before=before, memory_after=after)
        return score("churn", episode(), turn)

    a, b = ([w for w in text.split() if w != "the"] for text in (first, second))
    if a and b:
        both = sum(min(a.count(w), b.count(w)) for w in set(a + b))
        either = sum(max(a.count(w), b.count(w)) for w in set(a + b))
        assert churn(first, second) == pytest.approx(both / either) == pytest.approx(churn(second, first))
        assert (churn(first, second) == 1) == (Counter(a) == Counter(b))
        rng.shuffle(a)
        assert churn(" ".join(a), second) == churn(first, second)


def test_churn_speaks_about_turns_that_write():
    one = episode(memories=("x y", "x y", "x p"))
    one.turns.append(Turn("answer", [], [], [], "x", StopReason.STOP, memory_before="x p", memory_after="x p"))
    dimension = load_dimension("memory.churn")
    assert dimension(one).value == pytest.approx((1 + 1 + 1 / 3) / 3)
    assert "memory.churn" not in one.turns[-1].scores
    assert one.turns[2].scores["churn"].value == pytest.approx(1 / 3)


@pytest.mark.parametrize("name", ["evidence_recall", "compression", "redundancy"])
def test_an_empty_memory_earns_nothing(name):
    assert score(name, episode("")) == 0

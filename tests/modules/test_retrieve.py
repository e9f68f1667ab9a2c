"""Retrieval from a bank: the index follows it, shares and controls are what they say."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memfactory.episode import Operation
from memfactory.errors import RecipeErrors
from memfactory.memory.bank import EntryBank
from memfactory.modules.retrieve import Control, Retrieval, Retriever

WORDS = "anna leo pet goat town rome job nurse".split()
sentences = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join)
operations = st.one_of(
    st.builds(Operation, st.just("ADD"), st.just(""), sentences),
    st.builds(Operation, st.just("UPDATE"), st.integers(1, 6).map("e{}".format), sentences),
    st.builds(Operation, st.just("DELETE"), st.integers(1, 6).map("e{}".format)),
)


def bank_of(*texts: str, tags: str = "") -> EntryBank:
    """Entries with these texts; `tags` has a letter for each, a blank for none."""
    bank = EntryBank("owner")
    for number, text in enumerate(texts):
        tag = tags[number : number + 1].strip()
        bank.apply(Operation("ADD", text=text, tags=(tag,) if tag else ()))
    return bank


def found(retrieval: Retrieval, question: str, *speakers: str, seed: str = "") -> list[str]:
    return [entry.id for entry in retrieval.answering(question, speakers, seed)]


@given(st.lists(st.lists(operations, max_size=4), max_size=5), sentences)
@settings(max_examples=150)
def test_an_index_that_follows_finds_what_a_new_one_finds(changes: list[list[Operation]], question: str) -> None:
    bank = bank_of("anna pet goat", "leo town rome")
    followed = Retriever(k=3, related=2).open(bank)
    for batch in changes:
        done = [bank.apply(operation) for operation in batch]
        followed.follow(list(dict.fromkeys(one.target for one in done if not one.error)))
        anew = Retriever(k=3, related=2).open(bank)
        assert followed.answering(question) == anew.answering(question)
        assert followed.related([question, "goat"]) == anew.related([question, "goat"])


def test_the_entry_that_says_most_of_the_question_stands_first() -> None:
    bank = bank_of("leo lives in rome", "anna has a goat", "anna lives in oslo")
    assert found(Retriever(k=2).open(bank), "where anna lives") == ["e3", "e1"]
    assert found(Retriever(k=9).open(bank), "quite another thing") == []


def test_related_entries_come_in_rounds_everybodys_best_first() -> None:
    bank = bank_of("goat one", "goat goat two", "rome three", "rome rome four")
    retrieval = Retriever(related=2).open(bank)
    assert [entry.id for entry in retrieval.related(["goat"])] == ["e2", "e1"]
    assert [entry.id for entry in retrieval.related(["rome", "goat"])] == ["e4", "e2", "e3", "e1"]
    assert [entry.id for entry in retrieval.related(["goat", "goat"])] == ["e2", "e1"], "each once"
    assert retrieval.related([]) == ()


# ---- shares of the speakers ----------------------------------------------------------------------


def test_speakers_share_k_equally_and_keep_their_rank() -> None:
    bank = bank_of("goat goat goat", "goat goat x", "goat y z", "goat w v u t", tags="aaab")
    assert found(Retriever(k=2).open(bank), "goat", "a", "b") == ["e1", "e2"]
    shared = Retriever(k=2, per_speaker=True).open(bank)
    assert found(shared, "goat", "a", "b") == ["e1", "e4"]
    assert found(shared, "goat", "a") == ["e1", "e2"], "one speaker has nobody to share with"


def test_entries_of_nobody_fill_what_is_left() -> None:
    bank = bank_of("goat goat goat", "goat goat x", "goat y z", "goat w v u t", tags=" aab")
    assert found(Retriever(k=3, per_speaker=True).open(bank), "goat", "a", "b") == ["e2", "e3", "e4"]
    assert found(Retriever(k=2, per_speaker=True).open(bank_of("goat", "goat x")), "goat", "a", "b") == ["e1", "e2"]


@given(
    st.lists(st.tuples(sentences, st.sampled_from("abc ")), max_size=12),
    st.integers(1, 7),
    st.lists(st.sampled_from("abc"), min_size=2, max_size=3, unique=True),
)
def test_no_speaker_takes_more_than_a_share(said: list[tuple[str, str]], k: int, speakers: list[str]) -> None:
    bank = bank_of(*(text for text, _ in said), tags="".join(who for _, who in said))
    entries = Retriever(k=k, per_speaker=True).open(bank).answering("anna goat rome", speakers)
    everything = Retriever(k=100).open(bank).answering("anna goat rome")
    assert len(entries) <= k
    assert list(entries) == [entry for entry in everything if entry in entries], "best first"
    counts = Counter(tag for entry in entries for tag in entry.tags if tag in speakers)
    assert all(count <= -(-k // len(speakers)) for count in counts.values())
    if len(entries) < k:  # then only a full share, or the end of what was found, kept the rest away
        for entry in everything:
            owner = next((tag for tag in entry.tags if tag in speakers), None)
            assert entry in entries or counts[owner] == -(-k // len(speakers))


# ---- control experiments -------------------------------------------------------------------------


def test_controls_show_nothing_or_anything() -> None:
    bank = bank_of(*(f"entry {number}" for number in range(50)), "anna pet goat")
    assert Retriever(control=Control.EMPTY).open(bank).answering("anna pet") == ()
    random = Retriever(k=5, control=Control.RANDOM).open(bank)
    draws = [found(random, "anna pet", seed=str(seed)) for seed in range(40)]
    assert all(len(set(draw)) == 5 for draw in draws)
    assert found(random, "anna pet", seed="7") == draws[7], "a run can be repeated"
    assert found(random, "anna job", seed="7") != draws[7]
    assert len({id for draw in draws for id in draw}) > 45, "anything may be drawn"
    assert sum("e51" in draw for draw in draws) < 20, "not what would have been found"
    assert len(found(Retriever(k=99, control=Control.RANDOM).open(bank), "x")) == 51
    assert [entry.id for entry in random.related(["goat"])] == ["e51"], "updates search as ever"


def test_wrong_search_options_are_refused_with_the_recipe() -> None:
    with pytest.raises(RecipeErrors, match=r"agent\.retrieve\.search"):
        Retriever(search={"nme": "bm25"})

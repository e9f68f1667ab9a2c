"""What holds for every searcher, with a real embedder."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memfactory.errors import EngineError, StoreError
from memfactory.memory.entries import Change, Entry, Verb
from memfactory.search import (
    BM25Searcher,
    CachedEmbedder,
    DenseSearcher,
    HybridSearcher,
    Searcher,
    build_searcher,
    follow,
    sync,
)

TEXTS = (
    "Anna lives in Lisbon",
    "Anna moved to Porto",
    "Ben has a dog called Rex",
    "the dog of Ben is ill",
    "meeting on Friday",
    "",
    "安娜住在北京",
    "!?",
)
QUERIES = ("Where does Anna live?", "dog", "Friday meeting Anna", "北京")
ODD = (
    "",
    "   ",
    "\x00",
    "\ud800",
    "a\ud83d",
    "'; DROP TABLE",
    "[MASK] </s>",
    "🙂" * 50,
    "word " * 3000,
    "\u202eabc",
    "%s{}",
)

CHANGE = st.one_of(
    st.tuples(st.just("put"), st.lists(st.tuples(st.integers(0, 6), st.sampled_from(TEXTS)), max_size=3)),
    st.tuples(st.just("remove"), st.lists(st.integers(0, 6), max_size=2)),
    st.tuples(st.just("fork"), st.none()),
)


@pytest.fixture(params=["bm25", "dense", "hybrid"])
def empty(request: pytest.FixtureRequest) -> Searcher:
    if request.param == "bm25":
        return build_searcher()
    return build_searcher({"name": request.param}, embedder=request.getfixturevalue("use"))


def _found(searcher: Searcher, k: int = 10) -> list[list[tuple[Entry, float]]]:
    return [[(hit.entry, hit.score) for hit in searcher.search(query, k)] for query in QUERIES]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(CHANGE, max_size=14), k=st.sampled_from([1, 3, 10]))
def test_any_history_equals_an_index_made_afresh(empty: Searcher, changes: list, k: int) -> None:
    searcher, held = empty.fork(), {}
    for verb, what in changes:
        if verb == "put":
            entries = [Entry(str(id), text) for id, text in what]
            searcher.put(entries)
            held |= {entry.id: entry for entry in entries}
        elif verb == "remove":
            searcher.remove([str(id) for id in what])
            for id in what:
                held.pop(str(id), None)
        else:  # what the left behind index suffers must not be seen
            left, searcher = searcher, searcher.fork()
            left.put([Entry("0", "Anna has a dog in 北京"), Entry("9", "Friday")])
            left.remove(["1", "2"])
    fresh = empty.fork()
    fresh.put(held.values())
    assert searcher.entries() == fresh.entries() == list(held.values())
    assert len(searcher) == len(held)
    assert _found(searcher, k) == _found(fresh, k)


def test_an_empty_index_finds_nothing(empty: Searcher) -> None:
    assert empty.search("Anna", 5) == [] == empty.entries()
    empty.remove(["unknown"])
    empty.put([])
    empty.put([Entry("a", "Anna")])
    empty.remove(["a", "a"])
    assert empty.search("Anna", 5) == []
    assert len(empty) == 0


@pytest.mark.parametrize("text", ODD)
def test_any_text_is_an_entry_and_a_query(empty: Searcher, text: str) -> None:
    assert empty.search(text, 3) == []
    empty.put([Entry("a", text), Entry("b", "Anna lives in Lisbon", key=text, tags=(text,))])
    empty.search(text, 3)
    assert "b" in [hit.entry.id for hit in empty.search("Anna Lisbon", 3)]


@pytest.mark.parametrize("k", [0, -1])
def test_no_hits_are_asked_for(empty: Searcher, k: int) -> None:
    empty.put([Entry("a", "Anna")])
    assert empty.search("Anna", k) == []


def test_equal_entries_come_in_their_order(empty: Searcher) -> None:
    ids = [str(i) for i in range(40)]
    empty.put([Entry(id, "Anna lives in Lisbon") for id in ids])
    assert [hit.entry.id for hit in empty.search("Lisbon", 7)] == ids[:7]
    empty.remove(["0", "3"])
    empty.put([Entry("3", "Anna lives in Lisbon"), Entry("1", "Anna lives in Lisbon", turn=5)])
    assert [hit.entry.id for hit in empty.search("Lisbon", 40)] == [*(i for i in ids if i not in ("0", "3")), "3"]


def test_hits_carry_the_entry_as_it_is_now(empty: Searcher) -> None:
    old = Entry("a", "Anna lives in Lisbon", turn=1)
    new = replace(old, text="Anna lives in Porto", turn=2)
    follow(empty, Change(Verb.ADD, None, old, 1))
    follow(empty, Change(Verb.UPDATE, old, new, 2))
    assert [hit.entry for hit in empty.search("Porto", 3)] == [new]
    assert new in [hit.entry for hit in empty.search("Anna", 3)]
    follow(empty, Change(Verb.DELETE, new, None, 3))
    assert empty.search("Porto", 3) == []


def test_forks_do_not_see_each_other(empty: Searcher) -> None:
    empty.put([Entry("a", "Anna lives in Lisbon"), Entry("b", "Ben has a dog")])
    before = _found(empty)
    one, two = empty.fork(), empty.fork()
    one.put([Entry("a", "Anna lives on the moon"), Entry("c", "a dog on Friday")])
    two.remove(["b"])
    two.put([Entry("d", "dog dog dog")])
    assert _found(empty) == before
    assert [entry.id for entry in one.entries()] == ["a", "b", "c"]
    assert [entry.id for entry in two.entries()] == ["a", "d"]
    empty.put([Entry("e", "Friday")])  # the one forked from may change too
    assert len(one) == 3
    assert len(two) == 2


def test_sync_brings_back_a_deleted_entry_in_its_old_place(empty: Searcher) -> None:
    first = [Entry(str(i), "the same") for i in range(5)]
    sync(empty, first)
    empty.remove(["1"])
    empty.put([Entry("7", "the same")])
    sync(empty, first)
    assert empty.entries() == first
    assert [hit.entry.id for hit in empty.search("same", 9)] == ["0", "1", "2", "3", "4"]
    empty.put([Entry("8", "the same")])
    assert [hit.entry.id for hit in empty.search("same", 9)][-1] == "8"


@pytest.mark.parametrize("name", ["bm25", "dense", "hybrid"])
def test_owners_never_mix(name: str, use: CachedEmbedder) -> None:
    anna = build_searcher({"name": name}, owner="anna", embedder=use)
    ben = build_searcher({"name": name}, owner="ben", embedder=use)
    anna.put([Entry("1", "the password is swordfish", owner="anna")])
    ben.put([Entry("1", "the weather is fine", owner="ben")])
    assert [hit.entry.owner for hit in ben.search("password swordfish", 5)] == ([] if name == "bm25" else ["ben"])
    with pytest.raises(StoreError, match="belongs to 'anna', the index to 'ben'"):
        ben.put([Entry("2", "fine", owner="ben"), *anna.entries()])
    with pytest.raises(StoreError, match="belongs to 'anna'"):
        ben.fork().put(anna.entries())
    assert [entry.id for entry in ben.entries()] == ["1"]


def test_a_failing_embedder_leaves_a_hybrid_index_as_it_was(use: CachedEmbedder) -> None:
    class Flaky:
        up = True

        def embed(self, texts: list[str]):
            if not self.up:
                raise ConnectionError("gone")
            return use.embed(texts)

    flaky = Flaky()
    searcher = build_searcher({"name": "hybrid"}, embedder=flaky)
    searcher.put([Entry("a", "Anna lives in Lisbon")])
    flaky.up = False
    with pytest.raises(EngineError, match="ConnectionError: gone"):
        searcher.put([Entry("a", "Anna lives in Porto"), Entry("b", "new")])
    flaky.up = True
    assert [hit.entry.text for hit in searcher.search("Lisbon", 5)] == ["Anna lives in Lisbon"]
    assert len(searcher) == 1


def test_searchers_keep_the_protocol(use: CachedEmbedder) -> None:
    dense = DenseSearcher(use)
    for searcher in (BM25Searcher(), dense, HybridSearcher([dense, BM25Searcher()])):
        assert isinstance(searcher, Searcher)

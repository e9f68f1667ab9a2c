"""`LanceSearcher` with the real LanceDB: it follows a bank, finds what the search in memory finds, and survives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memfactory.episode import Operation
from memfactory.errors import EngineError, StoreError
from memfactory.memory.bank import EntryBank
from memfactory.memory.entries import Entry
from memfactory.search import BM25Searcher, DenseSearcher, Searcher, follow, recall, sync

pytest.importorskip("lancedb", reason="lancedb is not installed: pip install 'memfactory[lancedb]'")
from memfactory.search.lance import LanceSearcher

ROOT = Path(__file__).parents[2]


class Letters:
    """A vector of letter counts: texts are near where they share letters."""

    def __init__(self, width: int = 26) -> None:
        self.width, self.broken = width, False

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        if self.broken:
            raise RuntimeError("away")
        counts = [[text.lower().count(chr(97 + i)) + 0.01 for i in range(self.width)] for text in texts]
        return np.array(counts, dtype=np.float32)


def entry(number: int, text: str, key: str = "", owner: str = "anna", tags: tuple[str, ...] = ()) -> Entry:
    return Entry(f"e{number}", text, key, tags, "2024", owner, 3)


def ids(searcher: LanceSearcher, query: str, k: int = 10) -> list[str]:
    return [hit.entry.id for hit in searcher.search(query, k)]


def test_the_documented_example_runs(
    tmp_path: Path, documented: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(documented("LanceSearcher("), {})


def test_it_is_a_searcher_that_finds_changes_and_forgets(tmp_path: Path) -> None:
    index = LanceSearcher(tmp_path, "anna")
    assert isinstance(index, Searcher)
    assert (len(index), index.entries(), index.search("rome", 5)) == (0, [], [])
    first = [
        entry(1, "lives in Rome", "anna.city", tags=("home",)),
        entry(2, "likes figs"),
        entry(10, "Rome and Rome"),
    ]
    index.put(reversed(first))
    assert index.entries() == first
    assert set(ids(index, "where is rome?")) == {"e1", "e10"}
    assert ids(index, "CITY") == ids(index, "home") == ["e1"]
    assert len(ids(index, "rome", 1)) == 1
    assert index.search("rome", 0) == index.search(" ", 5) == index.search("zebra", 5) == []
    index.put([entry(1, "no more"), entry(1, "lives in Oslo")])
    assert ids(index, "rome") == ["e10"]
    assert ids(index, "oslo") == ["e1"]
    index.remove(["e2", "e99", "x", "e2", "'; DROP TABLE"])
    assert [found.id for found in index.entries()] == ["e1", "e10"]
    index.tidy()
    assert ids(index, "oslo") == ["e1"]
    assert LanceSearcher(tmp_path, "anna").entries() == index.entries(), "it is all on disk"


ODD = "a'; DROP TABLE entries; --|\x00|\ud800|\ud83d\ude00|שלום|\u202e|\U0001f600|%s {x} \" \\ number IN (1) OR true"


def test_owners_share_nothing_whatever_they_are_called(tmp_path: Path) -> None:
    names = ["anna", "Anna", "", ODD, "../anna", "\ud83d\ude00", "\U0001f600", "a\x00b", "x" * 5000, "' OR true --"]
    for name in names:
        LanceSearcher(tmp_path / "index", name).put([entry(1, f"secret of {name[:9]!r}", ODD, name, (ODD,))])
    for name in names:
        index = LanceSearcher(tmp_path / "index", name)
        assert index.entries() == [entry(1, f"secret of {name[:9]!r}", ODD, name, (ODD,))]
        assert [hit.entry.owner for hit in index.search("secret", 10)] == [name]
    assert os.listdir(tmp_path) == ["index"], "no name becomes a path"
    with pytest.raises(StoreError, match="belongs to 'ben'"):
        LanceSearcher(tmp_path / "index", "anna").put([entry(2, "x", owner="ben")])
    with pytest.raises(StoreError, match="no id of a bank"):
        LanceSearcher(tmp_path / "index", "anna").put([Entry("1) OR true --", "x", owner="anna")])
    assert len(LanceSearcher(tmp_path / "index", "anna")) == 1


def test_odd_texts_and_queries_are_data(tmp_path: Path) -> None:
    index = LanceSearcher(tmp_path, "anna", Letters())
    odd = [ODD, "x" * 1_000_000, "\ud800", "\x00", "\ufeff\u200b", " ", " ".join(f"w{i}" for i in range(100_000))]
    kept = [entry(number, text, tags=("", text[:50])) for number, text in enumerate(odd, start=1)]
    index.put(kept)
    assert index.entries() == kept
    for query in (*odd, '"', "(", "a OR b", "words:a", "-a", "a*", "a^2", "+a", "~", "\\", "AND"):
        assert all(hit.entry in kept for hit in index.search(query, 5))
    assert ids(index, "w99999", 1) == ["e7"]


def test_it_follows_a_bank_and_ranks_like_the_search_in_memory(tmp_path: Path) -> None:
    draw, bank, embedder = np.random.default_rng(0), EntryBank("anna"), Letters()
    pool = ["".join(chr(97 + i) for i in draw.integers(0, 26, 6)) for _ in range(150)]
    by_words = LanceSearcher(tmp_path / "words", "anna")
    by_meaning = LanceSearcher(tmp_path / "meaning", "anna", embedder, weights=(0, 1))
    hybrid = LanceSearcher(tmp_path / "both", "anna", embedder)
    bank_of = [Operation("ADD", text=" ".join(pool[i] for i in draw.integers(0, 150, 8))) for _ in range(100)]
    for operation in bank_of:
        bank.apply(operation)
    for index in (by_words, by_meaning, hybrid):
        sync(index, bank.entries())
    for turn, operation in enumerate([Operation("UPDATE", "e7", f"{pool[0]} {pool[1]}"), Operation("DELETE", "e9")]):
        bank.apply(operation, turn=turn)
        for index in (by_words, by_meaning, hybrid):
            follow(index, bank.history(operation.target)[-1])
    words, dense = BM25Searcher("anna"), DenseSearcher(embedder, "anna")
    for index in (by_words, by_meaning, hybrid):
        assert index.entries() == list(bank.entries())
    sync(words, bank.entries())
    sync(dense, bank.entries())
    by_words.tidy()
    agree = []
    for query in (f"{pool[i]} {pool[i + 1]}" for i in range(0, 40, 2)):
        wanted = dense.search(query, 10)
        found = by_meaning.search(query, 10)
        assert [hit.score for hit in found] == pytest.approx([hit.score for hit in wanted], abs=1e-4)
        asked = words.search(query, 1)
        agree.append(recall(asked, by_words.search(query, 1), 1))
        if asked:
            assert asked[0].entry.id in ids(hybrid, query, 10)
    assert np.mean([value for value in agree if value is not None]) > 0.9, "BM25, with other constants"


def test_a_restored_bank_is_followed_without_embedding_again(tmp_path: Path) -> None:
    bank, embedder = EntryBank("anna"), Letters()
    index = LanceSearcher(tmp_path, "anna", embedder)
    for text in ("one", "two", "three"):
        bank.apply(Operation("ADD", text=text))
    sync(index, bank.entries())
    point = bank.snapshot()
    bank.apply(Operation("DELETE", "e1"))
    bank.apply(Operation("UPDATE", "e2", "two b"))
    sync(index, bank.entries())
    bank.restore(point)
    sync(index, bank.entries())
    assert index.entries() == list(bank.entries())
    embedder.broken = True
    sync(index, bank.entries())
    with pytest.raises(EngineError, match="away"):
        index.put([entry(4, "new")])
    assert len(index) == 3, "as it was"


def test_forks_are_independent_and_discarded(tmp_path: Path) -> None:
    for embedder in (None, Letters()):
        index = LanceSearcher(tmp_path / str(embedder is None), "anna", embedder)
        assert len(index.fork()) == 0
        index.put([entry(1, "shared rome")])
        fork = index.fork()
        fork.put([entry(2, "of the fork")])
        index.remove(["e1"])
        assert ids(fork, "rome", 1) == ["e1"]
        assert (len(index), len(fork)) == (0, 2)
        assert len(LanceSearcher(tmp_path / str(embedder is None), "anna", embedder, name=fork.name)) == 2
        fork.discard()
        with pytest.raises(StoreError, match="fix: "):
            fork.search("rome", 1)


def test_another_embedder_or_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LanceSearcher(tmp_path, "anna", Letters())

    class Other(Letters):
        def embed(self, texts: Sequence[str]) -> np.ndarray:
            return super().embed([text[::2] for text in texts])

    for embedder in (Letters(10), Other(), None):
        with pytest.raises(StoreError, match=r"another embedder(.|\n)*fix: (.|\n)*sync"):
            LanceSearcher(tmp_path, "anna", embedder)
    monkeypatch.setattr("memfactory.search.lance.VERSION", "2")
    with pytest.raises(StoreError, match="another version"):
        LanceSearcher(tmp_path, "anna", Letters())
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="fix: "):
        LanceSearcher(tmp_path / "file", "anna")


def test_any_changes_leave_what_the_bank_holds(tmp_path: Path) -> None:
    index = LanceSearcher(tmp_path, "anna")
    texts = st.text(st.characters(), max_size=8)
    changes = st.lists(st.tuples(st.integers(1, 6), st.none() | texts), max_size=8)

    @given(changes)
    @settings(max_examples=15)
    def check(script: list[tuple[int, str | None]]) -> None:
        sync(index, [])
        kept: dict[int, Entry] = {}
        for number, text in script:
            if text is None:
                kept.pop(number, None)
                index.remove([f"e{number}"])
            else:
                kept[number] = entry(number, text, text)
                index.put([kept[number]])
        assert index.entries() == [kept[number] for number in sorted(kept)]
        for text in {text for _, text in script if text}:
            assert all(hit.entry in kept.values() for hit in index.search(text, 3))

    check()


WRITER = """
import sys
from memfactory.memory.entries import Entry
from memfactory.search.lance import LanceSearcher
index = LanceSearcher(sys.argv[1], "anna")
for number in range(int(sys.argv[2]), int(sys.argv[3])):
    index.put([Entry(f"e{number}", f"text {number}", owner="anna")])
    print(number, flush=True)
"""


def writer(folder: Path, first: int, end: int) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WRITER, str(folder), str(first), str(end)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_kill_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    process = writer(tmp_path, 1, 1_000_000)
    assert process.stdout is not None
    seen = [process.stdout.readline() for _ in range(120)]  # past the first tidying
    process.send_signal(signal.SIGKILL)
    seen += process.stdout.read().split()
    assert process.wait() == -signal.SIGKILL
    index = LanceSearcher(tmp_path, "anna")
    found = {found.id for found in index.entries()}
    assert {f"e{int(number)}" for number in seen} <= found
    assert ids(index, "text 100", 1) == ["e100"]
    index.put([entry(1_000_000, "goes on")])
    assert ids(index, "goes on") == ["e1000000"]


def test_two_processes_may_write(tmp_path: Path) -> None:
    LanceSearcher(tmp_path, "anna")
    processes = [writer(tmp_path, 1, 16), writer(tmp_path, 101, 116)]
    done = [process.communicate()[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert len(done[0]) == len(done[1]) == 15
    assert len(LanceSearcher(tmp_path, "anna")) == 30


def test_threads_share_an_index_and_others_see_it_at_once(tmp_path: Path) -> None:
    index, reader, errors = LanceSearcher(tmp_path, "anna", Letters()), list[int](), list[BaseException]()
    other = LanceSearcher(tmp_path, "anna", Letters())

    def work(name: int) -> None:
        try:
            for turn in range(5):
                index.put([entry(1 + name * 5 + turn, f"thread {name}")])
                assert len(other) > 0
                reader.append(len(index.search(f"thread {name}", 3)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(other.entries()) == 40
    assert min(reader) >= 1


def test_an_approximate_index_finds_nearly_all(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    texts = ["".join(chr(97 + i) for i in draw.integers(0, 26, 12)) for _ in range(2000)]
    index = LanceSearcher(tmp_path, "anna", Letters(26), weights=(0, 1))
    index.put(entry(number, text) for number, text in enumerate(texts, start=1))
    exact = [index.search(text, 10) for text in texts[:20]]
    index.approximate()
    found = [index.search(text, 10) for text in texts[:20]]
    shares = [share for a, b in zip(exact, found, strict=True) if (share := recall(a, b, 10)) is not None]
    assert np.mean(shares) > 0.8
    index.put([entry(9999, "qqqqqqqq")])
    assert ids(index, "qqqqqqqq", 1) == ["e9999"]

"""Search in a bank on disk: the same answers as in memory, whatever happens to file, processes and embedder."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memfactory.episode import Operation
from memfactory.errors import EngineError, StoreError
from memfactory.memory.entries import Entry
from memfactory.memory.sqlite import SqliteBank, SqliteStore
from memfactory.search import CachedEmbedder, Hit, build_searcher
from memfactory.search.stored import StoredSearcher

ROOT = Path(__file__).parents[2]
NAMES = ("bm25", "dense", "hybrid")
TEXTS = ("Anna lives in Lisbon", "Anna moved to Porto", "Ben has a dog called Rex", "安娜住在北京", "!?", "figs, figs")
QUERIES = ("Where does Anna live?", "dog", "北京", "figs")
SYNTAX = (
    "'; DROP TABLE vectors; --",
    '" OR 1=1',
    "NEAR(a b)",
    "scope : o1",
    "text : x*",
    "a\x00b",
    "\ud800",
    "%s{}",
    "-a",
    "^",
)


class Counting:
    """Passes texts on and keeps count. Not cached, so that nothing hides what is asked for twice."""

    def __init__(self, embedder: CachedEmbedder) -> None:
        self.embedder, self.asked = embedder, list[str]()

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        self.asked += texts
        return self.embedder.embed(texts)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    with SqliteStore(tmp_path / "bank.db") as store:
        yield store


def add(text: str, key: str = "") -> Operation:
    return Operation("ADD", text=text, key=key)


def found(hits: Sequence[Hit]) -> list[str]:
    return [hit.entry.text for hit in hits]


def in_memory(name: str, entries: Sequence[Entry], owner: str, use: CachedEmbedder, query: str, k: int) -> list[Hit]:
    searcher = build_searcher({"name": name}, owner=owner, embedder=use)
    searcher.put(entries)
    return searcher.search(query, k)


# --- the same as in memory ---------------------------------------------------------------------------------------

STEP = st.one_of(
    st.tuples(st.just("ADD"), st.sampled_from(TEXTS)),
    st.tuples(st.just("UPDATE"), st.integers(1, 6)),
    st.tuples(st.just("DELETE"), st.integers(1, 6)),
    st.tuples(st.just("mark"), st.just(0)),
    st.tuples(st.just("restore"), st.integers(0, 4)),
    st.tuples(st.just("fork"), st.booleans()),
    st.tuples(st.just("search"), st.sampled_from(QUERIES)),
)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEP, max_size=20), owner=st.uuids(), k=st.sampled_from([1, 3, 10]))
def test_after_any_history_it_answers_like_an_index_in_memory(
    store: SqliteStore, use: CachedEmbedder, name: str, steps: list, owner: object, k: int
) -> None:
    bank: SqliteBank = store.bank(str(owner))
    searcher, marks = StoredSearcher(bank, {"name": name}, embedder=use), [bank.snapshot()]
    for turn, (verb, what) in enumerate([*steps, *(("search", query) for query in QUERIES)]):
        if verb == "ADD":
            bank.apply(add(what), turn=turn)
        elif verb == "UPDATE":
            bank.apply(Operation("UPDATE", f"e{what}", TEXTS[turn % len(TEXTS)]), turn=turn)
        elif verb == "DELETE":
            bank.apply(Operation("DELETE", f"e{what}"), turn=turn)
        elif verb == "mark":
            marks.append(bank.snapshot())
        elif verb == "restore":
            bank.restore(marks[what % len(marks)])
        elif verb == "fork":
            left, bank = bank, bank.fork()
            searcher = searcher.fork(bank) if what else StoredSearcher(bank, {"name": name}, embedder=use)
            left.apply(add("Anna has figs in 北京"))
        else:
            assert searcher.search(what, k) == in_memory(name, bank.entries(), bank.owner, use, what, k)
    assert len(searcher) == len(bank)


@pytest.mark.parametrize("name", NAMES)
def test_entries_that_come_back_take_their_old_place(store: SqliteStore, use: CachedEmbedder, name: str) -> None:
    bank = store.bank("anna")
    bank.apply_all([add("the same figs")] * 5)
    point = bank.snapshot()
    searcher = StoredSearcher(bank, {"name": name}, embedder=use)
    bank.apply_all([Operation("DELETE", "e2"), add("the same figs")])
    assert [hit.entry.id for hit in searcher.search("figs", 9)] == ["e1", "e3", "e4", "e5", "e6"]
    bank.restore(point)
    assert [hit.entry.id for hit in searcher.search("figs", 9)] == ["e1", "e2", "e3", "e4", "e5"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", SYNTAX)
def test_text_that_looks_like_syntax_stays_text(store: SqliteStore, use: CachedEmbedder, name: str, text: str) -> None:
    store.bank("ben").apply(add(f"secret {text}"))
    bank = store.bank("anna")
    bank.apply_all([add(text), add("Anna likes apples", text)])
    hits = StoredSearcher(bank, {"name": name}, embedder=use).search(text, 5)
    assert all(hit.entry.owner == "anna" for hit in hits)
    assert hits == in_memory(name, bank.entries(), "anna", use, text, 5)
    assert found(StoredSearcher(bank, {"name": name}, embedder=use).search("apples", 1)) == ["Anna likes apples"]
    assert store.owners() == ["ben", "anna"]


@pytest.mark.parametrize("k", [0, -1])
def test_no_hits_are_asked_for(store: SqliteStore, k: int) -> None:
    store.bank("anna").apply(add("tea"))
    assert StoredSearcher(store.bank("anna")).search("tea", k) == []


# --- owners and forks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_two_owners_with_the_same_question(store: SqliteStore, use: CachedEmbedder, name: str) -> None:
    secrets = {"anna": "the password is swordfish", "ben": "the password is marlin", "": "the password is cod"}
    for owner, text in secrets.items():
        store.bank(owner).apply_all([add(text), add("the weather is fine")])
    for owner, text in secrets.items():
        hits = StoredSearcher(store.bank(owner), {"name": name}, embedder=use).search("password", 10)
        assert found(hits)[0] == text
        assert {hit.entry.owner for hit in hits} == {owner}
        assert all(other not in found(hits) for other in secrets.values() if other != text)
    # not even in the order: what others wrote does not change what a word weighs
    before = StoredSearcher(store.bank("anna"), {"name": name}, embedder=use).search("the fine password", 5)
    store.bank("ben").apply_all([add("fine, fine weather")] * 20)
    assert StoredSearcher(store.bank("anna"), {"name": name}, embedder=use).search("the fine password", 5) == before


@pytest.mark.parametrize("name", NAMES)
def test_forks_do_not_see_each_other(store: SqliteStore, use: CachedEmbedder, name: str) -> None:
    bank = store.bank("anna")
    bank.apply_all([add("Anna lives in Lisbon"), add("Ben has a dog")])
    first = StoredSearcher(bank, {"name": name}, embedder=use)
    assert found(first.search("Lisbon", 1)) == ["Anna lives in Lisbon"]
    fork = bank.fork()
    second = first.fork(fork)
    fork.apply(Operation("UPDATE", "e1", "Anna lives in Porto"))
    bank.apply(Operation("DELETE", "e2"))
    assert "Anna lives in Porto" not in found(first.search("Porto", 5))
    assert found(second.search("Porto", 1)) == ["Anna lives in Porto"]
    assert "Ben has a dog" in found(second.search("dog", 5))
    assert "Ben has a dog" not in found(first.search("dog", 5))
    with pytest.raises(StoreError, match="another owner"):
        first.fork(store.bank("ben"))


def test_a_forgotten_owner_is_not_found_any_more(store: SqliteStore, use: CachedEmbedder) -> None:
    bank = store.bank("anna")
    bank.apply(add("the password is swordfish"))
    searcher = StoredSearcher(bank, {"name": "hybrid"}, embedder=use)
    assert len(searcher.search("password", 5)) == 1
    store.forget("anna")
    with pytest.raises(StoreError, match="gone"):
        searcher.search("password", 5)
    assert store.connection().execute("SELECT COUNT(*) FROM vectors").fetchone() == (0,)
    assert StoredSearcher(store.bank("anna"), {"name": "hybrid"}, embedder=use).search("password", 5) == []


# --- vectors in the file -----------------------------------------------------------------------------------------


def test_a_text_is_embedded_once_for_all_processes_and_forks(store: SqliteStore, use: CachedEmbedder) -> None:
    bank, first, second = store.bank("anna"), Counting(use), Counting(use)
    bank.apply_all([add("tea"), add("wine"), add("tea"), add("  \u3000 x")])
    StoredSearcher(bank, {"name": "dense"}, embedder=first).search("drink", 3)
    assert sorted(text for text in first.asked if len(text) < 10) == ["  \u3000 x", "drink", "tea", "wine"]
    fork = bank.fork()
    fork.apply(add("beer"))
    hits = StoredSearcher(fork, {"name": "dense"}, embedder=second).search("drink", 3)
    assert sorted(text for text in second.asked if len(text) < 10) == ["beer", "drink"]
    right = in_memory("dense", fork.entries(), "anna", use, "drink", 3)
    assert [hit.entry for hit in hits] == [hit.entry for hit in right]
    # not to the last bit: the model rounds in another way when it is asked for other texts together
    assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in right], abs=1e-5)


@pytest.mark.parametrize("damage", ["DELETE FROM vectors", "UPDATE vectors SET vector = x'00'", "UPDATE vectors SET"])
def test_a_vector_that_is_missing_or_damaged_is_computed_again(
    store: SqliteStore, use: CachedEmbedder, damage: str
) -> None:
    bank, counting = store.bank("anna"), Counting(use)
    bank.apply_all([add(text) for text in TEXTS])
    right = StoredSearcher(bank, {"name": "dense"}, embedder=use).search("Anna", 5)
    if damage.endswith("SET"):
        store.connection().execute(f"{damage} vector = ?", (np.full(512, np.nan, "<f4").tobytes(),))
    else:
        store.connection().execute(damage)
    assert StoredSearcher(bank, {"name": "dense"}, embedder=counting).search("Anna", 5) == right
    assert set(TEXTS) <= set(counting.asked)
    counting.asked.clear()
    assert StoredSearcher(bank, {"name": "dense"}, embedder=use).search("Anna", 5) == right
    assert counting.asked == []


class Backwards:
    """A second model: the numbers of the first in another order."""

    def __init__(self, embedder: CachedEmbedder, fingerprint: str = "") -> None:
        self.embedder, self.fingerprint = embedder, fingerprint

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return self.embedder.embed(texts)[:, ::-1]


@pytest.mark.parametrize("name", ["", "the same"])
def test_two_embedders_never_mix(store: SqliteStore, use: CachedEmbedder, name: str) -> None:
    bank, forwards = store.bank("anna"), Counting(use)
    if name:
        forwards.fingerprint = name  # type: ignore[attr-defined]
    bank.apply_all([add(text) for text in TEXTS])
    for _ in range(2):
        one = StoredSearcher(bank, {"name": "dense"}, embedder=forwards).search("Anna", 5)
        two = StoredSearcher(bank, {"name": "dense"}, embedder=Backwards(use, name)).search("Anna", 5)
        assert one == in_memory("dense", bank.entries(), "anna", use, "Anna", 5)
        assert [hit.entry for hit in two] == [hit.entry for hit in one]
        assert [hit.score for hit in two] == pytest.approx([hit.score for hit in one], abs=1e-5)
    # every text once by each of the two
    assert store.connection().execute("SELECT COUNT(*) FROM vectors").fetchone() == (2 * len(TEXTS),)
    assert forwards.asked.count(TEXTS[0]) == 1


def test_a_prefix_is_part_of_the_text(store: SqliteStore, use: CachedEmbedder) -> None:
    bank, counting = store.bank("anna"), Counting(use)
    bank.apply(add("tea"))
    for prefix in ("", "passage: "):
        options = {"name": "dense", "embedder": {"entry_prefix": prefix}}
        StoredSearcher(bank, options, embedder=counting).refresh()
    assert [text for text in counting.asked if "tea" in text] == ["tea", "passage: tea"]


def test_a_model_that_changes_under_a_searcher_is_an_error(store: SqliteStore, use: CachedEmbedder) -> None:
    class Changing:
        width = 512

        def embed(self, texts: Sequence[str]) -> np.ndarray:
            return use.embed(texts)[:, : self.width]

    bank, changing = store.bank("anna"), Changing()
    bank.apply(add("tea"))
    searcher = StoredSearcher(bank, {"name": "dense"}, embedder=changing)
    searcher.refresh()
    changing.width = 100
    bank.apply(add("wine"))
    with pytest.raises(EngineError, match=r"they had 512 numbers, now 100(.|\n)*fix:"):
        searcher.refresh()


def test_a_file_of_version_1_is_searched_by_meaning(tmp_path: Path, use: CachedEmbedder) -> None:
    script = ROOT / "tests" / "memory" / "test_sqlite_version1.sql"
    connection = sqlite3.connect(tmp_path / "bank.db")
    connection.executescript(script.read_text())
    connection.close()
    with SqliteStore(tmp_path / "bank.db") as store:
        searcher = StoredSearcher(store.bank("anna"), {"name": "hybrid"}, embedder=use)
        assert searcher.search("What did the doctor advise about cigarettes?", 1)[0].entry.id == "e2"
        branch = StoredSearcher(store.bank("anna", fork="branch"), {"name": "hybrid"}, embedder=use)
        assert found(branch.search("In which city is her home?", 1)) == ["lives in Oslo"]


# --- when things go wrong ----------------------------------------------------------------------------------------


def test_nobody_waits_for_an_embedder(store: SqliteStore, use: CachedEmbedder) -> None:
    class Writing:
        """While it works, somebody else writes, and will not wait for long."""

        def embed(self, texts: Sequence[str]) -> np.ndarray:
            with SqliteStore(store.path, busy_seconds=0.05) as other:
                assert other.bank("ben").apply(add("meanwhile")).error == ""
                assert other.bank("anna").apply(add("arrived meanwhile")).error == ""
            return use.embed(texts)

    store.bank("anna").apply(add("tea"))
    searcher = StoredSearcher(store.bank("anna"), {"name": "hybrid"}, embedder=Writing())
    assert "tea" in found(searcher.search("drink", 50))
    assert "arrived meanwhile" in found(searcher.search("arrived", 50))


def test_an_embedder_that_fails_is_an_error_until_it_works(store: SqliteStore, use: CachedEmbedder) -> None:
    class Flaky:
        up = False

        def embed(self, texts: Sequence[str]) -> np.ndarray:
            if not self.up:
                raise ConnectionError("gone")
            return use.embed(texts)

    flaky, bank = Flaky(), store.bank("anna")
    bank.apply(add("tea"))
    searcher = StoredSearcher(bank, {"name": "hybrid"}, embedder=flaky)
    with pytest.raises(EngineError, match="ConnectionError: gone"):
        searcher.search("drink", 3)
    flaky.up = True
    assert found(searcher.search("drink", 3)) == ["tea"]
    flaky.up = False
    bank.apply_all([add("wine"), Operation("DELETE", "e1")])
    with pytest.raises(EngineError):
        searcher.search("drink", 3)
    flaky.up = True
    assert found(searcher.search("drink", 3)) == ["wine"]


@pytest.mark.parametrize("known", [True, False], ids=["embedder known", "embedder new"])
def test_a_file_that_cannot_be_written_is_searched_all_the_same(
    tmp_path: Path, use: CachedEmbedder, known: bool
) -> None:
    with SqliteStore(tmp_path / "bank.db", busy_seconds=0.05) as store:
        bank = store.bank("anna")
        if known:
            bank.apply(add("wine"))
            StoredSearcher(bank, {"name": "dense"}, embedder=use).refresh()
        bank.apply(add("tea"))
        searcher = StoredSearcher(bank, {"name": "dense"}, embedder=use)
        other = sqlite3.connect(store.path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.warns(UserWarning, match=r"not kept in the file(.|\n)*locked"):
            assert "tea" in found(searcher.search("hot drink", 2))
        other.execute("ROLLBACK")
        other.close()
        bank.apply(add("beer"))
        assert "beer" in found(searcher.search("cold drink", 3))
        assert store.connection().execute("SELECT COUNT(*) FROM vectors").fetchone() == (1 + known,)


KILLED = """
import os, signal, sys
from memfactory.episode import Operation
from memfactory.memory.sqlite import SqliteStore
from memfactory.search import kept
from memfactory.search.build import EmbedderOptions, build_embedder
from memfactory.search.stored import StoredSearcher

kept.AT_ONCE = 2

class Dying:
    # embeds the probe and one batch, and is killed in the second: texts are in the file, and some vectors
    calls, fingerprint = 0, "use for the test"
    def embed(self, texts):
        self.calls += 1
        if self.calls == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return build_embedder(EmbedderOptions()).embed(texts)

bank = SqliteStore(sys.argv[1]).bank("anna")
bank.apply_all(Operation("ADD", text=text) for text in sys.argv[2:])
print("written", flush=True)
StoredSearcher(bank, {"name": "hybrid"}, embedder=Dying()).refresh()
"""


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def test_a_process_killed_between_text_and_vector_loses_nothing(tmp_path: Path, use: CachedEmbedder) -> None:
    path = tmp_path / "bank.db"
    process = python(KILLED, str(path), *TEXTS)
    assert process.communicate()[0] == "written\n"
    assert process.returncode == -signal.SIGKILL
    with SqliteStore(path) as store:
        bank, counting = store.bank("anna"), Counting(use)
        counting.fingerprint = "use for the test"  # type: ignore[attr-defined]
        assert store.connection().execute("SELECT COUNT(*) FROM vectors").fetchone() == (2,)
        assert [entry.text for entry in bank.entries()] == list(TEXTS)
        searcher = StoredSearcher(bank, {"name": "hybrid"}, embedder=counting)
        for query in QUERIES:
            assert searcher.search(query, 5) == in_memory("hybrid", bank.entries(), "anna", use, query, 5)
        assert sorted(set(counting.asked) & set(TEXTS)) == sorted(TEXTS[2:]), "what was there is not computed again"
        assert store.connection().execute("SELECT COUNT(*) FROM vectors").fetchone() == (len(TEXTS),)


# --- threads and processes ---------------------------------------------------------------------------------------

SECOND = """
import sys
from memfactory.episode import Operation
from memfactory.memory.sqlite import SqliteStore
from memfactory.search.stored import StoredSearcher

bank = SqliteStore(sys.argv[1]).bank("anna")
searcher = StoredSearcher(bank, {"name": "hybrid"})
for line in sys.stdin:
    verb, target, text = line.rstrip("\\n").split("|")
    if verb == "SEARCH":
        print("|".join(hit.entry.text for hit in searcher.search(text, 2)), flush=True)
    else:
        print(bank.apply(Operation(verb, target, text)).error or "done", flush=True)
"""


def test_two_processes_see_what_the_other_writes(store: SqliteStore, use: CachedEmbedder) -> None:
    bank = store.bank("anna")
    bank.apply(add("Ben has a dog"))
    mine = StoredSearcher(bank, {"name": "hybrid"}, embedder=use)
    assert found(mine.search("a pet", 2)) == ["Ben has a dog"]
    with python(SECOND, store.path) as other:
        assert other.stdin is not None
        assert other.stdout is not None

        def tell(verb: str, target: str = "", text: str = "") -> list[str]:
            assert other.stdin is not None
            assert other.stdout is not None
            other.stdin.write(f"{verb}|{target}|{text}\n")
            other.stdin.flush()
            return other.stdout.readline().rstrip("\n").split("|")

        assert tell("SEARCH", text="a pet") == ["Ben has a dog"]
        assert tell("ADD", text="Anna resides in Lisbon") == ["done"]
        assert found(mine.search("In which city is her home?", 1)) == ["Anna resides in Lisbon"]
        point = bank.snapshot()
        bank.apply(Operation("UPDATE", "e1", "Ben has a parrot"))
        assert tell("SEARCH", text="bird")[0] == "Ben has a parrot"
        assert tell("DELETE", "e1") == ["done"]
        assert found(mine.search("bird", 2)) == ["Anna resides in Lisbon"]
        bank.restore(point)
        assert "Ben has a dog" in tell("SEARCH", text="dog")
        other.stdin.close()
    assert other.returncode == 0


RACING = """
import sys
from memfactory.episode import Operation
from memfactory.memory.sqlite import SqliteStore
from memfactory.search import kept
from memfactory.search.stored import StoredSearcher

kept.AT_ONCE = 3
bank = SqliteStore(sys.argv[1]).bank("anna")
searcher = StoredSearcher(bank, {"name": "hybrid"})
for index in range(20):
    text = f"{sys.argv[2]} has boat number {index}"
    bank.apply(Operation("ADD", text=text))
    assert searcher.search(text, 1)[0].entry.text == text
"""


def test_processes_that_write_embed_and_search_at_once(tmp_path: Path, use: CachedEmbedder) -> None:
    path = tmp_path / "bank.db"
    with SqliteStore(path) as store:
        store.bank("anna").apply_all([add(f"an old fact, number {index}") for index in range(30)])
    processes = [python(RACING, str(path), name) for name in ("Ben", "Cleo")]  # both find 30 texts without a vector
    for process in processes:
        process.communicate()
    assert [process.returncode for process in processes] == [0, 0]
    with SqliteStore(path) as store:
        bank = store.bank("anna")
        searcher = StoredSearcher(bank, {"name": "hybrid"}, embedder=use)
        assert all(searcher.search(entry.text, 1)[0].entry == entry for entry in bank.entries())
        assert store.connection().execute("SELECT COUNT(*) FROM embedders").fetchone() == (1,)
        assert store.connection().execute("SELECT COUNT(*) FROM vectors").fetchone() == (70,)


def test_threads_share_a_searcher(store: SqliteStore, use: CachedEmbedder) -> None:
    bank, errors = store.bank("anna"), list[BaseException]()
    searcher = StoredSearcher(bank, {"name": "hybrid"}, embedder=use)

    def work(name: str) -> None:
        try:
            for index in range(8):
                text = f"{name} bought {index} boats"
                bank.apply(add(text))
                assert text in found(searcher.search(text, 60)), "what was written before the search is found"
        except BaseException as error:  # a thread that dies says nothing by itself
            errors.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("Anna", "Ben", "Cleo", "Dan")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(searcher) == 32
    assert searcher.search("boats", 9) == in_memory("hybrid", bank.entries(), "anna", use, "boats", 9)

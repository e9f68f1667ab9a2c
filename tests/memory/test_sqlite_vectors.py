"""What search needs of a bank on disk: the vectors in its file, what changed since, and files of version 1."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memfactory.episode import Operation
from memfactory.errors import StoreError
from memfactory.memory.entries import Entry
from memfactory.memory.sqlite import SqliteBank, SqliteStore
from memfactory.memory.sqlite_vectors import VectorTable, digest


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    with SqliteStore(tmp_path / "bank.db") as store:
        yield store


def add(text: str) -> Operation:
    return Operation("ADD", text=text)


def version1(path: Path) -> None:
    """A file as version 1 wrote it."""
    connection = sqlite3.connect(path)
    connection.executescript(Path(__file__).with_name("test_sqlite_version1.sql").read_text())
    connection.close()


# --- version 1 ---------------------------------------------------------------------------------------------------


def test_a_file_of_version_1_keeps_its_data_and_gets_room_for_vectors(tmp_path: Path) -> None:
    version1(tmp_path / "bank.db")
    for _ in range(2):  # the second time there is nothing to do
        with SqliteStore(tmp_path / "bank.db") as store:
            assert store.connection().execute("SELECT version FROM about").fetchone() == (2,)
            assert store.connection().execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert store.owners() == ["anna", "ben"]
            anna = store.bank("anna")
            assert anna.entries() == [
                Entry("e1", "lives in Bergen", "anna.city", ("home",), "2024-01-01", "anna", 2),
                Entry("e2", "her physician told her to stop smoking", owner="anna", turn=0),
            ]
            assert [change.verb for change in anna.history("e3")] == ["ADD", "DELETE"]
            branch = store.bank("anna", fork="branch")
            assert [entry.id for entry in branch.entries()] == ["e1", "e2", "e3"]
            assert branch.entries()[0].text == "lives in Oslo"
            assert [entry.id for entry, _ in anna.match("smoking", 3)] == ["e2"]
            number = anna.vectors.embedder("model", np.ones(2, np.float32))
            anna.vectors.keep(number, [b"x"], np.ones((1, 2), np.float32))
            assert len(list(anna.vectors.find(number, [b"x"], 2))) == 1
    with SqliteStore(tmp_path / "bank.db") as store:
        assert store.bank("anna").apply(add("goes on")).target == "e4"


def test_new_and_migrated_files_have_the_same_tables(tmp_path: Path) -> None:
    version1(tmp_path / "old.db")

    def tables(path: Path) -> set[tuple[str, str]]:
        with SqliteStore(path) as store:
            rows = store.connection().execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL")
            return {(name, " ".join(sql.split())) for name, sql in rows}

    assert tables(tmp_path / "old.db") == tables(tmp_path / "new.db")


# --- what changed since ------------------------------------------------------------------------------------------

STEP = st.one_of(
    st.tuples(st.just("ADD"), st.sampled_from(["tea", "wine"])),
    st.tuples(st.just("UPDATE"), st.integers(1, 5)),
    st.tuples(st.just("DELETE"), st.integers(1, 5)),
    st.tuples(st.just("mark"), st.just(0)),
    st.tuples(st.just("restore"), st.integers(0, 5)),
    st.tuples(st.just("fork"), st.just(0)),
    st.tuples(st.just("look"), st.just(0)),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEP, max_size=25), name=st.uuids())
def test_differences_add_up_to_the_bank(store: SqliteStore, steps: list[tuple[str, object]], name: object) -> None:
    bank: SqliteBank = store.bank(str(name))
    marks, held, head = [bank.snapshot()], dict[str, Entry](), 0

    def look() -> None:
        nonlocal head
        new = bank.difference(head)
        held.update({entry.id: entry for entry in new.entries})
        for id in new.gone:
            held.pop(id, None)
        head = new.head
        assert held == {entry.id: entry for entry in bank.entries()}
        again = bank.difference(head)
        assert (again.head, again.entries, again.gone) == (head, [], [])

    for turn, (verb, what) in enumerate(steps):
        if verb == "ADD":
            bank.apply(add(str(what)), turn=turn)
        elif verb == "UPDATE":
            bank.apply(Operation("UPDATE", f"e{what}", f"text {turn}"), turn=turn)
        elif verb == "DELETE":
            bank.apply(Operation("DELETE", f"e{what}"), turn=turn)
        elif verb == "mark":
            marks.append(bank.snapshot())
        elif verb == "restore":
            bank.restore(marks[int(str(what)) % len(marks)])
        elif verb == "fork":  # an index may go from the one bank to the other
            left, bank = bank, bank.fork()
            left.apply(add("not to be seen"))
        else:
            look()
    look()


def test_a_difference_of_another_owner_or_a_forgotten_one_is_an_error(store: SqliteStore) -> None:
    anna, ben = store.bank("anna"), store.bank("ben")
    anna.apply(add("tea"))
    ben.apply(add("wine"))
    with pytest.raises(StoreError, match="change 1"):
        ben.difference(1)
    assert anna.shares_changes(anna.fork())
    assert not anna.shares_changes(ben)
    store.forget("anna")
    with pytest.raises(StoreError, match="gone"):
        anna.difference(1)


# --- vectors -----------------------------------------------------------------------------------------------------


def kept(table: VectorTable, embedder: int, *texts: str) -> dict[bytes, list[float]]:
    found: dict[bytes, list[float]] = {}
    for keys, vectors in table.find(embedder, [digest(text) for text in texts], 2):
        found |= dict(zip(keys, vectors.tolist(), strict=True))
    return found


def test_vectors_belong_to_an_owner_an_embedder_and_a_text(store: SqliteStore) -> None:
    anna, ben = store.bank("anna"), store.bank("ben")
    one = anna.vectors.embedder("one", np.array([1, 0], np.float32))
    two = anna.vectors.embedder("two", np.array([1, 0], np.float32))
    assert one != two
    anna.vectors.keep(one, [digest("tea"), digest("wine")], np.array([[1, 0], [0, 1]], np.float32))
    assert kept(anna.vectors, one, "tea", "wine", "beer") == {digest("tea"): [1, 0], digest("wine"): [0, 1]}
    assert kept(anna.fork().vectors, one, "tea") == {digest("tea"): [1, 0]}
    assert kept(ben.vectors, one, "tea") == kept(anna.vectors, two, "tea") == {}
    anna.vectors.keep(one, [digest("tea")], np.array([[0, 1]], np.float32))
    assert kept(anna.vectors, one, "tea") == {digest("tea"): [0, 1]}
    many = [f"text {i}" for i in range(2000)]
    anna.vectors.keep(one, [digest(text) for text in many], np.tile(np.arange(2000, dtype=np.float32), (2, 1)).T)
    assert kept(anna.vectors, one, *many) == {digest(text): [i, i] for i, text in enumerate(many)}


def test_vectors_fill_the_pages_of_a_new_file(tmp_path: Path, store: SqliteStore) -> None:
    number = store.bank("anna").vectors.embedder("model", np.ones(512, np.float32))
    keys = [digest(str(i)) for i in range(600)]
    store.bank("anna").vectors.keep(number, keys, np.ones((600, 512), np.float32))
    pages = store.connection().execute("PRAGMA page_count").fetchone()[0]
    size = store.connection().execute("PRAGMA page_size").fetchone()[0]
    assert pages * size < 1.5 * 600 * 2048
    version1(tmp_path / "old.db")
    with SqliteStore(tmp_path / "old.db") as old:  # an older file stays as it is
        assert old.connection().execute("PRAGMA page_size").fetchone() == (4096,)
        assert old.connection().execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_an_embedder_is_known_by_what_it_computes(store: SqliteStore) -> None:
    table = store.bank("anna").vectors
    probe = np.array([0.6, 0.8], np.float32)
    number = table.embedder("model", probe)
    assert table.embedder("model", probe + 1e-6) == number, "another processor"
    assert table.embedder("model", np.array([0.8, 0.6], np.float32)) != number, "replaced under its name"
    assert table.embedder("model", np.array([0.6, 0.8, 0], np.float32)) != number
    assert table.embedder("model", probe) == number


def test_what_is_forgotten_has_no_vectors(store: SqliteStore) -> None:
    anna, ben = store.bank("anna"), store.bank("ben")
    number = anna.vectors.embedder("model", np.ones(2, np.float32))
    for bank in (anna, ben):
        bank.vectors.keep(number, [digest("tea")], np.ones((1, 2), np.float32))
    late = anna.vectors
    store.forget("anna")
    late.keep(number, [digest("wine")], np.ones((1, 2), np.float32))  # computed while the owner was forgotten
    assert store.connection().execute("SELECT COUNT(*) FROM vectors").fetchone() == (1,)
    assert len(kept(ben.vectors, number, "tea")) == 1
    assert kept(store.bank("anna").vectors, number, "tea", "wine") == {}

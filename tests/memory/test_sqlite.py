"""`SqliteStore`: isolation, search, crashes, threads, processes, versions of the file, and failing storage."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfactory.episode import Operation
from memfactory.errors import StoreError
from memfactory.memory import sqlite_schema
from memfactory.memory.operations import Limits
from memfactory.memory.sqlite import QUERY_WORDS, SqliteStore

ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    with SqliteStore(tmp_path / "bank.db") as store:
        yield store


def add(text: str, key: str = "") -> Operation:
    return Operation("ADD", text=text, key=key)


def texts(store: SqliteStore, owner: str) -> list[str]:
    return [entry.text for entry in store.bank(owner).entries()]


# --- owners ------------------------------------------------------------------------------------------------------


def test_owners_share_nothing(store: SqliteStore) -> None:
    names = ["anna", "Anna", "", "anna' OR '1'='1", "\ud800", "a\x00b"]
    for name in names:
        store.bank(name).apply(add(f"secret of {name!r}"))
    assert store.owners() == names
    for name in names:
        bank = store.bank(name)
        assert [(entry.id, entry.text, entry.owner) for entry in bank.entries()] == [
            ("e1", f"secret of {name!r}", name)
        ]
        assert [entry.text for entry, _ in bank.match("secret of", 10)] == [f"secret of {name!r}"]
    store.bank("anna").apply(Operation("DELETE", "e1"))
    assert texts(store, "Anna") == ["secret of 'Anna'"]


def test_forget_leaves_nothing_of_an_owner_and_all_of_the_others(store: SqliteStore) -> None:
    anna, ben = store.bank("anna"), store.bank("ben")
    for bank in (anna, ben):
        bank.apply(add("likes figs"))
        bank.apply(Operation("UPDATE", "e1", "likes dates"))
    fork = anna.fork()
    snapshot = anna.snapshot()
    store.forget("anna")
    store.forget("nobody")
    assert store.owners() == ["ben"]
    connection = store.connection()
    assert connection.execute("SELECT COUNT(*) FROM changes").fetchone() == (2,)
    assert connection.execute("SELECT COUNT(*) FROM words WHERE words MATCH 'figs'").fetchone() == (1,)
    for gone in (anna, fork):
        with pytest.raises(StoreError, match="gone"):
            gone.apply(add("x"))
    fresh = store.bank("anna")
    assert len(fresh) == 0
    with pytest.raises(StoreError, match="forgotten"):
        fresh.restore(snapshot)
    assert [entry.text for entry, _ in ben.match("dates", 5)] == ["likes dates"]


def test_forks_are_found_by_name_and_discarded(store: SqliteStore) -> None:
    bank = store.bank("anna")
    bank.apply(add("x"))
    fork = bank.fork()
    fork.apply(add("y"))
    assert len(store.bank("anna", fork=fork.name)) == 2
    fork.discard()
    with pytest.raises(StoreError, match="no fork"):
        store.bank("anna", fork=fork.name)
    with pytest.raises(StoreError, match="not a fork"):
        bank.discard()
    assert len(bank) == 1


def test_a_snapshot_stays_valid_after_a_restart(tmp_path: Path) -> None:
    with SqliteStore(tmp_path / "bank.db") as store:
        store.bank("anna").apply(add("x"))
        snapshot = store.bank("anna").snapshot()
        store.bank("anna").apply(add("y"))
    with SqliteStore(tmp_path / "bank.db") as store:
        store.bank("anna").restore(snapshot)
        assert texts(store, "anna") == ["x"]


# --- search ------------------------------------------------------------------------------------------------------


def test_match_finds_the_present_by_text_and_key(store: SqliteStore) -> None:
    bank = store.bank("anna")
    bank.apply_all([add("Anna lives in Rome", "anna.city"), add("Ben likes figs"), add("Rome, Rome and Rome again")])
    found = bank.match("where in rome?", 5)
    assert {entry.id for entry, _ in found} == {"e1", "e3"}
    assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)
    assert [entry.id for entry, _ in bank.match("CITY", 5)] == ["e1"]
    assert len(bank.match("rome", 1)) == 1
    assert bank.match("rome", 0) == bank.match("", 5) == bank.match("zebra", 5) == []
    point = bank.snapshot()
    fork = bank.fork()
    bank.apply(Operation("UPDATE", "e1", "Anna lives in Oslo"))
    bank.apply(Operation("DELETE", "e2"))
    assert [entry.id for entry, _ in bank.match("rome", 5)] == ["e3"]
    assert bank.match("figs", 5) == []
    assert [entry.id for entry, _ in bank.match("oslo", 5)] == ["e1"]
    assert fork.match("oslo", 5) == []
    assert [entry.id for entry, _ in fork.match("figs", 5)] == ["e2"]
    bank.restore(point)
    assert [entry.id for entry, _ in bank.match("figs", 5)] == ["e2"]


ODD_QUERIES = (
    '"', "'", "a OR", "NEAR(a b)", "text : x", "-a", "a*", "^a", "(", "\x00", "a\x00b", "\ud800", "___", "²", "\u0301",
    "{text} : a", "scope : o1", "o2", "שלום", "x" * 1_000_000, "a " * 100_000, "AND", "\U0001e900", "𞤢",
)  # fmt: skip


@pytest.mark.parametrize("query", ODD_QUERIES, ids=range(len(ODD_QUERIES)))
def test_a_query_is_data(store: SqliteStore, query: str) -> None:
    store.bank("ben").apply(add("a secret"))
    store.bank("anna").apply(add("an apple שלום"))
    assert all(entry.owner == "anna" for entry, _ in store.bank("anna").match(query, 5))


def test_any_query_is_data(store: SqliteStore) -> None:
    bank = store.bank("anna")
    bank.apply_all([add("an apple"), add("text: \ud800 \x00 ²")])

    @given(st.text(st.characters(), max_size=30))
    def check(query: str) -> None:
        bank.match(query, 5)

    check()
    assert bank.match(" ".join(f"w{i}" for i in range(QUERY_WORDS)) + " apple", 5) == [], "words beyond the limit"


def test_words_after_odd_characters_are_found(store: SqliteStore) -> None:
    bank = store.bank("anna")
    bank.apply_all([add("\ud800 apple"), add("nul \x00 pear")])
    assert [entry.id for entry, _ in bank.match("apple", 5)] == ["e1"]
    assert [entry.id for entry, _ in bank.match("pear", 5)] == ["e2"]


# --- crashes, threads, processes ---------------------------------------------------------------------------------

WRITER = """
import sys
from memfactory.episode import Operation
from memfactory.memory.sqlite import SqliteStore
path, owner, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
bank = SqliteStore(path).bank(owner)
for index in range(count):
    done = bank.apply(Operation("ADD", text=f"{index} " + "x" * 500))
    print(done.target, flush=True)
"""


def writer(path: Path, owner: str, count: int) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WRITER, str(path), owner, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_every_commit_is_flushed_to_the_disk(store: SqliteStore) -> None:
    assert store.connection().execute("PRAGMA synchronous").fetchone() == (2,), "FULL: no test can cut the power"
    assert store.connection().execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.parametrize("acknowledged", [1, 40, 150])
def test_kill_loses_nothing_that_was_acknowledged(tmp_path: Path, acknowledged: int) -> None:
    path = tmp_path / "bank.db"
    process = writer(path, "anna", 1_000_000)
    assert process.stdout is not None
    seen = [process.stdout.readline().strip() for _ in range(acknowledged)]
    process.send_signal(signal.SIGKILL)
    seen += process.stdout.read().split()
    assert process.wait() == -signal.SIGKILL
    with SqliteStore(path) as store:
        found = [entry.id for entry in store.bank("anna").entries()]
        assert found[: len(seen)] == seen
        assert len(found) <= len(seen) + 1, "at most the one that was being answered"
        assert store.connection().execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert store.bank("anna").apply(add("goes on")).target == f"e{len(found) + 1}"


def test_threads_share_one_bank(store: SqliteStore) -> None:
    bank, ids, errors = store.bank("anna"), list[str](), list[BaseException]()

    def work(name: int) -> None:
        try:
            for index in range(25):
                ids.append(bank.apply(add(f"thread {name} number {index}")).target)
                assert bank.match(f"thread {name}", 3)
        except BaseException as error:  # a thread that dies says nothing by itself
            errors.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted(ids) == sorted(f"e{index + 1}" for index in range(200))
    assert len(bank) == 200


def test_processes_share_one_bank(tmp_path: Path) -> None:
    path = tmp_path / "bank.db"
    processes = [writer(path, "anna", 60) for _ in range(2)]  # they also race to create the file
    ids = [id for process in processes for id in process.communicate()[0].split()]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(ids) == sorted(f"e{index + 1}" for index in range(120))
    with SqliteStore(path) as store:
        assert len(store.bank("anna")) == 120


def test_a_process_made_by_fork_gets_its_own_connection(store: SqliteStore) -> None:
    bank = store.bank("anna")
    bank.apply(add("of the parent"))
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if bank.apply(add("of the child")).target == "e2" else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert bank.apply(add("of the parent again")).target == "e3"
    assert texts(store, "anna") == ["of the parent", "of the child", "of the parent again"]


def test_connections_of_ended_threads_are_closed(store: SqliteStore) -> None:
    for _ in range(5):
        thread = threading.Thread(target=lambda: store.bank("anna").apply(add("x")))
        thread.start()
        thread.join()
    assert len(store._open) <= 2
    assert len(store.bank("anna")) == 5


# --- the file ----------------------------------------------------------------------------------------------------


def test_a_newer_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bank.db"
    with SqliteStore(path) as store:
        store.connection().execute("UPDATE about SET version = 99")
    with pytest.raises(StoreError, match=r"version 99(.|\n)*fix: update memfactory"):
        SqliteStore(path)


def test_an_older_file_is_brought_up_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bank.db"
    with SqliteStore(path) as store:
        store.bank("anna").apply(add("kept"))
    monkeypatch.setattr(sqlite_schema, "VERSION", 4)
    monkeypatch.setattr(sqlite_schema, "MIGRATIONS", {2: ("ALTER TABLE banks ADD COLUMN colour TEXT",)})
    with pytest.raises(StoreError, match="no way from 3 to 4"):
        SqliteStore(path)
    monkeypatch.setitem(sqlite_schema.MIGRATIONS, 3, ("UPDATE banks SET colour = 'red'",))
    with SqliteStore(path) as store:  # and the failed attempt left nothing behind
        assert store.connection().execute("SELECT version FROM about").fetchone() == (4,)
        assert store.connection().execute("SELECT colour FROM banks").fetchone() == ("red",)
        assert texts(store, "anna") == ["kept"]


def test_files_that_are_no_bank(tmp_path: Path) -> None:
    text = tmp_path / "text.db"
    text.write_text("hello " * 1000)
    with pytest.raises(StoreError, match=r"not a database(.|\n)*fix: name another file"):
        SqliteStore(text)
    assert text.read_text() == "hello " * 1000
    foreign = tmp_path / "foreign.db"
    other = sqlite3.connect(foreign)
    other.execute("CREATE TABLE mine (x)")
    other.commit()
    with pytest.raises(StoreError, match="another program"):
        SqliteStore(foreign)
    assert other.execute("SELECT name FROM sqlite_master").fetchall() == [("mine",)]
    with pytest.raises(StoreError, match="fix: create the folder"):
        SqliteStore(tmp_path / "nowhere" / "bank.db")
    with pytest.raises(StoreError, match="EntryBank"):
        SqliteStore(":memory:")


def test_a_full_disk_is_an_error_and_nothing_else_is_lost(tmp_path: Path) -> None:
    with SqliteStore(tmp_path / "bank.db", limits=Limits(text=1_000_000)) as store:
        bank = store.bank("anna")
        bank.apply(add("kept"))
        pages = store.connection().execute("PRAGMA page_count").fetchone()[0]
        store.connection().execute(f"PRAGMA max_page_count = {pages + 5}")
        with pytest.raises(StoreError, match=r"full(.|\n)*fix: free space"):
            bank.apply_all([add("small"), add("x" * 100_000)])
        assert texts(store, "anna") == ["kept"], "all of it or nothing"
        store.connection().execute("PRAGMA max_page_count = 1000000")
        assert bank.apply(add("after")).target == "e2"


def test_a_locked_file_is_an_error_after_the_wait(tmp_path: Path) -> None:
    path = tmp_path / "bank.db"
    with SqliteStore(path, busy_seconds=0.05) as store:
        bank = store.bank("anna")
        bank.apply(add("kept"))
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match=r"locked(.|\n)*busy_seconds"):
            bank.apply(add("x"))
        assert texts(store, "anna") == ["kept"], "readers do not wait"
        assert bank.apply(add("")).error == "missing text", "nor does what is refused anyway"
        other.execute("ROLLBACK")
        other.close()
        assert bank.apply(add("x")).error == ""


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "bank.db")
    bank = store.bank("anna")
    store.close()
    with pytest.raises(StoreError, match="closed"):
        bank.apply(add("x"))


@pytest.mark.slow
def test_a_hundred_thousand_entries(store: SqliteStore) -> None:
    bank = store.bank("anna")
    bank.apply_all(add(f"fact {index} about {index % 97}") for index in range(100_000))
    assert len(bank) == 100_000
    assert [entry.id for entry, _ in bank.match("99999", 3)] == ["e100000"]
    fork = bank.fork()
    fork.apply(Operation("DELETE", "e5"))
    assert (len(bank), len(fork)) == (100_000, 99_999)

"""`PostgresStore` on a real server: isolation, search, crashes, threads, processes, versions, and a failing server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memfactory.episode import Operation
from memfactory.errors import StoreError
from memfactory.memory.operations import Limits
from memfactory.search import BM25Searcher, sync
from memfactory.search.tokens import words

psycopg = pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'memfactory[postgres]'")
from memfactory.memory import postgres_schema  # noqa: E402
from memfactory.memory.postgres import QUERY_WORDS, PostgresStore  # noqa: E402

ROOT = Path(__file__).parents[2]
Open = Callable[..., PostgresStore]


@pytest.fixture
def open_store(postgres_server: Any, postgres_schema: str) -> Iterator[Open]:
    """Opens stores of one new schema, with any options, and closes them after the test."""
    opened: list[PostgresStore] = []

    def make(**options: Any) -> PostgresStore:
        opened.append(PostgresStore(options.pop("dsn", postgres_server.dsn), **{"schema": postgres_schema} | options))
        return opened[-1]

    yield make
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store: Open) -> PostgresStore:
    return open_store()


def add(text: str, key: str = "", tags: tuple[str, ...] = ()) -> Operation:
    return Operation("ADD", text=text, key=key, tags=tags)


def texts(store: PostgresStore, owner: str) -> list[str]:
    return [entry.text for entry in store.bank(owner).entries()]


def sql(store: PostgresStore, statement: str, *values: Any) -> list[Any]:
    with store.connection() as connection:
        cursor = connection.execute(statement, values or None)
        return cursor.fetchall() if cursor.description else []


def test_the_documented_example_runs(postgres_server: Any, documented: Callable[[str], str]) -> None:
    shown = documented("PostgresStore(")
    exec(shown.replace('"postgresql://me@localhost/memory"', repr(postgres_server.dsn)), {})


# --- owners ------------------------------------------------------------------------------------------------------


def test_owners_share_nothing(store: PostgresStore) -> None:
    names = ["anna", "Anna", "", "anna' OR '1'='1", "\ud800", "a\x00b", "%s", "x" * 10_000]
    for name in names:
        store.bank(name).apply(add(f"secret of {name[:20]!r}"))
    assert store.owners() == names
    for name in names:
        bank = store.bank(name)
        only = [("e1", f"secret of {name[:20]!r}", name)]
        assert [(entry.id, entry.text, entry.owner) for entry in bank.entries()] == only
        assert [hit.entry.text for hit in bank.match("secret of", 10)] == [only[0][1]]
    store.bank("anna").apply(Operation("DELETE", "e1"))
    assert texts(store, "Anna") == ["secret of 'Anna'"]


def test_forget_leaves_nothing_of_an_owner_and_all_of_the_others(store: PostgresStore) -> None:
    anna, ben = store.bank("anna"), store.bank("ben")
    for bank in (anna, ben):
        bank.apply(add("likes figs"))
        bank.apply(Operation("UPDATE", "e1", "likes dates"))
    fork = anna.fork()
    snapshot = anna.snapshot()
    store.forget("anna")
    store.forget("nobody")
    assert store.owners() == ["ben"]
    assert [sql(store, f"SELECT count(*) FROM {table}")[0][0] for table in ("banks", "changes", "present")] == [
        1,
        2,
        1,
    ]
    for gone in (anna, fork):
        with pytest.raises(StoreError, match="gone"):
            gone.apply(add("x"))
    fresh = store.bank("anna")
    assert len(fresh) == 0
    with pytest.raises(StoreError, match="forgotten"):
        fresh.restore(snapshot)
    assert [hit.entry.text for hit in ben.match("dates", 5)] == ["likes dates"]


def test_forget_and_writers_at_once_never_block_each_other_for_good(open_store: Open) -> None:
    store = open_store(lock_seconds=20)
    unexpected = list[BaseException]()

    def write() -> None:
        try:
            for _ in range(30):
                try:
                    bank = store.bank("anna")
                    bank.apply(add("x"))
                    bank.fork().apply(add("y"))
                except StoreError as error:
                    if "gone" not in str(error):
                        raise
        except BaseException as error:
            unexpected.append(error)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(15):
        store.forget("anna")
    for thread in threads:
        thread.join()
    assert unexpected == []
    store.forget("anna")
    assert [sql(store, f"SELECT count(*) FROM {table}")[0][0] for table in ("banks", "changes", "present")] == [
        0,
        0,
        0,
    ]


def test_forks_are_found_by_name_and_discarded(store: PostgresStore) -> None:
    bank = store.bank("anna")
    bank.apply(add("x"))
    fork = bank.fork()
    fork.apply(add("y"))
    assert len(store.bank("anna", fork=fork.name)) == 2
    fork.discard()
    for name in (fork.name, "\x00", "\ud800", "' OR true --"):
        with pytest.raises(StoreError):
            store.bank("anna", fork=name)
    with pytest.raises(StoreError, match="not a fork"):
        bank.discard()
    assert len(bank) == 1


def test_a_snapshot_stays_valid_after_a_restart(open_store: Open) -> None:
    with open_store() as store:
        store.bank("anna").apply(add("x"))
        snapshot = store.bank("anna").snapshot()
        store.bank("anna").apply(add("y"))
    store = open_store()
    store.bank("anna").restore(snapshot)
    assert texts(store, "anna") == ["x"]


def test_many_operations_at_once_are_what_they_are_one_by_one(store: PostgresStore) -> None:
    operations = [
        add("one", "k", ("t",)),
        add("two"),
        Operation("UPDATE", "e1", "one b"),
        Operation("UPDATE", "e9", "nothing"),
        Operation("DELETE", "e2"),
        Operation("UPDATE", "e2", "deleted"),
        add(""),
        Operation("NONE"),
        add("three"),
        *(add(f"many {index}") for index in range(2500)),
        Operation("UPDATE", "e2000", "across pieces"),
    ]
    together, single = store.bank("together"), store.bank("single")
    for operation in operations[:9]:
        single.apply(operation, turn=4)
    for operation in operations[9:]:
        assert not operation.error
    single.apply_all(operations[9:], turn=4)
    results = together.apply_all(operations, turn=4)
    assert [(op.target, op.error) for op in results[:9]] == [
        ("e1", ""),
        ("e2", ""),
        ("e1", ""),
        ("e9", "unknown id"),
        ("e2", ""),
        ("e2", "unknown id"),
        ("", "missing text"),
        ("", ""),
        ("e3", ""),
    ]
    assert [(e.id, e.text, e.key, e.tags, e.turn) for e in together.entries()] == [
        (e.id, e.text, e.key, e.tags, e.turn) for e in single.entries()
    ]
    for id in ("e1", "e2", "e2000"):
        assert [c.verb for c in together.history(id)] == [c.verb for c in single.history(id)]
    start = together.snapshot()
    together.apply_all([Operation("DELETE", f"e{number}") for number in range(1, 2501)])
    together.restore(start)
    assert len(together) == len(single) == 2502


# --- search ------------------------------------------------------------------------------------------------------


def test_match_finds_the_present_by_text_and_key(store: PostgresStore) -> None:
    bank = store.bank("anna")
    bank.apply_all([add("Anna lives in Rome", "anna.city"), add("Ben likes figs"), add("Rome, Rome and Rome again")])
    found = bank.match("where in rome?", 5)
    assert {hit.entry.id for hit in found} == {"e1", "e3"}
    assert [hit.score for hit in found] == sorted((hit.score for hit in found), reverse=True)
    assert [hit.entry.id for hit in bank.match("CITY", 5)] == ["e1"]
    assert len(bank.match("rome", 1)) == 1
    assert bank.match("rome", 0) == bank.match("", 5) == bank.match("zebra", 5) == []
    point = bank.snapshot()
    fork = bank.fork()
    bank.apply(Operation("UPDATE", "e1", "Anna lives in Oslo"))
    bank.apply(Operation("DELETE", "e2"))
    assert [hit.entry.id for hit in bank.match("rome", 5)] == ["e3"]
    assert bank.match("figs", 5) == []
    assert [hit.entry.id for hit in bank.match("oslo", 5)] == ["e1"]
    assert fork.match("oslo", 5) == []
    assert [hit.entry.id for hit in fork.match("figs", 5)] == ["e2"]
    bank.restore(point)
    assert [hit.entry.id for hit in bank.match("figs", 5)] == ["e2"]


WORDS = st.sampled_from(
    ["rome", "Oslo", "in", "the", "figs", "12", "naïve", "東京都", "हिन्दी", "a\x00b", "\ud800", "'x'"]
)
TEXTS = st.lists(WORDS, min_size=1, max_size=6).map(" ".join)


def test_scores_are_those_of_bm25_whatever_others_hold(store: PostgresStore) -> None:
    others = store.bank("others")
    others.apply_all([add("rome figs rome 12")] * 50)

    @given(st.lists(st.builds(add, TEXTS, TEXTS | st.just(""), st.lists(TEXTS, max_size=2).map(tuple))), TEXTS)
    @settings(max_examples=25)
    def check(operations: list[Operation], query: str) -> None:
        store.forget("anna")
        bank, index = store.bank("anna"), BM25Searcher("anna")
        bank.apply_all(operations)
        bank.apply(Operation("DELETE", "e2"))
        sync(index, bank.entries())
        for k in (1, 100):
            found, wanted = bank.match(query, k), index.search(query, k)
            assert [hit.score for hit in found] == pytest.approx([hit.score for hit in wanted], abs=1e-8)
        assert {hit.entry for hit in found} == {hit.entry for hit in wanted}

    check()


ODD_QUERIES = (
    '"', "'", "a OR", "a & b", "a | !b", "a:*", "<->", ":1", "':1'", "-a", "a*", "^a", "(", "\\", "\x00", "a\x00b",
    "\ud800", "___", "²", "\u0301", "%s", "%(x)s", "{0}", "'; DROP TABLE changes; --", "$$", "שלום", "x" * 1_000_000,
    "a " * 100_000, "AND", "\U0001e900", "𞤢",
)  # fmt: skip


def test_a_query_is_data(store: PostgresStore) -> None:
    store.bank("ben").apply(add("a secret 1"))
    bank = store.bank("anna")
    bank.apply_all([add("an apple שלום"), add("text: \ud800 \x00 ² a x1")])
    for query in ODD_QUERIES:
        assert all(hit.entry.owner == "anna" for hit in bank.match(query, 5))

    @given(st.text(st.characters(), max_size=30))
    @settings(max_examples=40)
    def check(query: str) -> None:
        bank.match(query, 5)

    check()
    assert bank.match(" ".join(f"w{i}" for i in range(QUERY_WORDS)) + " apple", 5) == [], "words beyond the limit"


def test_more_words_than_the_index_can_hold_are_kept_as_text(open_store: Open) -> None:
    bank = open_store(limits=Limits(text=10_000_000)).bank("anna")
    texts = [
        " ".join(f"word{index}" for index in range(400_000)),
        "a " * 1_000_000,
        "\U0001d5ba" * 300_000,
        " ".join(chr(0x10400 + index) * 300 for index in range(2000)),
    ]
    for text in texts:
        id = bank.apply(add(text)).target
        assert (entry := bank.get(id)) is not None
        assert entry.text == text
    assert [hit.entry.id for hit in bank.match("word7", 5)] == ["e1"]
    assert {hit.entry.id for hit in bank.match("a", 5)} == {"e2"}
    assert {hit.entry.id for hit in bank.match("a" * 300_000, 5)} == {"e3"}, "compared up to a length"


def test_words_are_cut_as_they_were_when_they_were_stored() -> None:
    found = words("It's Anna_Müller's 2nd ﬁg; ÅNGSTRÖM x1.5 हिन्दी 東京都 a-b")
    assert " ".join(found) == "it s anna müller s 2nd fig ångström x1 5 हिन्दी 東京 京都 a b", (
        "databases hold words cut the old way: raise VERSION in postgres_schema.py and lance.py, with a migration"
    )


def test_odd_text_is_readable_in_sql_and_exact_here(store: PostgresStore) -> None:
    bank = store.bank("anna")
    bank.apply(add("nul \x00 pear", "k\ud800", ("\x00",)))
    assert sql(store, "SELECT text, key, tags FROM changes") == [("nul \ufffd pear", "k\ufffd", ["\ufffd"])]
    (hit,) = bank.match("pear", 5)
    assert (hit.entry.text, hit.entry.key, hit.entry.tags) == ("nul \x00 pear", "k\ud800", ("\x00",))


# --- crashes, threads, processes ---------------------------------------------------------------------------------

WRITER = """
import sys
from memfactory.episode import Operation
from memfactory.memory.postgres import PostgresStore
dsn, schema, owner, count = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
with PostgresStore(dsn, schema=schema) as store:
    bank = store.bank(owner)
    for index in range(count):
        done = bank.apply(Operation("ADD", text=f"{index} " + "x" * 500))
        print(done.target, flush=True)
"""


def writer(server: Any, schema: str, count: int) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WRITER, server.dsn, schema, "anna", str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("acknowledged", [1, 150])
def test_kill_of_a_client_loses_nothing_that_was_acknowledged(
    postgres_server: Any, postgres_schema: str, open_store: Open, acknowledged: int
) -> None:
    process = writer(postgres_server, postgres_schema, 1_000_000)
    assert process.stdout is not None
    seen = [process.stdout.readline().strip() for _ in range(acknowledged)]
    process.send_signal(signal.SIGKILL)
    seen += process.stdout.read().split()
    assert process.wait() == -signal.SIGKILL
    bank = open_store(lock_seconds=20).bank("anna")
    after = bank.apply(add("goes on")).target  # waits until the server has seen that the client is gone
    found = [entry.id for entry in bank.entries()]
    assert found[: len(seen)] == seen
    assert found[-1] == after == f"e{len(found)}"
    assert len(found) <= len(seen) + 2, "at most the one that was being answered, and the one after"


def test_kill_of_the_server_loses_nothing_and_the_store_goes_on(postgres_server: Any, open_store: Open) -> None:
    store = open_store(wait_seconds=2)
    bank = store.bank("anna")
    ids = [bank.apply(add(f"before {index}")).target for index in range(20)]
    postgres_server.crash()
    with pytest.raises(StoreError, match=r"could not be written(.|\n)*fix: "):
        bank.apply(add("meanwhile"))
    with pytest.raises(StoreError, match=r"see that the server runs"):
        open_store(wait_seconds=2)
    postgres_server.start()
    found = [entry.id for entry in bank.entries()]
    assert found[: len(ids)] == ids
    assert bank.apply(add("after")).target == f"e{len(found) + 1}"


def test_threads_share_one_bank(store: PostgresStore) -> None:
    bank, ids, errors = store.bank("anna"), list[str](), list[BaseException]()
    other = store.bank("ben")

    def work(name: int) -> None:
        try:
            for index in range(25):
                ids.append(bank.apply(add(f"thread {name} number {index}")).target)
                other.apply(add(f"ben {name}"))
                assert all(hit.entry.owner == "anna" for hit in bank.match(f"thread ben {name}", 3))
        except BaseException as error:  # a thread that dies says nothing by itself
            errors.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted(ids) == sorted(f"e{index + 1}" for index in range(200))
    assert (len(bank), len(other)) == (200, 200)
    assert all(entry.text.startswith("ben") for entry in other.entries())


def test_processes_share_one_bank(postgres_server: Any, postgres_schema: str, open_store: Open) -> None:
    processes = [writer(postgres_server, postgres_schema, 60) for _ in range(2)]  # they also race to create the tables
    ids = [id for process in processes for id in process.communicate()[0].split()]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(ids) == sorted(f"e{index + 1}" for index in range(120))
    assert len(open_store().bank("anna")) == 120


def test_a_process_made_by_fork_gets_its_own_connection(store: PostgresStore) -> None:
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


def test_commits_are_flushed_even_where_the_role_says_otherwise(postgres_server: Any, open_store: Open) -> None:
    lax = open_store(dsn=f"{postgres_server.dsn} options='-c synchronous_commit=off'")
    assert sql(lax, "SHOW synchronous_commit") == [("on",)], "no test can cut the power"
    local = open_store(dsn=f"{postgres_server.dsn} options='-c synchronous_commit=local'")
    assert sql(local, "SHOW synchronous_commit") == [("local",)]


# --- the schema --------------------------------------------------------------------------------------------------


def test_a_newer_schema_is_refused(open_store: Open) -> None:
    sql(open_store(), "UPDATE about SET version = 99")
    with pytest.raises(StoreError, match=r"version 99(.|\n)*fix: update memfactory"):
        open_store()


def test_an_older_schema_is_brought_up_or_refused(open_store: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    open_store().bank("anna").apply(add("kept"))
    monkeypatch.setattr(postgres_schema, "VERSION", 3)
    monkeypatch.setattr(postgres_schema, "MIGRATIONS", {1: ("ALTER TABLE banks ADD COLUMN colour text",)})
    with pytest.raises(StoreError, match="no way from 2 to 3"):
        open_store()
    monkeypatch.setitem(postgres_schema.MIGRATIONS, 2, ("UPDATE banks SET colour = 'red'",))
    errors = list[BaseException]()

    def bring_up() -> None:
        try:
            open_store()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=bring_up) for _ in range(6)]  # one does it, the others wait
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    store = open_store()
    assert sql(store, "SELECT version, colour FROM about, banks") == [(3, "red")]
    assert texts(store, "anna") == ["kept"]


def test_many_may_create_one_schema_at_once(open_store: Open, postgres_schema: str) -> None:
    ids, errors = set[str](), list[BaseException]()

    def create(name: str, all_here: threading.Barrier) -> None:
        try:
            all_here.wait()
            ids.add(open_store(schema=name).id)
        except BaseException as error:
            errors.append(error)

    for turn in range(8):
        arguments = (f"{postgres_schema} {turn}", threading.Barrier(5))
        threads = [threading.Thread(target=create, args=arguments) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (errors, len(ids)) == ([], 8)


def test_schemas_and_databases_that_are_no_bank(postgres_server: Any, open_store: Open) -> None:
    store = open_store()
    for table in ("mine (x int)", "about (x int)", "about (version text, store text)"):
        sql(
            store,
            f"DROP SCHEMA IF EXISTS foreign_one CASCADE; CREATE SCHEMA foreign_one; CREATE TABLE foreign_one.{table}",
        )
        with pytest.raises(StoreError, match="fix: "):
            open_store(schema="foreign_one")
        assert len(sql(store, "SELECT 1 FROM pg_tables WHERE schemaname = 'foreign_one'")) == 1, "nothing was written"
    with pytest.raises(StoreError, match=r"nowhere(.|\n)*fix: "):
        open_store(dsn=postgres_server.dsn.replace("dbname=postgres", "dbname=nowhere"))
    sql(store, "CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0")
    with pytest.raises(StoreError, match="LATIN1"):
        open_store(dsn=postgres_server.dsn.replace("dbname=postgres", "dbname=latin"))


def test_schema_names_are_data(open_store: Open) -> None:
    for schema in ('a"; DROP TABLE x; --', "UPPER case", "%s"):
        store = open_store(schema=schema)
        store.bank("anna").apply(add(schema))
        assert texts(open_store(schema=schema), "anna") == [schema]
    for schema in ("", "x" * 64, "\x00", "\ud800", "pg_mine"):
        with pytest.raises(StoreError, match="fix: "):
            open_store(schema=schema)


def test_a_role_that_may_not_is_told_what_it_needs(postgres_server: Any, open_store: Open) -> None:
    sql(open_store(), "DROP ROLE IF EXISTS guest; CREATE ROLE guest LOGIN")
    with pytest.raises(StoreError, match=r"permission denied(.|\n)*fix: let the role"):
        open_store(dsn=postgres_server.dsn.replace("user=memfactory", "user=guest"), schema="of guest")


# --- a failing server --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dsn", ["host=/nowhere password=hunter2", "postgresql://u:hunter2@127.0.0.1:1/x", "hunter2 ="]
)
def test_no_server_is_an_error_that_keeps_the_password(dsn: str) -> None:
    with pytest.raises(StoreError, match="fix: ") as error:
        PostgresStore(dsn, wait_seconds=2)
    assert "hunter2" not in str(error.value)


def test_a_locked_bank_is_an_error_after_the_wait(open_store: Open) -> None:
    bank = open_store(lock_seconds=0.1).bank("anna")
    bank.apply(add("kept"))
    other = open_store()
    with other.transaction() as connection:
        connection.execute("SELECT 1 FROM banks FOR UPDATE")
        with pytest.raises(StoreError, match=r"lock timeout(.|\n)*fix: (.|\n)*lock_seconds"):
            bank.apply(add("x"))
        assert len(bank) == 1, "readers do not wait"
        assert bank.apply(add("")).error == "missing text", "nor does what is refused anyway"
    assert bank.apply(add("x")).error == ""


@pytest.mark.parametrize(
    ("state", "fix"), [("53100", "free space"), ("57014", "statement_timeout"), ("53200", "memory"), ("58030", "log")]
)
def test_what_the_server_says_is_passed_on_with_a_fix(store: PostgresStore, state: str, fix: str) -> None:
    bank = store.bank("anna")
    bank.apply(add("kept"))
    # the server's own answer, made by a trigger: filling a disk would hit everybody on the machine
    sql(
        store,
        "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN RAISE EXCEPTION 'could not extend file' USING ERRCODE = '{state}'; END $$",
    )
    sql(store, "CREATE TRIGGER fail BEFORE INSERT ON present FOR EACH STATEMENT EXECUTE FUNCTION fail()")
    with pytest.raises(StoreError, match=rf"could not extend file(.|\n)*fix: (.|\n)*{fix}"):
        bank.apply_all([add("small"), add("large")])
    sql(store, "DROP TRIGGER fail ON present")
    assert texts(store, "anna") == ["kept"], "all of it or nothing"
    assert bank.apply(add("after")).target == "e2"


def test_a_connection_lost_in_the_commit_is_not_called_unchanged(store: PostgresStore) -> None:
    bank = store.bank("anna")
    sql(
        store,
        "CREATE FUNCTION leave() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END $$",
    )
    sql(
        store,
        "CREATE CONSTRAINT TRIGGER leave AFTER INSERT ON changes DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION leave()",
    )
    with pytest.raises(StoreError, match=r"not known(.|\n)*fix: look at the bank"):
        bank.apply(add("x"))
    sql(store, "DROP TRIGGER leave ON changes")
    assert bank.apply(add("y")).target == "e1"


def test_a_connection_that_the_server_ended_is_replaced(store: PostgresStore) -> None:
    bank = store.bank("anna")
    bank.apply(add("x"))
    with psycopg.connect(**store._arguments) as other:
        other.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
    assert bank.apply(add("y")).target == "e2"


def test_too_few_connections_and_a_closed_store_say_so(open_store: Open) -> None:
    store = open_store(connections=1, wait_seconds=0.2)
    bank = store.bank("anna")
    with store.connection(), pytest.raises(StoreError, match=r"in use(.|\n)*fix: pass more `connections`"):
        bank.apply(add("x"))
    store.close()
    with pytest.raises(StoreError, match="closed"):
        bank.apply(add("x"))

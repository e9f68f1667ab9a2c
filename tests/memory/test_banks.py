"""All banks against a plain model: any sequence of operations, snapshots, restores and forks."""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memfactory.episode import Operation
from memfactory.errors import StoreError
from memfactory.memory.bank import EntryBank
from memfactory.memory.entries import Bank, Change, Entry, Verb
from memfactory.memory.operations import Limits, Refusal
from memfactory.memory.sqlite import SqliteStore

ODD = "a'; DROP TABLE changes; --|\x00|\ud800|\ud83d\ude00|שלום|مرحبا|\u202e|\U0001f600|%s {x} \" \\"
LIMITS = Limits(text=2_000_000)


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def bank(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bank]:
    if request.param == "memory":
        yield EntryBank("anna", limits=LIMITS)
    elif request.param == "postgres":
        server, schema = request.getfixturevalue("postgres_server"), request.getfixturevalue("postgres_schema")
        from memfactory.memory.postgres import PostgresStore

        with PostgresStore(server.dsn, schema=schema, limits=LIMITS) as store:
            yield store.bank("anna")
    else:
        with SqliteStore(tmp_path / "bank.db", limits=LIMITS) as store:
            yield store.bank("anna")


def add(text: str, **fields: Any) -> Operation:
    return Operation("ADD", text=text, **fields)


def test_all_keep_the_contract(bank: Bank) -> None:
    assert isinstance(bank, Bank)
    assert (bank.owner, len(bank), list(bank.entries()), bank.get("e1")) == ("anna", 0, [], None)


def test_add_update_delete_and_their_history(bank: Bank) -> None:
    made = bank.apply(add("Anna lives in Rome", key="anna.city", tags=("city",), time="2024-01-02"), turn=3)
    assert (made.target, made.error) == ("e1", "")
    rome = Entry("e1", "Anna lives in Rome", "anna.city", ("city",), "2024-01-02", "anna", 3)
    assert bank.get("e1") == rome
    assert bank.apply(Operation("UPDATE", "e1", "Anna lives in Oslo"), turn=5).error == ""
    oslo = replace(rome, text="Anna lives in Oslo", turn=5)
    assert list(bank.entries()) == [oslo], "what the operation leaves empty stays"
    bank.apply(Operation("UPDATE", "e1", "moved", key="k", tags=("t", "u"), time="2025"), turn=6)
    moved = Entry("e1", "moved", "k", ("t", "u"), "2025", "anna", 6)
    assert bank.apply(Operation("DELETE", "e1"), turn=7).error == ""
    assert bank.get("e1") is None
    assert len(bank) == 0
    assert list(bank.history("e1")) == [
        Change(Verb.ADD, None, rome, 3),
        Change(Verb.UPDATE, rome, oslo, 5),
        Change(Verb.UPDATE, oslo, moved, 6),
        Change(Verb.DELETE, moved, None, 7),
    ]
    assert bank.apply(add("next")).target == "e2", "ids are never given again"


def test_update_with_the_same_text_is_carried_out_and_seen(bank: Bank) -> None:
    bank.apply(add("x"), turn=1)
    assert bank.apply(Operation("UPDATE", "e1", "x"), turn=2).error == ""
    assert [change.turn for change in bank.history("e1")] == [1, 2]


REFUSED: list[tuple[Any, Refusal]] = [
    (Operation("MERGE", text="x"), Refusal.UNKNOWN_VERB),
    (Operation("add", text="x"), Refusal.UNKNOWN_VERB),
    (Operation("", text="x"), Refusal.UNKNOWN_VERB),
    (Operation([], text="x"), Refusal.UNKNOWN_VERB),  # type: ignore[arg-type]
    (Operation("ADD"), Refusal.MISSING_TEXT),
    (Operation("ADD", text=" \n\t"), Refusal.MISSING_TEXT),
    (Operation("UPDATE", "e1"), Refusal.MISSING_TEXT),
    (Operation("UPDATE", text="x"), Refusal.MISSING_ID),
    (Operation("DELETE"), Refusal.MISSING_ID),
    *((Operation("DELETE", id), Refusal.UNKNOWN_ID) for id in ("e2", "e0", "e01", "1", " e1", "e1 ", "e\u0661", "E1")),
    (Operation("DELETE", "e" + "9" * 5000), Refusal.UNKNOWN_ID),
    (Operation("UPDATE", ODD, "x"), Refusal.UNKNOWN_ID),
    (Operation("DELETE", 1), Refusal.WRONG_TYPE),  # type: ignore[arg-type]
    (Operation("ADD", text=7), Refusal.WRONG_TYPE),  # type: ignore[arg-type]
    (Operation("ADD", text="x", key=None), Refusal.WRONG_TYPE),  # type: ignore[arg-type]
    (Operation("ADD", text="x", tags=("a", 1)), Refusal.WRONG_TYPE),  # type: ignore[arg-type]
    (Operation("ADD", text="x" * (LIMITS.text + 1)), Refusal.TEXT_TOO_LONG),
    (Operation("ADD", text="x", key="k" * 1001), Refusal.LABEL_TOO_LONG),
    (Operation("ADD", text="x", time="k" * 1001), Refusal.LABEL_TOO_LONG),
    (Operation("ADD", text="x", tags=("t" * 1001,)), Refusal.LABEL_TOO_LONG),
    (Operation("ADD", text="x", tags=("t",) * 65), Refusal.LABEL_TOO_LONG),
]


def test_what_cannot_be_carried_out_changes_nothing_and_says_why(bank: Bank) -> None:
    bank.apply(add("kept", key="k"), turn=0)
    before = (list(bank.entries()), list(bank.history("e1")))
    for operation, reason in REFUSED:
        result = bank.apply(operation, turn=9)
        assert result == replace(operation, error=reason.value)
        assert type(result.error) is str
    assert (list(bank.entries()), list(bank.history("e1"))) == before
    assert bank.apply(add("next")).target == "e2", "a refused ADD uses no id"


def test_none_and_what_a_parser_could_not_read_change_nothing(bank: Bank) -> None:
    for operation in (Operation("NONE"), Operation("NONE", "e9", "x"), Operation("ADD", text="x", error="not JSON")):
        assert bank.apply(operation) is operation
    assert len(bank) == 0


def test_an_id_named_by_add_is_replaced(bank: Bank) -> None:
    asked = Operation("ADD", "e77", "x", "k", ("t",), "2024")
    assert bank.apply(asked) == replace(asked, target="e1")


def test_odd_text_stays_text(bank: Bank) -> None:
    for text in (ODD, "x" * 1_000_000, "\ud800", "\x00", "\ufeff\u200b"):
        id = bank.apply(add(text, key=ODD, tags=(ODD, ""), time=ODD)).target
        assert bank.get(id) == Entry(id, text, ODD, (ODD, ""), ODD, "anna", None)
    assert bank.get(ODD) is None
    assert list(bank.history(ODD)) == []


def test_restore_goes_back_and_forth_and_takes_no_id_back(bank: Bank) -> None:
    empty = bank.snapshot()
    bank.apply(add("one"))
    bank.apply(add("two"))
    bank.apply(Operation("UPDATE", "e1", "one b"))
    bank.apply(Operation("DELETE", "e2"))
    late, entries, histories = bank.snapshot(), list(bank.entries()), [list(bank.history(id)) for id in ("e1", "e2")]
    bank.restore(empty)
    assert (len(bank), list(bank.history("e1")), list(bank.history("e2"))) == (0, [], [])
    assert bank.apply(add("three")).target == "e3"
    bank.restore(late)
    assert (list(bank.entries()), [list(bank.history(id)) for id in ("e1", "e2")]) == (entries, histories)
    assert list(bank.history("e3")) == []
    bank.restore(empty)
    bank.restore(empty)
    assert len(bank) == 0


def test_forks_are_independent_and_count_alike(bank: Bank) -> None:
    bank.apply(add("shared"))
    point = bank.snapshot()
    fork = bank.fork()
    assert fork.owner == bank.owner
    assert fork.apply(add("of the fork")).target == bank.apply(add("of the bank")).target == "e2"
    fork.apply(Operation("DELETE", "e1"))
    assert [entry.text for entry in bank.entries()] == ["shared", "of the bank"]
    assert [entry.text for entry in fork.entries()] == ["of the fork"]
    fork.restore(point)
    assert [entry.text for entry in fork.entries()] == ["shared"]
    assert len(bank) == 2


def test_a_foreign_snapshot_is_an_error_with_a_fix(bank: Bank, tmp_path: Path) -> None:
    bank.apply(add("kept"))
    with SqliteStore(tmp_path / "other.db") as store:
        foreign = [EntryBank("ben").snapshot(), store.bank("anna").snapshot(), "text"]
        foreign += [] if isinstance(bank, EntryBank) else [EntryBank("anna").snapshot()]
    for snapshot in foreign:
        with pytest.raises(StoreError, match="fix: "):
            bank.restore(snapshot)
    assert len(bank) == 1


def test_a_bank_in_memory_and_its_snapshot_pickle() -> None:
    bank = EntryBank("anna")
    for index in range(50):
        bank.apply(add(f"text {index}"))
    for _ in range(5000):
        bank.apply(Operation("UPDATE", "e7", "again"))
    snapshot = pickle.loads(pickle.dumps(bank.snapshot()))
    other = EntryBank("anna")
    other.restore(snapshot)
    for same in (other, pickle.loads(pickle.dumps(bank)), copy.deepcopy(bank)):
        assert same.entries() == bank.entries()
        assert same.history("e7") == bank.history("e7")
        assert same.apply(add("x")).target == "e51"


# --- any sequence ------------------------------------------------------------------------------------------------


@dataclass
class Model:
    """A bank as one would write it without a thought for cost: dicts, copied whole."""

    present: dict[str, Entry] = field(default_factory=dict)
    log: dict[str, list[Change]] = field(default_factory=dict)
    given: int = 0

    def apply(self, operation: Operation, turn: int) -> tuple[str, str]:
        """Target and error."""
        verb, target = operation.verb, operation.target
        if verb not in ("ADD", "UPDATE", "DELETE", "NONE"):
            return target, "unknown verb"
        if verb == "NONE":
            return target, ""
        if verb != "ADD" and not target:
            return target, "missing id"
        if verb != "DELETE" and not operation.text.strip():
            return target, "missing text"
        if verb == "ADD":
            self.given += 1
            target, before = f"e{self.given}", None
        elif target not in self.present:
            return target, "unknown id"
        else:
            before = self.present[target]
        after = None
        if verb != "DELETE":
            old = before or Entry(target, "")
            after = Entry(
                target,
                operation.text,
                operation.key or old.key,
                operation.tags or old.tags,
                operation.time or old.time,
                "o",
                turn,
            )
            self.present[target] = after
        else:
            del self.present[target]
        self.log.setdefault(target, []).append(Change(Verb(verb), before, after, turn))
        return target, ""

    def copied(self) -> Model:
        return Model(dict(self.present), {id: list(steps) for id, steps in self.log.items()}, self.given)


labels = st.sampled_from(["", "", "k", ODD]) | st.text(st.characters(), max_size=3)
operations = st.builds(
    Operation,
    verb=st.sampled_from(["ADD", "ADD", "UPDATE", "UPDATE", "DELETE", "NONE", "MOVE"]),
    target=st.sampled_from(["", "e1", "e1", "e2", "e3", "e4", "e9", "x"]),
    text=st.sampled_from(["", " ", "one", "two", ODD]) | st.text(st.characters(), max_size=4),
    key=labels,
    tags=st.lists(labels, max_size=2).map(tuple),
    time=labels,
)
steps = st.lists(
    st.one_of(
        operations,
        operations,
        st.tuples(st.sampled_from(["snapshot", "restore", "restore", "fork", "switch"]), st.integers(0, 5)),
    ),
    max_size=25,
)


def check(first: Bank, script: list[Any]) -> None:
    """Carry `script` out on the bank and on the model; `switch` goes to another of the forks made so far."""
    banks: list[tuple[Any, Model]] = [(first, Model())]
    shots: list[tuple[Any, Model]] = [(first.snapshot(), Model())]
    at = 0
    for turn, step in enumerate(script):
        bank, model = banks[at]
        if isinstance(step, Operation):
            result = bank.apply(step, turn=turn)
            assert (result.target, result.error) == model.apply(step, turn)
        elif step[0] == "snapshot":
            shots.append((bank.snapshot(), model.copied()))
        elif step[0] == "restore":
            shot, kept = shots[step[1] % len(shots)]
            bank.restore(shot)
            banks[at] = (bank, replace(kept.copied(), given=max(kept.given, model.given)))
        elif step[0] == "fork":
            banks.append((bank.fork(), model.copied()))
        else:
            at = step[1] % len(banks)
        for bank, model in banks:  # all of them: what happens to one must not show in another
            assert list(bank.entries()) == sorted(model.present.values(), key=lambda entry: int(entry.id[1:]))
            assert len(bank) == len(model.present)
            for id in ("e1", "e2", "e3", "e9"):
                assert bank.get(id) == model.present.get(id)
                assert list(bank.history(id)) == model.log.get(id, [])


@given(steps)
@settings(max_examples=200)
def test_memory_is_the_model(script: list[Any]) -> None:
    check(EntryBank("o"), script)


@given(steps)
@settings(max_examples=60)
def test_sqlite_is_the_model(script: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder, SqliteStore(Path(folder) / "bank.db") as store:
        others = store.bank("p")
        others.apply(add("of another owner"))
        bank = store.bank("o")
        check(bank, script)
        assert [entry.text for entry in others.entries()] == ["of another owner"]
        with SqliteStore(store.path) as again:
            assert list(again.bank("o").entries()) == list(bank.entries()), "it is all in the file"
        integrity = store.connection().execute("PRAGMA integrity_check").fetchone()
        store.connection().execute("INSERT INTO words (words, rank) VALUES ('integrity-check', 1)")
        assert integrity == ("ok",)


def test_postgres_is_the_model(postgres_server: Any, postgres_schema: str) -> None:
    from memfactory.memory.postgres import PostgresStore

    with PostgresStore(postgres_server.dsn, schema=postgres_schema) as store, store.connection() as connection:
        others = store.bank("p")
        others.apply(add("of another owner"))

        @given(steps)
        @settings(max_examples=30)
        def run(script: list[Any]) -> None:
            store.forget("o")
            bank = store.bank("o")
            check(bank, script)
            assert [entry.text for entry in others.entries()] == ["of another owner"]
            with PostgresStore(postgres_server.dsn, schema=postgres_schema) as again:
                assert list(again.bank("o").entries()) == list(bank.entries()), "it is all in the database"

        run()
        store.forget("o")
        for table in ("owners", "banks", "changes", "present"):
            assert connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (1,), "nothing is left behind"


@pytest.mark.slow
def test_a_hundred_thousand_entries() -> None:
    bank = EntryBank()
    for index in range(100_000):
        bank.apply(add(f"fact {index}"))
    fork = bank.fork()
    for index in range(0, 100_000, 10):
        fork.apply(Operation("DELETE", f"e{index + 1}"))
    assert (len(bank), len(fork), len(fork.entries())) == (100_000, 90_000, 90_000)
    assert bank.entries()[-1].id == "e100000"

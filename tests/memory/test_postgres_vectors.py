"""Search by meaning in PostgreSQL: what is found is what the exact search in this process finds."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from memfactory.episode import Operation
from memfactory.errors import EngineError, StoreError
from memfactory.search import DenseSearcher, sync

pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'memfactory[postgres]'")
from memfactory.memory.postgres import PostgresStore
from memfactory.memory.postgres_vectors import PostgresVectors


class Letters:
    """A vector of letter counts: texts are near where they share letters."""

    def __init__(self, width: int = 26) -> None:
        self.width, self.calls = width, list[str]()

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        self.calls.extend(texts)
        if "FAIL" in texts:
            raise RuntimeError("away")
        counts = [[text.lower().count(chr(97 + i)) + 0.01 for i in range(self.width)] for text in texts]
        return np.array(counts, dtype=np.float32)


def add(text: str, key: str = "") -> Operation:
    return Operation("ADD", text=text, key=key)


@pytest.fixture
def store(postgres_server: Any, postgres_schema: str) -> Iterator[PostgresStore]:
    with PostgresStore(postgres_server.dsn, schema=postgres_schema) as store:
        yield store


@pytest.fixture
def vector_store(store: PostgresStore) -> PostgresStore:
    if not has_pgvector(store):
        pytest.skip("the server has no pgvector: apt-get install postgresql-15-pgvector, or pip install pgserver")
    return store


def has_pgvector(store: PostgresStore) -> bool:
    with store.connection() as connection:
        query = "SELECT 1 FROM pg_available_extensions WHERE name = 'vector'"
        return connection.execute(query).fetchone() is not None


def test_a_server_without_pgvector_is_an_error_with_the_way_to_it(store: PostgresStore) -> None:
    if has_pgvector(store):
        pytest.skip("this server has pgvector")
    with pytest.raises(StoreError, match=r"no pgvector(.|\n)*fix: install it on the server(.|\n)*DenseSearcher"):
        PostgresVectors(store.bank("anna"), Letters(), model="letters")
    store.bank("anna").apply(add("and everything else goes on"))


def test_it_finds_what_the_search_in_this_process_finds(vector_store: PostgresStore) -> None:
    draw = np.random.default_rng(0)
    bank, other = vector_store.bank("anna"), vector_store.bank("ben")
    texts = ["".join(chr(97 + i) for i in draw.integers(0, 26, 12)) for _ in range(300)]
    bank.apply_all([add(text, "k") for text in [*texts, "nul \x00 \ud800", *texts[:5]]])
    other.apply_all([add(text) for text in texts])
    embedder = Letters()
    index, dense = PostgresVectors(bank, embedder, model="letters"), DenseSearcher(Letters(), "anna")
    PostgresVectors(other, embedder, model="letters").refresh()
    sync(dense, bank.entries())
    for query in texts[:20]:
        for k in (1, 10, 1000):
            found, wanted = index.search(query, k), dense.search(query, k)
            assert [hit.score for hit in found] == pytest.approx([hit.score for hit in wanted], abs=1e-5)
        assert {hit.entry.owner for hit in found} == {"anna"}
        assert {hit.entry.id for hit in found[:2]} >= {dense.search(query, 1)[0].entry.id}
    assert index.search(texts[0], 0) == index.search(" \n", 5) == []


def test_changes_forks_and_restores_are_followed_and_embedded_once(vector_store: PostgresStore) -> None:
    bank, embedder = vector_store.bank("anna"), Letters()
    index = PostgresVectors(bank, embedder, model="letters")
    assert index.search("aaa", 5) == []
    bank.apply_all([add("aaa"), add("bbb"), add("ccc")])
    assert [hit.entry.id for hit in index.search("aaa", 1)] == ["e1"]
    point, fork = bank.snapshot(), bank.fork()
    bank.apply(Operation("UPDATE", "e1", "zzz"))
    bank.apply(Operation("DELETE", "e2"))
    assert [hit.entry.id for hit in index.search("zzz", 1)] == ["e1"]
    assert {hit.entry.id for hit in index.search("bbb", 9)} == {"e1", "e3"}
    embedder.calls.clear()
    of_fork = PostgresVectors(fork, Letters(), model="letters")
    assert [hit.entry.id for hit in of_fork.search("bbb", 1)] == ["e2"]
    bank.restore(point)
    assert [hit.entry.text for hit in index.search("aaa", 1)] == ["aaa"]
    assert index.refresh() == of_fork.refresh() == 0
    assert embedder.calls == [], "texts and queries that were seen before"
    vector_store.forget("anna")
    with vector_store.connection() as connection:
        assert connection.execute("SELECT count(*) FROM vectors").fetchone() == (0,)


def test_an_embedder_that_fails_leaves_the_bank_in_use(vector_store: PostgresStore) -> None:
    bank = vector_store.bank("anna")
    index = PostgresVectors(bank, Letters(), model="letters")
    bank.apply_all([add(f"text {index}") for index in range(5)])
    bank.apply(add("FAIL"))
    with pytest.raises(EngineError, match="away"):
        index.search("text", 3)
    bank.apply(Operation("UPDATE", "e6", "fixed"))
    assert len(index.search("text", 9)) == 6


def test_two_models_lie_side_by_side_and_are_never_mixed(vector_store: PostgresStore) -> None:
    bank = vector_store.bank("anna")
    bank.apply(add("aaa"))
    for width in (26, 10):
        assert len(PostgresVectors(bank, Letters(width), model=f"'; {width} --").search("a", 5)) == 1
    PostgresVectors(bank, Letters(26), model="same").refresh()
    with pytest.raises(StoreError, match=r"different vector dimensions(.|\n)*fix: (.|\n)*`model`"):
        PostgresVectors(bank, Letters(10), model="same").search("a", 5)


def test_threads_begin_at_once(vector_store: PostgresStore) -> None:
    bank = vector_store.bank("anna")
    bank.apply_all([add(f"text {chr(97 + index % 26) * 5}") for index in range(100)])
    found, errors = list[str](), list[BaseException]()

    def work() -> None:
        try:
            index = PostgresVectors(bank, Letters(), model="letters")
            found.append(index.search("xxxxx", 1)[0].entry.id)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (errors, found) == ([], ["e24"] * 6)

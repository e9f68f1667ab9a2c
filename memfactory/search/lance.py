"""`LanceSearcher`: an index on disk for banks too large for memory, in LanceDB (Apache-2.0).

It follows a bank and is no store of its own: the bank holds what was remembered, `sync` brings the index up to it
after a crash or a pause. One table per owner, named by a digest of the owner, and entries by the number in their id:
no text of a user or a model ever stands in a filter or a path.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable, Iterable, Sequence, Set
from datetime import timedelta
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from memfactory.errors import StoreError, boundary
from memfactory.memory.entries import Entry
from memfactory.memory.operations import entry_id, entry_number
from memfactory.search.base import Hit, content
from memfactory.search.embedding import CachedEmbedder, Embedder
from memfactory.search.hybrid import K0, fuse
from memfactory.search.slots import Slots
from memfactory.search.tokens import ENGLISH, words

VERSION = "1"
"""Of the tables, and of how `words` cuts text. There is no migration: an index is made again from its bank."""
QUERY_WORDS = 64
"""Different words of a query that are looked for."""
TIDY_EVERY = 50
"""Changes after which small files are joined and new words indexed; every change writes a file of its own."""
KEEP = timedelta(hours=1)
"""How long files that were replaced stay, for processes that still read them."""
SAME = 1e-3
"""How far apart the probes of one model may lie, a number of a unit vector."""
_PROBE = "which model is this?"
_AGAIN = "remove the folder, and bring a new index up with sync(searcher, bank.entries())"


class LanceSearcher:
    """The entries of one owner on disk: by words, and with an embedder also by meaning, fused by ranks.

    Keeps the contract of :class:`~memfactory.search.base.Searcher`, with these differences: entries must carry ids of
    a bank (``e1`` ...), whose numbers are their order; which of several equals at the `k`-th place comes back is
    LanceDB's choice; how rare a word is counts replaced versions too until the next tidying. Threads may share it.
    Other processes may read, and see changes at once; let one process write. Not for a process made by ``os.fork``.

    Args:
        folder: of the tables; created where there is none.
        owner: whose entries these are.
        embedder: None searches by words alone.
        name: of a fork; empty for the owner's own index.
        weights: of words and of meaning. Where one is 0 the other is asked alone, and its scores are BM25 or cosines.
        k0: how little the first ranks stand out.
        depth: how far down each ranking counts.
        stopwords: words of a query to leave out. None: English ones with an embedder (see SearchOptions), else none.
        query_prefix: what the model wants before a query, e.g. ``query: `` for E5.
        entry_prefix: what it wants before an entry, e.g. ``passage: ``.

    Raises:
        StoreError: lancedb is not installed, the folder cannot be used, or was made with another embedder.
        EngineError: the embedder failed.
    """

    def __init__(
        self,
        folder: str | Path,
        owner: str = "",
        embedder: Embedder | None = None,
        *,
        name: str = "",
        weights: tuple[float, float] = (1.0, 1.0),
        k0: float = K0,
        depth: int = 100,
        stopwords: Set[str] | None = None,
        query_prefix: str = "",
        entry_prefix: str = "",
    ) -> None:
        self.folder, self.owner, self.name = str(folder), owner, name
        self.weights, self.k0, self.depth = weights if embedder is not None else (1.0, 0.0), k0, depth
        self.stopwords = (ENGLISH if embedder is not None else frozenset()) if stopwords is None else stopwords
        self.query_prefix, self.entry_prefix = query_prefix, entry_prefix
        self.embedder: CachedEmbedder | None = None
        if embedder is not None:  # not by truth: one whose cache is empty counts as false
            self.embedder = embedder if isinstance(embedder, CachedEmbedder) else CachedEmbedder(embedder)
        self._lock = threading.RLock()
        self._changes = 0
        with boundary(StoreError, "LanceSearcher needs lancedb", 'pip install "memfactory[lancedb]"'):
            self._arrow, self._lance = import_module("pyarrow"), import_module("lancedb")
            self._index, self._query = import_module("lancedb.index"), import_module("lancedb.query")
        self._schema = self._made_schema()
        # the owner's digest first: what belongs to the owner and what to the name must not be confused
        whose = sha256(owner.encode("utf-8", "surrogatepass")).digest()
        self._table_name = f"entries_{sha256(whose + name.encode()).hexdigest()[:40]}"
        with self._guard("opened"):
            # no interval: what another process wrote is seen by the next search
            self._database = self._lance.connect(self.folder, read_consistency_interval=timedelta(0))
            try:
                self._table = self._database.open_table(self._table_name)
            except (ValueError, FileNotFoundError):  # there is none; exist_ok: another process may be faster
                self._table = self._database.create_table(self._table_name, schema=self._schema, exist_ok=True)
            self._check(self._table.schema)
            if not self._table.list_indices():
                self._table.create_index("words", config=self._words_index())

    def _made_schema(self) -> Any:
        arrow = self._arrow
        columns = [("number", arrow.int64()), ("entry", arrow.binary()), ("words", arrow.string())]
        about = {"version": VERSION}
        if self.embedder is not None:
            probe = self.embedder.embed([_PROBE])[0]  # (d,)
            columns.append(("vector", arrow.list_(arrow.float32(), len(probe))))
            about["probe"] = json.dumps(probe.tolist())
        return arrow.schema(columns, metadata=about)

    def _check(self, found: Any) -> None:
        had, has = ({k.decode(): v.decode() for k, v in (s.metadata or {}).items()} for s in (found, self._schema))
        probes = [np.array(json.loads(about.get("probe", "[]"))) for about in (had, has)]
        if had.get("version") != VERSION:
            raise StoreError(f"the index in {self.folder} cannot be used", "it is of another version", _AGAIN)
        if probes[0].shape != probes[1].shape or np.abs(probes[0] - probes[1]).max(initial=0) > SAME:
            raise StoreError(f"the index in {self.folder} cannot be used", "another embedder made it", _AGAIN)

    def _words_index(self) -> Any:
        # the words are cut before they come here (see `words`), so that entries and queries are cut alike
        return self._index.FTS(
            base_tokenizer="whitespace",
            lower_case=False,
            stem=False,
            remove_stop_words=False,
            ascii_folding=False,
            max_token_length=None,
        )

    def _guard(self, done: str) -> Any:
        return boundary(StoreError, f"the index in {self.folder} could not be {done}", f"check the disk; or {_AGAIN}")

    def put(self, entries: Iterable[Entry]) -> None:
        todo = Slots(self.owner).checked(entries)
        numbers = [entry_number(entry.id) for entry in todo]
        for entry, number in zip(todo, numbers, strict=True):
            if number is None:
                raise StoreError(f"entry {entry.id!r} not indexed", "it is no id of a bank", "use ids like e1, e2")
        if not todo:
            return
        texts = [content(entry) for entry in todo]
        columns: dict[str, Any] = {
            "number": numbers,
            "entry": [_packed(entry) for entry in todo],
            "words": [" ".join(words(text)) for text in texts],
        }
        if self.embedder is not None:
            # (n, d); blank texts become zeros, which are not kept, so that they are never found
            vectors = self.embedder.embed([self.entry_prefix + text if text.strip() else "" for text in texts])
            columns["vector"] = [vector if vector.any() else None for vector in vectors]
        with self._lock, self._guard("written"):
            rows = self._arrow.table(columns, schema=self._schema)
            merge = self._table.merge_insert("number").when_matched_update_all().when_not_matched_insert_all()
            merge.execute(rows, on_bad_vectors="null")
            self._tidy_sometimes()

    def remove(self, ids: Iterable[str]) -> None:
        numbers = [number for id in dict.fromkeys(ids) if (number := entry_number(id)) is not None]
        with self._lock, self._guard("written"):
            for at in range(0, len(numbers), 1000):
                self._table.delete(f"number IN ({', '.join(map(str, numbers[at : at + 1000]))})")
                self._tidy_sometimes()

    def arrange(self, ids: Sequence[str]) -> None:
        """Does nothing: the order is that of the numbers in the ids, which is the order of every bank."""

    def search(self, query: str, k: int) -> list[Hit]:
        if k < 1 or not query.strip():
            return []
        if not self.weights[1]:
            return self._by_words(query, k)
        if not self.weights[0]:
            return self._by_meaning(query, k)
        depth = max(k, self.depth)
        rankings = [self._by_words(query, depth), self._by_meaning(query, depth)]
        entries = {hit.entry.id: hit.entry for hits in rankings for hit in hits}
        scores = fuse([[hit.entry.id for hit in hits] for hits in rankings], self.weights, self.k0)
        return _ranked((Hit(entries[id], score) for id, score in scores.items()), k)

    def _by_words(self, query: str, k: int) -> list[Hit]:
        asked = list(dict.fromkeys(words(query, self.stopwords)))[:QUERY_WORDS]
        if not asked:
            return []
        with self._guard("searched"):
            match = self._query.MatchQuery(" ".join(asked), "words")
            search = self._table.search(match, query_type="fts").select(["number", "entry", "_score"])
            return self._hits(search.limit(k), lambda row: row["_score"], k)

    def _by_meaning(self, query: str, k: int) -> list[Hit]:
        assert self.embedder is not None
        asked = self.embedder.embed([self.query_prefix + query])[0]  # (d,)
        with self._guard("searched"):
            search = self._table.search(asked, vector_column_name="vector").distance_type("dot")
            # of an approximate index, how many cells are read, and how many times k are compared exactly
            search = search.nprobes(64).refine_factor(20).select(["number", "entry", "_distance"])
            return self._hits(search.limit(k), lambda row: 1 - row["_distance"], k)

    def _hits(self, search: Any, score: Callable[[dict[str, Any]], float], k: int) -> list[Hit]:
        return _ranked((Hit(self._entry(row), score(row)) for row in search.to_arrow().to_pylist()), k)

    def entries(self) -> list[Entry]:
        with self._guard("read"):
            rows = self._table.search().select(["number", "entry"]).to_arrow().to_pylist()
        return [self._entry(row) for row in sorted(rows, key=lambda row: row["number"])]

    def _entry(self, row: dict[str, Any]) -> Entry:
        text, key, tags, time, turn = json.loads(row["entry"].decode("utf-8", "surrogatepass"))
        return Entry(entry_id(row["number"]), text, key, tuple(tags), time, self.owner, turn)

    def fork(self) -> LanceSearcher:
        """An independent index that begins in this state: a copy of all rows, on disk until `discard`."""
        copy = LanceSearcher(
            self.folder,
            self.owner,
            self.embedder,
            name=secrets.token_hex(8),
            weights=self.weights,
            k0=self.k0,
            depth=self.depth,
            stopwords=self.stopwords,
            query_prefix=self.query_prefix,
            entry_prefix=self.entry_prefix,
        )
        with self._guard("copied"):
            if len(self):
                copy._table.add(self._table.search().to_batches(1000))
            copy.tidy()
        return copy

    def discard(self) -> None:
        """Remove this index from the disk; it is not to be used afterwards."""
        with self._lock, self._guard("removed"):
            self._database.drop_table(self._table_name)

    def tidy(self) -> None:
        """Join small files, index new words, and remove what was replaced more than `KEEP` ago."""
        with self._lock, self._guard("tidied"):
            self._table.optimize(cleanup_older_than=KEEP)
            self._changes = 0

    def _tidy_sometimes(self) -> None:
        self._changes += 1
        if self._changes >= TIDY_EVERY:
            self.tidy()

    def approximate(self) -> None:
        """Build an approximate index of the vectors: for hundreds of thousands of entries; takes seconds to minutes.

        Without it the search by meaning is exact. `tidy` adds to it what came later.
        """
        with self._lock, self._guard("indexed"):
            self._table.create_index("vector", config=self._index.IvfPq(distance_type="dot"))

    def __len__(self) -> int:
        with self._guard("read"):
            return int(self._table.count_rows())


def _packed(entry: Entry) -> bytes:
    """As bytes, because half of a surrogate pair is in no text of Arrow."""
    fields = (entry.text, entry.key, entry.tags, entry.time, entry.turn)
    return json.dumps(fields, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _ranked(hits: Iterable[Hit], k: int) -> list[Hit]:
    """Best first, equals in the order of the entries."""
    return sorted(hits, key=lambda hit: (-hit.score, entry_number(hit.entry.id) or 0))[:k]

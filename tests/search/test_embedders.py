"""The embedders: mean pooling over a real encoder, a real HTTP endpoint, and errors that come with the fix."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from memfactory.errors import EngineError, ServiceError
from memfactory.search import CachedEmbedder
from memfactory.search.embedders import SentenceTransformersEmbedder, TransformersEmbedder
from memfactory.search.endpoint import EndpointEmbedder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT with its tokenizer, in a folder."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("encoder")
    vocabulary = {word: at for at, word in enumerate("[PAD] [UNK] anna likes tea in the morning".split())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def test_the_mean_is_over_tokens_and_not_over_padding(encoder: Path) -> None:
    import torch
    from transformers import AutoModel

    embedder = TransformersEmbedder(str(encoder), batch=2)
    texts = ["anna", "anna likes tea in the morning", "tea", "anna " * 100]
    together = embedder.embed(texts)
    assert together.shape == (4, 32)
    assert together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-5)
    alone = np.concatenate([embedder.embed([text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    model = AutoModel.from_pretrained(encoder).eval()
    with torch.inference_mode():
        mean = model(torch.tensor([[2, 3, 4, 5, 6, 7]])).last_hidden_state[0].mean(0).numpy()
    np.testing.assert_allclose(together[1], mean / np.linalg.norm(mean), atol=1e-5)
    assert embedder.embed([]).shape == (0, 32)


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(EngineError, match="could not be loaded"):
        TransformersEmbedder(str(tmp_path))


def test_a_missing_library_comes_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    with pytest.raises(EngineError, match="pip install sentence-transformers"):
        SentenceTransformersEmbedder("any")


class Endpoint(BaseHTTPRequestHandler):
    """Vectors by the length of the text, last one first; what else it does is in the server's `plan`."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, self.headers.get("Authorization"), body))
        status, answer = self.server.plan.pop(0) if self.server.plan else (200, None)
        if answer == "wait":
            time.sleep(1.0)
        if answer == "pause":
            time.sleep(0.2)
            answer = None
        if answer is None:
            data = [{"index": at, "embedding": [len(text), 1.0]} for at, text in enumerate(body["input"])]
            answer = json.dumps({"data": data[::-1]})
        try:
            if answer == "slow headers":
                for byte in b"HTTP/1.0 200 OK\r\nX-Slow: " + b"x" * 60:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.05)
                return
            self.send_response(status)
            self.end_headers()
            for byte in answer.encode() if answer == "a slow answer" * 5 else b"":
                self.wfile.write(bytes([byte]))
                time.sleep(0.05)
            self.wfile.write(answer.encode())
        except OSError:
            pass  # the caller's deadline was over

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    server.plan, server.seen = [], []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def _embedder(server: ThreadingHTTPServer, **options: object) -> EndpointEmbedder:
    return EndpointEmbedder(f"http://127.0.0.1:{server.server_port}/v1/", "small", **options)


def test_an_endpoint_is_asked_in_batches(server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "secret")
    rows = _embedder(server, batch=2, api_key_env="SOME_KEY").embed(["a", "bb", "ccc"])
    np.testing.assert_array_equal(rows, [[1, 1], [2, 1], [3, 1]])
    assert [(path, key) for path, key, _ in server.seen] == [("/v1/embeddings", "Bearer secret")] * 2
    assert server.seen[0][2] == {"model": "small", "input": ["a", "bb"]}
    cached = CachedEmbedder(_embedder(server)).embed(["a", "\ud800"])
    np.testing.assert_allclose(np.linalg.norm(cached, axis=1), 1, rtol=1e-6)


def test_an_endpoint_that_is_busy_is_asked_again(server: ThreadingHTTPServer) -> None:
    server.plan = [(503, "busy"), (429, "slow down")]
    assert _embedder(server).embed(["a"]).tolist() == [[1, 1]]
    assert len(server.seen) == 3


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ((401, "who are you"), "HTTP 401: who are you"),
        ((404, "no"), "HTTP 404"),
        ((200, "<html>"), "answer not read.*<html>"),
        ((200, "[]"), "answer not read"),
        ((200, '{"data": []}'), "not one vector per text"),
        ((200, '{"data": [{"index": 3, "embedding": [1.0]}]}'), "not one vector per text"),
        ((200, '{"data": [{"index": 0, "embedding": "text"}]}'), "answer not read"),
    ],
)
def test_an_answer_that_is_none_is_not_asked_for_again(
    server: ThreadingHTTPServer, answer: tuple[int, str], why: str
) -> None:
    server.plan = [answer]
    with pytest.raises(ServiceError, match=why):
        _embedder(server).embed(["a"])
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    "plan",
    [[(200, "wait")], [(503, "busy")] * 99, [(200, "a slow answer" * 5)], [(200, "slow headers")]],
    ids=["nothing", "busy", "a byte now and then", "headers now and then"],
)
def test_the_deadline_is_kept(server: ThreadingHTTPServer, plan: list[tuple[int, str]]) -> None:
    server.plan = plan
    begin = time.monotonic()
    with pytest.raises(ServiceError, match=r"no answer in 0\.3 s"):
        _embedder(server, deadline=0.3).embed(["a"])
    assert time.monotonic() - begin < 0.9


def test_the_deadline_is_for_all_batches_together(server: ThreadingHTTPServer) -> None:
    server.plan = [(200, "pause")] * 99
    begin = time.monotonic()
    with pytest.raises(ServiceError, match=r"no answer in 0\.5 s"):
        _embedder(server, deadline=0.5, batch=1).embed(["a"] * 10)
    assert time.monotonic() - begin < 0.9
    assert 2 <= len(server.seen) <= 4


def test_after_the_deadline_the_next_call_is_answered(server: ThreadingHTTPServer) -> None:
    server.plan = [(200, "a slow answer" * 5)]
    embedder = _embedder(server, deadline=0.3)
    with pytest.raises(ServiceError, match="had not arrived as a whole"):
        embedder.embed(["a"])
    assert embedder.embed(["a"]).tolist() == [[1, 1]]
    embedder.close()
    assert embedder.embed(["bb"]).tolist() == [[2, 1]], "closing gives connections back, no more"
    embedder.close()


def test_an_embedder_works_inside_a_loop_in_threads_and_after_a_fork(server: ThreadingHTTPServer) -> None:
    embedder = _embedder(server)

    async def asked_by_async_code() -> np.ndarray:
        return embedder.embed(["a"])

    assert asyncio.run(asked_by_async_code()).tolist() == [[1, 1]]
    with ThreadPoolExecutor(4) as pool:
        assert [rows.tolist() for rows in pool.map(embedder.embed, [["a"]] * 8)] == [[[1, 1]]] * 8
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if embedder.embed(["bb"]).tolist() == [[2, 1]] else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_an_endpoint_that_is_away_and_a_key_that_is_not_set() -> None:
    with pytest.raises(ServiceError, match="ConnectError"):
        EndpointEmbedder("http://127.0.0.1:9/v1", "small", deadline=0.2).embed(["a"])
    with pytest.raises(ServiceError, match="http://host:port"):
        EndpointEmbedder("nowhere", "small").embed(["a"])
    with pytest.raises(EngineError, match="export NO_SUCH_KEY"):
        EndpointEmbedder("http://127.0.0.1:9/v1", "small", api_key_env="NO_SUCH_KEY")

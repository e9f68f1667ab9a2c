"""Processes end: killed under load, killed in the middle of a commit, told to end while a request is under way."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from memfactory.errors import StoreError
from memfactory.serve.memories import Memories
from memfactory.serve.transcript import ChatMessage, plan
from tests.forked import Server
from tests.serve.conftest import TOKENS
from tests.serve.running import Serving, read_by, text_of, user


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


class Client:
    """Talks without end, and notes what was acknowledged."""

    def __init__(self, name: str, number: int) -> None:
        self.name, self.number = name, number
        self.conversation: list[dict[str, str]] = []
        self.acknowledged: list[str] = []
        """Documents and exchanges, as they are read."""

    def talk(self, serving: Serving) -> None:
        with suppress(openai.APIError):
            while True:
                count = len(self.conversation)
                what = f"{self.name} {self.number} {count}"
                asked = [*self.conversation, *user(f"document {what}", f"question {what} ?")]
                reply = serving.ask(asked, token=TOKENS[self.name])
                self.conversation = [*asked, {"role": "assistant", "content": text_of(reply)}]
                self.acknowledged += [f"document {what}", f"user: question {what} ?"]


@pytest.mark.slow
def test_killed_under_load_nothing_acknowledged_is_lost_and_nothing_crosses(
    forked: Server, runs: dict[str, Path], tokens: Path, tmp_path: Path
) -> None:
    memory = tmp_path / "memories.sqlite"
    options = ("--tokens", str(tokens), "--memory", str(memory))
    clients = [Client(name, number) for name in TOKENS for number in range(4)]
    with Serving(forked, runs["bank"], *options) as serving:
        threads = [threading.Thread(target=client.talk, args=(serving,)) for client in clients]
        for thread in threads:
            thread.start()
        wait_until(lambda: all(len(client.acknowledged) >= 4 for client in clients))
        serving.end(signal.SIGKILL)
        for thread in threads:
            thread.join()
    with Serving(forked, runs["bank"], *options) as serving:
        for client in clients:  # the conversation goes on where it was, and only what was not read is read
            reply = serving.ask([*client.conversation, *user("and ?")], token=TOKENS[client.name])
            # what was said last, and an exchange of another client that was not acknowledged to it
            assert len(read_by(reply)) <= 1
            assert not any("document" in text for text in read_by(reply))
        texts = {name: serving.memory(token=token).splitlines() for name, token in TOKENS.items()}
        assert serving.end() == 0
    for name, lines in texts.items():
        kept = [line.partition(": ")[2] if line.startswith("e") else line for line in lines]
        expected = [text for client in clients if client.name == name for text in client.acknowledged]
        assert len(expected) >= 16
        assert sorted(set(expected)) == sorted(expected)
        missing = set(expected) - set(kept)
        assert not missing
        assert all(kept.count(text) == 1 for text in expected)
        others = [other for other in TOKENS if other != name]
        assert not [line for line in kept if any(other in line for other in others)]


@pytest.mark.parametrize(
    ("place", "kept"),
    [
        ("memfactory.serve.memories:Memories.keep", False),
        ("memfactory.memory.sqlite:SqliteBank.restore", False),  # in the middle of the transaction
        ("memfactory.serve.bodies:Writer.whole", True),  # committed, and the answer not sent
    ],
)
def test_killed_at_the_commit_it_is_all_or_nothing(
    place: str, kept: bool, forked: Server, runs: dict[str, Path], tmp_path: Path
) -> None:
    memory = tmp_path / "memories.sqlite"
    asked = user("the old dog stood .", "which animal ?")
    with Serving(forked, runs["bank"], "--memory", str(memory), at=place) as serving:
        with pytest.raises(openai.APIConnectionError):
            serving.ask(asked)
        assert serving.process.wait() == -signal.SIGKILL
    begun = (ChatMessage("user", text["content"]) for text in asked)
    planned = plan([*begun])
    with closing(Memories(memory, bank=True)) as memories:
        draft = memories.begin('["local"]', planned.marks)
        memories.drop(draft)
        assert bool(memories.shown('["local"]')) == bool(draft.read) == (draft.last is not None) == kept
    with closing(sqlite3.connect(memory)) as file:  # the drafts of the killed process are gone
        assert file.execute("SELECT COUNT(*) FROM banks WHERE name != ''").fetchone() == (0,)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_end_it_answers_what_is_under_way_and_refuses_the_rest(
    number: int, forked: Server, runs: dict[str, Path], tmp_path: Path
) -> None:
    memory = tmp_path / "memories.sqlite"
    long = {"messages": user(*["the old dog stood ."] * 40, "which animal ?"), "temperature": 0, "stream": True}
    with Serving(forked, runs["text"], "--memory", str(memory)) as serving:
        url, body = f"{serving.url}/chat/completions", long | {"model": serving.model}
        with httpx.stream("POST", url, json=body, timeout=60, trust_env=False) as stream:
            lines = stream.iter_lines()
            assert next(lines) == ": reading chunk 1 of 40"
            with pytest.raises(StoreError, match="works with it"):
                Memories(memory, bank=False)  # two processes on one file would lose each other's changes
            serving.process.send(number)
            wait_until(lambda: httpx.get(f"{serving.root}/health").status_code == 503)
            refused = serving.post({"model": serving.model, "messages": user("?")})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            assert httpx.get(f"{serving.url}/memory").status_code == 503
            assert httpx.delete(f"{serving.url}/memory").status_code == 503
            rest = list(lines)
        assert "data: [DONE]" in rest
        assert serving.process.wait() == 0
        assert "stopped" in serving.output
        assert "Traceback" not in serving.output
        assert not psutil.pid_exists(serving.process.pid)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{serving.root}/health")
    with closing(Memories(memory, bank=False)) as memories:
        assert memories.shown('["local"]')


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_goes_away_ends_its_request_and_leaves_nothing(
    streamed: bool, servers: dict[str, Serving]
) -> None:
    text = servers["text"]
    messages = user(*["the small cat sat ."] * 200, "which animal ?")
    body = {"model": text.model, "messages": messages, "temperature": 0, "stream": streamed, "user": "gone away"}
    url = f"{text.url}/chat/completions"

    def under_way() -> str:
        lines = httpx.get(f"{text.root}/metrics").text.splitlines()
        return next(line for line in lines if line.startswith("memfactory_requests_under_way "))

    if streamed:
        with httpx.stream("POST", url, json=body, timeout=60, trust_env=False) as stream:
            assert next(stream.iter_lines()).startswith(": reading chunk 1")
    else:
        content = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
        with socket.create_connection(("127.0.0.1", text.port), timeout=10) as client:
            client.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + content)
            wait_until(lambda: under_way().endswith(" 1.0"))

    start = time.monotonic()
    wait_until(lambda: under_way().endswith(" 0.0"))
    assert time.monotonic() - start < 3, "200 chunks take longer"
    assert text.memory("gone away") == ""


# ---- the terminal -------------------------------------------------------------------------------


def test_a_chat_in_an_empty_folder_goes_on_at_a_server(forked: Server, runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    documents = tmp_path / "documents"
    (documents / "below").mkdir(parents=True)
    (documents / "b.md").write_text("the small cat sat .\n", encoding="utf-8")
    (documents / "below" / "a.txt").write_text("the old dog stood .\n" * 2, encoding="utf-8")
    (documents / "picture.png").write_bytes(b"\x89PNG")
    memory = tmp_path / "chat.sqlite"
    arguments = [str(runs["bank"]), "--documents", str(documents), "--memory", str(memory), "--chunk-tokens", "5"]
    typed = "which animal ?\n\n/memory\n/help\n"
    done = forked.command("chat", *arguments, folder=tmp_path / "empty", typed=typed)
    assert done.returncode == 0, done.stderr
    answer, *shown = done.stdout.splitlines()
    assert answer
    assert [line.partition(": ")[2] for line in shown[:3]] == [
        "the small cat sat .",
        "the old dog stood .",
        "the old dog stood .",
    ]
    assert "/forget" in shown[-1]
    assert not list((tmp_path / "empty").iterdir())
    with Serving(forked, runs["bank"], "--memory", str(memory)) as serving:
        reply: Any = serving.ask(user("and which fruit ?"))
        assert read_by(reply) == [f"user: which animal ?\nassistant: {answer}"]
        assert len(serving.memory().splitlines()) == 3 + 2


def test_a_chat_about_documents_that_are_read_anew_shows_the_notes_of_the_last_answer(
    forked: Server, runs: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("the old dog stood .\n", encoding="utf-8")
    arguments = [str(runs["text"]), "--documents", str(tmp_path)]
    typed = "/memory\nwhich animal ?\n/memory\n/forget\n/help\n"
    done = forked.command("chat", *arguments, folder=tmp_path, typed=typed)
    assert done.returncode == 0, done.stderr
    before, answer, notes, forgotten, told = done.stdout.splitlines()
    assert before == "(nothing)"
    assert notes not in ("(nothing)", answer)
    assert "nothing is kept" in forgotten
    assert "/forget" not in told
    assert "Loading weights" not in done.stderr


def test_control_c_stops_an_answer_and_then_the_chat(forked: Server, runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("the old dog stood .\n", encoding="utf-8")
    ours, its = os.openpty()
    chat = forked.start(
        ["chat", str(runs["text"]), "--documents", str(tmp_path), "--chunk-tokens", "1"],
        at="memfactory.modules.recurrent:RecurrentMemory.render#3",
        do="SIGINT",
        folder=tmp_path,
        apart=True,
        terminal=os.ttyname(its),
    )
    told = Path(f"{chat.log}.err")
    os.write(ours, b"which animal ?\n")
    wait_until(lambda: told.exists() and "(stopped)" in told.read_text())
    os.write(ours, b"which animal ?\n")
    wait_until(lambda: bool(chat.output.replace("> ", "").strip()))
    wait_until(lambda: chat.output.endswith("> "))
    chat.send(signal.SIGINT)
    assert chat.wait() == 0
    assert "Traceback" not in told.read_text()
    os.close(ours)
    os.close(its)

"""Two runs to serve: an agent with one text, and one over a bank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forked import Server
from tests.serve.running import Serving, make_run

TOKENS = {"alice": "alice-alice-alice-alice", "bob": "bob-bob-bob-bob-bob-bob"}


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders by what their agent keeps: ``text``, ``bank``."""
    folder = tmp_path_factory.mktemp("runs")
    return {kind: make_run(folder / kind, kind) for kind in ("text", "bank")}


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokens file for alice and bob."""
    file = tmp_path_factory.mktemp("tokens") / "tokens.yaml"
    file.write_text("".join(f"{user}: {token}\n" for user, token in TOKENS.items()), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def servers(forked: Server, runs: dict[str, Path]) -> Iterator[dict[str, Serving]]:
    """A server of each run, without tokens."""
    with Serving(forked, runs["text"]) as text, Serving(forked, runs["bank"]) as bank:
        yield {"text": text, "bank": bank}

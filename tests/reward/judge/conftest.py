"""A local judge server, and judges that ask it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tenacity import wait_random

sys.path.insert(0, str(Path(__file__).parents[2]))  # `servers` is shared by folders of tests

from servers import ChatServer

from memfactory.endpoints import endpoint as http
from memfactory.recipe import JudgeSection
from memfactory.reward.judge import ModelJudge, Rubric

MakeJudge = Callable[..., ModelJudge]


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with ChatServer() as running:
        yield running


@pytest.fixture
def rubric() -> Rubric:
    return Rubric("fits", "1", "yes: the answer means the same as gold.\nno: it does not.", {"yes": 1.0, "no": 0.0})


@pytest.fixture
def make_judge(server: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeJudge:
    """``make_judge(**recipe_keys)``: a judge that asks `server`, with a cache and short pauses."""
    monkeypatch.setattr(http, "BACKOFF", wait_random(0, 0.02))
    defaults = {"base_url": server.url, "model": "grader", "deadline": 20.0, "cache": str(tmp_path / "judge.sqlite")}

    def make(**changes: object) -> ModelJudge:
        return ModelJudge(JudgeSection(**{**defaults, **changes}))

    return make

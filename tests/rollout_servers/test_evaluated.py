"""`memfactory eval` over a vLLM server: checkpoints are asked at the same time, each by an adapter of its own."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import pytest
import yaml
from rich.console import Console
from vllm_serving import ask, prompts

import memfactory.evaluate.job as job
from memfactory.errors import EngineError
from memfactory.evaluate.folder import EvalFolder
from memfactory.evaluate.job import Asked, run_evaluation
from memfactory.policy.vllm_policy import LOOP
from memfactory.policy.vllm_pool import ServerPool
from memfactory.policy.vllm_server import VLLMServer
from memfactory.train.callbacks import progress_bar
from memfactory.train.serving import make_room

pytestmark = pytest.mark.slow

AGENT = {
    "name": "memagent",
    "prompt": "words",
    "answer_format": "plain",
    "max_memory_tokens": 8,
    "max_answer_tokens": 6,
}


@pytest.fixture
def recipe(serving: Any, tmp_path: Path) -> Path:
    """And two checkpoints, `a` and `b`, beside it."""
    told = serving.recipe().dump() | {"output_dir": str(tmp_path / "run"), "agent": AGENT}
    told["environment"] |= {"test_tasks": 6}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(told))
    for seed, name in enumerate("ab"):
        serving.model(seed).save_pretrained(tmp_path / name)
    return tmp_path / "recipe.yaml"


def evaluated(recipe: Path, name: str) -> dict[tuple[Any, ...], Any]:
    """What was written, by place."""
    asked = Asked(recipe, checkpoints=[recipe.parent / "a", recipe.parent / "b"], samples=2)
    with progress_bar(Console(quiet=True)) as progress:
        run_evaluation(asked, recipe.parent / name, progress)
    return {
        place: {key: value for key, value in record.items() if key != "seconds"}
        for place, record in EvalFolder(recipe.parent / name).cached().items()
    }


def adapters(serving: Any) -> list[str]:
    found = httpx.get(f"{serving.url}/v1/models", timeout=60, trust_env=False).json()["data"]
    return [model["id"] for model in found if model["id"] != "base"]


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> Callable[[], set[frozenset[str]]]:
    """Tells, since it was last asked, pairs of models that had turns under way at the same time."""
    asked: list[tuple[str, float, float]] = []
    sample = VLLMServer.sample

    async def noted(self: VLLMServer, draw: Any, *, model: str, **options: Any) -> Any:
        start = monotonic()
        found = await sample(self, draw, model=model, **options)
        asked.append((model, start, monotonic()))
        return found

    monkeypatch.setattr(VLLMServer, "sample", noted)

    def pairs() -> set[frozenset[str]]:
        found = {
            frozenset((one[0], other[0]))
            for one, other in combinations(asked, 2)
            if one[0] != other[0] and one[1] < other[2] and other[1] < one[2]
        }
        asked.clear()
        return found

    return pairs


def test_adapters_are_asked_at_the_same_time_and_write_what_each_writes_alone(
    serving: Any, recipe: Path, beside: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert make_room(serving.recipe(), "eval-") == 3, "the server of these tests was started with three"
    together = evaluated(recipe, "together")
    assert len(beside()) == 3, "of base, a and b each with each"
    assert adapters(serving) == []
    assert not list((recipe.parent / "run").glob("adapters*"))
    monkeypatch.setattr(job, "_room", lambda *_: 1)
    assert evaluated(recipe, "alone") == together
    assert not beside()
    texts = {
        name: [record["turns"] for record in together.values() if record["candidate"] == name]
        for name in ("base", "a", "b")
    }
    assert all(len(turns) == 6 * 3 for turns in texts.values()), "two sampled, one greedy"
    assert texts["base"] != texts["a"] != texts["b"]


def test_what_a_killed_evaluation_left_is_unloaded_and_what_others_have_is_not(serving: Any, tmp_path: Path) -> None:
    serving.model(2).save_pretrained(tmp_path / "adapter")
    names = ["memfactory-eval-1-0-x-v0", "memfactory-eval-2-0-x-v0"]
    server = VLLMServer(serving.url, serving.recipe().rollout.vllm)
    for name in names:
        LOOP.start(server.load(name, str(tmp_path / "adapter"))).result()
    try:
        assert make_room(serving.recipe(), "eval-1-") == 2
        assert adapters(serving) == names[1:]
        recipe = serving.recipe()
        rollout = recipe.rollout.model_copy(update={"engine": "async"})
        assert make_room(recipe.model_copy(update={"rollout": rollout}), "eval-1-") < 1, "a run will have more of them"
    finally:
        for name in names:
            LOOP.start(server.unload(name)).result()
        LOOP.start(server.aclose()).result()


def test_a_run_at_the_same_server_keeps_its_place(serving: Any, recipe: Path, beside: Any) -> None:
    run = serving.policy(str(recipe.parent / "run"))
    run.use(serving.model(5), 1)
    try:
        [own] = adapters(serving)
        assert make_room(serving.recipe(), "eval-") == 2
        beside()
        evaluated(recipe, "beside")
        assert len(beside()) == 1, "base and a; then b"
        assert adapters(serving) == [own]
        assert ask(run, prompts(1))[0].completion_ids
    finally:
        run.close()


def test_a_checkpoint_that_cannot_be_sent_leaves_nothing_behind(
    serving: Any, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish, held = ServerPool.publish, []

    async def second_fails(self: ServerPool, *sent: Any) -> float:
        found = await publish(self, *sent)
        held.append(self.family)
        if len(held) == 2:
            raise EngineError("another one than was sent")
        return found

    monkeypatch.setattr(ServerPool, "publish", second_fails)
    with pytest.raises(EngineError, match="another one"):
        evaluated(recipe, "fails")
    assert len(set(held)) == 2
    assert adapters(serving) == []
    assert not list((recipe.parent / "run").glob("adapters*"))

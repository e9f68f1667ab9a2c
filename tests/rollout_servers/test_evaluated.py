"""`memfactory eval` over a vLLM server: checkpoints are asked at the same time, each by an adapter of its own."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import pytest
import yaml
from rich.console import Console

import memfactory.evaluate.job as job
from memfactory.errors import EngineError
from memfactory.evaluate.folder import EvalFolder
from memfactory.evaluate.job import Asked, run_evaluation
from memfactory.policy.vllm_server import VLLMServer
from memfactory.train.callbacks import progress_bar

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


def test_two_adapters_are_asked_at_the_same_time_and_write_what_each_writes_alone(
    serving: Any, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, float, float]] = []
    sample = VLLMServer.sample

    async def noted(self: VLLMServer, draw: Any, *, model: str, **options: Any) -> Any:
        start = monotonic()
        found = await sample(self, draw, model=model, **options)
        asked.append((model, start, monotonic()))
        return found

    monkeypatch.setattr(VLLMServer, "sample", noted)

    def beside() -> set[frozenset[str]]:
        """Pairs of models that a turn was asked of while one of the other was under way."""
        pairs = {
            frozenset((one[0], other[0]))
            for one, other in combinations(asked, 2)
            if one[0] != other[0] and one[1] < other[2] and other[1] < one[2]
        }
        asked.clear()
        return pairs

    together = evaluated(recipe, "together")
    assert len(beside()) == 1, "base and the first checkpoint; a server has two places"
    assert adapters(serving) == []
    monkeypatch.setattr(job, "_models_at_once", lambda *_: 1)
    assert evaluated(recipe, "alone") == together
    assert not beside()
    texts = {
        name: [record["turns"] for place, record in together.items() if record["candidate"] == name]
        for name in ("base", "a", "b")
    }
    assert all(len(turns) == 6 * 3 for turns in texts.values()), "two sampled, one greedy"
    assert texts["base"] != texts["a"] != texts["b"]


def test_a_checkpoint_that_cannot_be_sent_leaves_nothing_of_the_other_behind(
    serving: Any, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, loaded = job.load_policy, []

    def second_fails(*asked: Any, **options: Any) -> Any:
        if loaded:
            assert len(adapters(serving)) == 1
            raise EngineError("spoilt")
        loaded.append(load(*asked, **options))
        return loaded[-1]

    monkeypatch.setattr(job, "load_policy", second_fails)
    with pytest.raises(EngineError, match="spoilt"):
        evaluated(recipe, "fails")
    assert adapters(serving) == []

"""`memfactory serve` over vLLM: what is served is what the same weights write here, whoever draws how beside it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import yaml

from memfactory.episode import Turn
from memfactory.policy.base import Sampling
from memfactory.policy.vllm_policy import VLLMPolicy
from memfactory.serve.desk import Asked, Desk, Replied, owner_of
from memfactory.serve.loading import open_run
from memfactory.serve.memories import Memories
from memfactory.serve.transcript import ChatMessage

pytestmark = pytest.mark.slow

AGENT = {
    "name": "memagent",
    "prompt": "words",
    "answer_format": "plain",
    "max_memory_tokens": 12,
    "max_answer_tokens": 8,
}
TEXTS = ("the old dog stood .", "the small cat sat .", "which animal ?")


def written(turns: list[Turn]) -> list[tuple[Any, ...]]:
    return [(turn.module, turn.prompt_ids, turn.completion_ids, turn.text, turn.stop) for turn in turns]


def test_an_agent_over_vllm_answers_as_with_its_weights_here(serving: Any, tmp_path: Path) -> None:
    told = serving.recipe().dump() | {"output_dir": str(tmp_path), "agent": AGENT}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(told))
    serving.model(3).save_pretrained(tmp_path / "model")

    async def ask(desk: Desk, user: str, sampling: Sampling, seed: int | None = None) -> Replied:
        messages = [ChatMessage("user", text) for text in TEXTS]
        return await desk.answer(Asked(owner_of(user), messages, sampling, seed), lambda text: None)

    async def here() -> Replied:
        return await ask(desk, "here", Sampling(0.0))

    desk = Desk(open_run(tmp_path), None)
    expected = asyncio.run(here())
    desk.close()

    async def there() -> list[Replied]:
        hot = Sampling(1.0)
        asked = [ask(desk, "greedy", Sampling(0.0)), *(ask(desk, f"hot {n}", hot, n // 2) for n in range(4))]
        return [*await asyncio.gather(*asked), await ask(desk, "later", Sampling(0.0))]

    served = open_run(tmp_path, overrides=["rollout.engine=vllm"])
    assert isinstance(served.policy.trained, VLLMPolicy)
    desk = Desk(served, Memories(tmp_path / "memories.sqlite", bank=False))
    try:
        greedy, *drawn, later = asyncio.run(there())
    finally:
        desk.close()
    assert written(greedy.episode.turns) == written(later.episode.turns) == written(expected.episode.turns)
    assert greedy.text == expected.text
    one, again, other, other_again = (written(reply.episode.turns) for reply in drawn)
    assert (one, other) == (again, other_again), "a seed decides the draw"
    assert one != other != written(expected.episode.turns)

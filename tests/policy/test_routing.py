"""Who answers for a module: real tiny models behind one routed policy, each against itself alone."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from memfactory.agents import BankAgent
from memfactory.agents.running import run_episodes
from memfactory.episode import Probe, Task, Turn
from memfactory.errors import RecipeErrors
from memfactory.policy.base import Sampling
from memfactory.policy.routing import RoutedPolicy
from memfactory.policy.transformers_backend import TransformersPolicy
from memfactory.recipe import schema_errors
from memfactory.train.prepare import prepare
from memfactory.train.rows import build_rows

QUICKSTART = Path(__file__).parents[2] / "recipes" / "memory_r1" / "quickstart.yaml"


async def ask(policy: Any, module: str, text: str, limit: int = 12) -> Turn:
    turn: Turn = await policy.generate([{"role": "user", "content": text}], module=module, max_tokens=limit)
    return turn


def together(policy: Any, calls: list[tuple[str, str, int]]) -> list[Turn]:
    """Turns for (module, text, limit), asked for one after the other while others are being decoded."""

    async def late(number: int, module: str, text: str, limit: int) -> Turn:
        for _ in range(7 * number):
            await asyncio.sleep(0)
        return await ask(policy, module, text, limit)

    async def everything() -> list[Turn]:
        return await asyncio.gather(*(late(number, *call) for number, call in enumerate(calls)))

    return asyncio.run(everything())


@torch.no_grad()
def logprobs_of(model: Any, turn: Turn) -> torch.Tensor:
    """Of the completion, by one fresh forward pass."""
    logits = model(input_ids=torch.tensor([turn.prompt_ids + turn.completion_ids])).logits[0].float()
    logp = logits.log_softmax(-1)[len(turn.prompt_ids) - 1 : -1]
    return logp.gather(1, torch.tensor(turn.completion_ids)[:, None]).squeeze(1)


def sampled_by(model: Any, turn: Turn) -> bool:
    return bool((torch.tensor(turn.logprobs) - logprobs_of(model, turn)).abs().max() < 1e-4)


def greedy(model: Any, tokenizer: Any, **options: Any) -> TransformersPolicy:
    return TransformersPolicy(model, tokenizer, sampling=Sampling(0.0), **options)


CALLS = [
    (module, f"w{number} w{number * 3 % 40} w7", 5 + number * 5 % 20)
    for number, module in enumerate(["update", "answer", "rerank", "judge", "answer", "update", "rerank", "judge"] * 3)
]


@pytest.fixture
def models(bench: Any, tokenizer: Any) -> dict[str, Any]:
    """Trained weights, the same before training, and another architecture."""
    trained = bench.make_model("qwen3", len(tokenizer), seed=0)
    initial = bench.make_model("qwen3", len(tokenizer), seed=1)
    other = bench.make_model("llama", len(tokenizer), seed=2)
    return {"update": trained, "rerank": trained, "answer": initial, "judge": other}


def test_each_module_is_answered_by_its_own_weights(models: dict[str, Any], tokenizer: Any) -> None:
    trained = TransformersPolicy(models["update"], tokenizer, seed=3)
    others = {
        "rerank": greedy(models["update"], tokenizer),
        "answer": greedy(models["answer"], tokenizer),
        "judge": TransformersPolicy(models["judge"], tokenizer, seed=4),
    }
    routed = RoutedPolicy(trained, others, [others["rerank"]])
    turns = together(routed, CALLS)
    for (module, text, limit), turn in zip(CALLS, turns, strict=True):
        assert turn.module == module
        assert turn.trainable == (module == "update")
        assert sampled_by(models[module], turn)
        assert not any(sampled_by(model, turn) for model in models.values() if model is not models[module])
        if module in ("rerank", "answer"):
            alone = asyncio.run(ask(greedy(models[module], tokenizer), module, text, limit))
            assert alone.completion_ids == turn.completion_ids
    assert routed.greedy is trained.greedy is False
    assert routed.split("w1 w2 w3", 2) == trained.split("w1 w2 w3", 2)


def test_turns_of_others_give_no_row(models: dict[str, Any], tokenizer: Any) -> None:
    trained = TransformersPolicy(models["update"], tokenizer, seed=3)
    routed = RoutedPolicy(trained, {"answer": greedy(models["answer"], tokenizer)})
    agent = BankAgent(
        extract={"kind": "lines"},
        update={"kind": "words"},
        answer={"kind": "direct"},
        max_update_tokens=4,
        max_answer_tokens=4,
    )
    tasks = [Task(f"t{n}", (f"anna : w{n} w1", "leo : w2"), (Probe(f"w{n} ?", ("x",)),)) for n in range(5)]
    episodes = run_episodes(agent, tasks, routed)
    for episode in episodes:
        assert [(turn.module, turn.trainable) for turn in episode.turns] == [
            ("update", True),
            ("update", True),
            ("answer", False),
        ]
        rows = build_rows([episode])
        assert [row.completion_ids for row in rows] == [turn.completion_ids for turn in episode.turns[:2]]
        assert all(sampled_by(models[turn.module], turn) for turn in episode.turns)


def test_following_policies_sample_from_the_weights_that_are_trained(bench: Any, tokenizer: Any, models: Any) -> None:
    trained, current = TransformersPolicy(models["update"], tokenizer), greedy(models["update"], tokenizer)
    frozen = greedy(models["answer"], tokenizer)
    routed = RoutedPolicy(trained, {"rerank": current, "answer": frozen}, [current])
    newer = bench.make_model("qwen3", len(tokenizer), seed=9)
    routed.use(newer, version=7)
    turns = {turn.module: turn for turn in together(routed, CALLS[:3])}
    assert sampled_by(newer, turns["update"])
    assert sampled_by(newer, turns["rerank"])
    assert sampled_by(models["answer"], turns["answer"])
    assert {module: turn.policy_version for module, turn in turns.items()} == {"update": 7, "rerank": 7, "answer": 0}
    routed.use(models["update"])
    assert trained.version == current.version == 7, "a version that is not told stays"


def test_drawing_begins_anew_from_a_seed_and_leaves_everything_as_it_was(models: Any, tokenizer: Any) -> None:
    trained = TransformersPolicy(models["update"], tokenizer, seed=3)
    sampled = TransformersPolicy(models["judge"], tokenizer, sampling=Sampling(0.7), seed=4)
    routed = RoutedPolicy(
        trained, {"judge": sampled, "rerank": sampled, "answer": greedy(models["answer"], tokenizer)}
    )

    def drawn(seed: int) -> list[list[int]]:
        sampling = Sampling(0.5)
        with routed.drawing(sampling, seed):
            assert trained.sampling == sampling
            assert sampled.sampling == Sampling(0.7), "the others draw by their own"
            return [turn.completion_ids for turn in together(routed, CALLS[:8])]

    states = [policy.generator.get_state() for policy in (trained, sampled)]
    first = drawn(1)
    assert drawn(1) == first
    again = drawn(2)
    changed = {CALLS[n][0] for n in range(8) if again[n] != first[n]}
    assert changed == {"update", "judge", "rerank"}, "what is greedy draws nothing"
    assert trained.sampling == Sampling()
    for policy, state in zip((trained, sampled), states, strict=True):
        assert torch.equal(policy.generator.get_state(), state)
    with pytest.raises(ZeroDivisionError), routed.drawing(Sampling(0.1), 5):
        _ = together(routed, CALLS[:4])[0].completion_ids[0] / 0
    assert trained.sampling == Sampling()
    for policy, state in zip((trained, sampled), states, strict=True):
        assert torch.equal(policy.generator.get_state(), state)


def test_a_seed_begins_all_draws_anew(models: Any, tokenizer: Any) -> None:
    trained = TransformersPolicy(models["update"], tokenizer, seed=3)
    routed = RoutedPolicy(trained, {"judge": TransformersPolicy(models["judge"], tokenizer, seed=4)})
    runs = []
    for seed in (5, 6, 5):
        routed.seed(seed)
        runs.append(
            [turn.completion_ids for turn in together(routed, [call for call in CALLS if call[0] in "update judge"])]
        )
    assert runs[0] == runs[2] != runs[1]


# ---- an adapter that is off for some and on for others ---------------------------------------------


def test_initial_is_the_base_model_while_the_adapter_decodes_beside_it(bench: Any, tokenizer: Any) -> None:
    base = bench.make_model("qwen3", len(tokenizer), seed=0)
    before = bench.make_model("qwen3", len(tokenizer), seed=0)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    trained = TransformersPolicy(adapted, tokenizer, seed=3)
    initial = TransformersPolicy(adapted, tokenizer, seed=4, around=lambda: adapted.disable_adapter())
    routed = RoutedPolicy(trained, {"answer": initial}, [initial])
    calls = [(module, text, limit + 10) for module, text, limit in CALLS if module in ("update", "answer")]
    overlaps: list[bool] = []

    def under_way(policy: TransformersPolicy) -> bool:
        return policy._drain is not None and not policy._drain.done()

    async def watch(done: asyncio.Event) -> None:
        while not done.is_set():
            overlaps.append(under_way(trained) and under_way(initial))
            await asyncio.sleep(0)

    async def everything() -> list[Turn]:
        done = asyncio.Event()
        watcher = asyncio.create_task(watch(done))
        turns = await asyncio.gather(*(ask(routed, *call) for call in calls))
        done.set()
        await watcher
        return turns

    turns = asyncio.run(everything())
    assert sum(overlaps) > 5, "the two really decode at the same time"
    for (module, _, _), turn in zip(calls, turns, strict=True):
        assert sampled_by(before, turn) == (module == "answer")
        assert sampled_by(adapted, turn) == (module == "update")
    assert all(parameter.requires_grad for name, parameter in adapted.named_parameters() if "lora_" in name)


def test_two_policies_may_decode_under_autocast_at_the_same_time(models: Any, tokenizer: Any) -> None:
    def half() -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    first, second = (TransformersPolicy(models[name], tokenizer, autocast=half) for name in ("update", "judge"))

    async def both() -> list[Turn]:
        short = [ask(first, "update", f"w{n} w1", 4) for n in range(8)]
        return await asyncio.gather(*short, *(ask(second, "judge", f"w{n} w1", 40) for n in range(8)))

    try:
        turns = asyncio.run(both())
        assert not torch.is_autocast_enabled("cpu"), "and leave none on"
        for turn in turns:
            with half():
                exact = logprobs_of(models[turn.module], turn)
            assert (torch.tensor(turn.logprobs) - exact).abs().max() < 0.1
    finally:
        torch.set_autocast_enabled("cpu", False)
        torch.clear_autocast_cache()


# ---- what a recipe may say ------------------------------------------------------------------------


def errors_of(**sections: Any) -> str:
    data = {
        "name": "x",
        "model": {"tiny": {}},
        "environment": {"name": "dialogues"},
        "rewards": [{"name": "answer.exact_match"}],
    }
    return "\n".join(map(str, schema_errors(data | sections)[1]))


def test_policies_that_a_recipe_cannot_mean() -> None:
    assert errors_of() == ""
    assert errors_of(modules={"answer": {"policy": "initial"}, "update": {"policy": "current"}}) == ""
    big = {"big": {"model": "some/model"}}
    assert errors_of(policies=big, modules={"answer": {"policy": "big"}}) == ""
    unknown = errors_of(policies=big, modules={"answer": {"policy": "bgi"}})
    assert "modules.answer.policy: no 'bgi'" in unknown
    assert "big" in unknown
    for name in ("trained", "current", "initial"):
        assert f"policies.{name}" in errors_of(policies={name: {"model": "some/model"}})
    assert "model" in errors_of(policies={"big": {"temperature": 1.0}})
    assert "temperature" in errors_of(modules={"answer": {"policy": "initial", "temperature": -1}})


def test_a_module_that_the_agent_has_not_is_refused_with_the_recipe() -> None:
    assert prepare(QUICKSTART, splits=()).recipe.modules["answer"].policy == "initial"
    with pytest.raises(RecipeErrors, match=r"modules\.anwser"):
        prepare(QUICKSTART, ["modules.anwser.policy=initial"], splits=())

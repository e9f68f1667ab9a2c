"""From a recipe's `modules:` and `policies:` to the models that answer."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from memfactory.errors import RecipeError
from memfactory.policy.base import Sampling
from memfactory.policy.transformers_backend import TransformersPolicy
from memfactory.recipe import Recipe
from memfactory.train.policies import needs_initial, route, trains

FROZEN = {"answer": {"policy": "initial"}}


def recipe(**sections: Any) -> Recipe:
    data = {
        "name": "x",
        "model": {"tiny": {}},
        "environment": {"name": "dialogues"},
        "rewards": [{"name": "answer.exact_match"}],
        "rollout": {"generate_token_budget": 777},
    }
    return Recipe.model_validate(data | sections)


def never() -> Any:
    raise AssertionError("loaded without need")


@pytest.fixture
def trained(bench: Any, tokenizer: Any) -> TransformersPolicy:
    model = bench.make_model("qwen3")
    return TransformersPolicy(
        model,
        tokenizer,
        sampling=Sampling(0.9),
        eos_ids=[2, 4],
        token_budget=999,
        template_options={"thinking": False},
    )


def test_whose_turns_are_trained() -> None:
    some = recipe(
        modules={"update": {"policy": "trained"}, "answer": {"policy": "initial"}, "rerank": {"policy": "current"}}
    )
    assert [trains(some, module) for module in ("update", "answer", "rerank", "extract")] == [True, False, False, True]
    assert needs_initial(some)
    assert not needs_initial(recipe(modules={"rerank": {"policy": "current"}}))


def test_a_recipe_that_names_nobody_asks_the_trained_policy_alone(trained: TransformersPolicy) -> None:
    for sections in ({}, {"modules": {"update": {"policy": "trained"}}}):
        routed = route(recipe(**sections), trained, never)
        assert (routed.trained, routed.others, routed.following) == (trained, {}, [])


def test_weights_from_before_training_are_loaded_once_frozen_and_drawn_by_their_own(
    bench: Any, trained: TransformersPolicy
) -> None:
    loaded = []

    def initial() -> Any:
        loaded.append(bench.make_model("qwen3", seed=7).train())
        return loaded[-1]

    modules = {"answer": {"policy": "initial"}, "extract": {"policy": "initial"}, "rerank": {"policy": "current"}}
    routed = route(recipe(modules=modules), trained, initial)
    answer, extract, rerank = (routed.others[name] for name in ("answer", "extract", "rerank"))
    assert len(loaded) == 1
    assert answer is extract is not rerank
    assert answer.model is loaded[0] is not trained.model
    assert not any(parameter.requires_grad for parameter in answer.model.parameters())
    assert not answer.model.training
    assert rerank.model is trained.model
    assert routed.following == [rerank]
    assert any(parameter.requires_grad for parameter in trained.model.parameters()), "the trained one is left alone"
    for policy in (answer, rerank):
        assert policy.sampling == Sampling(0.0)
        assert policy.eos_ids == trained.eos_ids
        assert policy.token_budget == trained.token_budget
        assert policy.template_options == trained.template_options
    newer = bench.make_model("qwen3", seed=8)
    routed.use(newer, version=3)
    assert (trained.model, rerank.model, answer.model) == (newer, newer, loaded[0])


def test_another_temperature_is_another_policy(bench: Any, trained: TransformersPolicy) -> None:
    modules = {
        "answer": {"policy": "current"},
        "extract": {"policy": "current", "temperature": 0.5},
        "rerank": {"policy": "current", "temperature": 0.5},
    }
    routed = route(recipe(modules=modules), trained, never)
    assert routed.others["extract"] is routed.others["rerank"] is not routed.others["answer"]
    assert routed.others["extract"].sampling == Sampling(0.5)
    assert len(routed.following) == 2


def test_with_an_adapter_nothing_is_loaded_and_the_base_model_answers(bench: Any, tokenizer: Any) -> None:
    def adapted(seed: int) -> Any:
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        return get_peft_model(bench.make_model("qwen3", seed=seed), config).eval()

    def greedy_of(policy: Any) -> list[int]:
        message = [{"role": "user", "content": "w1 w2 w3"}]
        turn = asyncio.run(policy.generate(message, module="answer", max_tokens=20))
        return list(turn.completion_ids)

    def alone(model: Any) -> list[int]:
        return greedy_of(TransformersPolicy(model, tokenizer, sampling=Sampling(0.0)))

    routed = route(recipe(modules=FROZEN), TransformersPolicy(adapted(0), tokenizer), never)
    assert routed.others == {"answer": routed.following[0]}
    assert greedy_of(routed) == alone(bench.make_model("qwen3", seed=0)) != alone(adapted(0))
    routed.use(adapted(1))  # what is trained may be another object later, as the trainer wraps it
    assert greedy_of(routed) == alone(bench.make_model("qwen3", seed=1)) != alone(adapted(1))


def test_a_model_of_policies_is_loaded_once_for_all_its_modules(
    bench: Any, tokenizer: Any, trained: TransformersPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import memfactory.train.policies as module

    saved = bench.make_model("llama", seed=5)
    saved.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    loads: list[str | None] = []
    real = module.load_model
    monkeypatch.setattr(
        module, "load_model", lambda section, *rest: (loads.append(section.name), real(section, *rest))[1]
    )
    folder = str(tmp_path / "other")
    routed = route(
        recipe(
            policies={"other": {"model": folder, "temperature": 0.3, "top_p": 0.8}, "unused": {"model": "no/such"}},
            modules={
                "answer": {"policy": "other"},
                # its temperature stands in `policies:`; that of the module is for `current` and `initial`
                "rerank": {"policy": "other", "temperature": 0.9},
            },
        ),
        trained,
        never,
    )
    other = routed.others["answer"]
    assert loads == [folder], "once, and only what a module names"
    assert routed.others["rerank"] is other
    assert routed.following == []
    assert other.sampling == Sampling(0.3, 0.8)
    assert other.token_budget == 777
    assert not other.model.training
    assert not any(parameter.requires_grad for parameter in other.model.parameters())
    for name, weights in saved.state_dict().items():
        assert torch.equal(weights, other.model.state_dict()[name].cpu())
    turn = asyncio.run(routed.generate([{"role": "user", "content": "w1"}], module="answer", max_tokens=5))
    assert not turn.trainable
    assert turn.module == "answer"


def test_a_model_that_is_not_there_is_the_recipes_error(trained: TransformersPolicy, tmp_path: Path) -> None:
    nowhere = {"other": {"model": str(tmp_path / "nowhere")}}
    with pytest.raises(RecipeError, match="nowhere"):
        route(recipe(policies=nowhere, modules={"answer": {"policy": "other"}}), trained, never)

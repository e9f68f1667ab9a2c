"""Packed sequences are computed as each would be by itself: outputs, gradients, generated tokens."""

from __future__ import annotations

import asyncio
import copy
import logging
import random
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from memfactory.policy import branches, prefill, prefix_sharing
from memfactory.policy.base import Sampling
from memfactory.policy.decode_attention import NAME, growing_cache
from memfactory.policy.prefix_sharing import Packed, unique_ids
from memfactory.policy.prefix_support import Support, choose, difference, obstacle
from memfactory.policy.transformers_backend import TransformersPolicy

CPU = torch.device("cpu")
VOCABULARY = 48
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "bos_token_id": None,
}
ids = st.integers(0, 2)  # few, so that sequences begin alike by chance, at several depths
sequences = st.lists(st.lists(ids, min_size=1, max_size=7), min_size=1, max_size=8)


@pytest.fixture(autouse=True)
def everything_is_worth_it(monkeypatch):
    monkeypatch.setattr(prefix_sharing, "LEAST", 0)
    monkeypatch.setattr(prefix_sharing, "WORTH", 1.0)


def make(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    kinds = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }
    config, model = kinds[kind]
    sizes = SIZES | ({"head_dim": 8} if kind == "qwen3" else {}) | more
    return model(config(**sizes)).eval()


def tree(seed: int, groups: int = 3, members: int = 4) -> list[list[int]]:
    """Sequences of three levels: instructions of all, a question and chunk of each group, what each member wrote."""
    rng = random.Random(seed)

    def words(low: int, high: int) -> list[int]:
        return [rng.randrange(5, VOCABULARY) for _ in range(rng.randint(low, high))]

    instructions = words(3, 9)
    found = []
    for _ in range(groups):
        shared = instructions + words(5, 20)
        found += [shared + words(1, 9) for _ in range(rng.randint(1, members))]
    rng.shuffle(found)
    return found


# ---- what is packed ------------------------------------------------------------------------------


@given(sequences)
def test_every_beginning_is_there_once(found):
    packed = Packed(found)
    beginnings = {tuple(own[:end]) for own in found for end in range(1, len(own) + 1)}
    assert packed.unique == unique_ids(found) == len(beginnings)
    assert packed.raw == sum(map(len, found))
    for own, path in zip(found, packed.paths, strict=True):
        assert packed.ids[path].tolist() == own
        assert packed.positions[path].tolist() == list(range(len(own)))
        assert all(one < other for one, other in pairwise(path.tolist())), "what comes before is computed before"


@given(sequences, st.integers(1, 9))
def test_pieces_are_the_whole_and_each_place_belongs_to_one_span(found, most):
    packed = Packed(found)
    pieces = list(packed.pieces(CPU, most))
    assert all(piece.ids.shape[1] <= most for piece in pieces)
    assert torch.cat([piece.ids[0] for piece in pieces]).equal(packed.ids)
    assert torch.cat([piece.positions[0] for piece in pieces]).equal(packed.positions)
    for piece in pieces:
        outputs = sum(block.queries.numel() for block in piece.plan.blocks)
        assert len(set(piece.plan.inverse.tolist())) == piece.ids.shape[1]
        assert int(piece.plan.inverse.max()) < outputs


# ---- what is computed ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("largest", [1 << 24, 40])
def test_outputs_are_those_of_separate_sequences(monkeypatch, kind, largest):
    monkeypatch.setattr(prefix_sharing, "_LARGEST", largest)
    model = make(kind)
    choose(model)

    @settings(max_examples=25, deadline=None)
    @given(found=sequences | st.integers(0, 1000).map(tree), most=st.integers(1, 30))
    @torch.no_grad()
    def check(found, most):
        packed = Packed(found)
        whole = model(**packed.whole(CPU).arguments(), use_cache=False).logits[0]
        cache = growing_cache(model)
        steps = [
            model(**piece.arguments(), past_key_values=cache, use_cache=True).logits[0]
            for piece in packed.pieces(CPU, most)
        ]
        for own, path in zip(found, packed.paths, strict=True):
            alone = model(input_ids=torch.tensor([own]), use_cache=False).logits[0]
            torch.testing.assert_close(whole[path], alone, atol=1e-4, rtol=1e-5)
            torch.testing.assert_close(torch.cat(steps)[path], alone, atol=1e-4, rtol=1e-5)

    check()


def gradients(model: Any, found: list[list[int]], *, shared: bool, dtype: torch.dtype | None = None) -> Any:
    """Log-probs of all sequences, and the gradient of a weighted sum of them."""
    model.zero_grad()
    packed = Packed(found)
    logps = []
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        if shared:
            together = model(**packed.whole(CPU).arguments(), use_cache=False).logits[0]
            logits = [together[path] for path in packed.paths]
        else:
            logits = [model(input_ids=torch.tensor([own]), use_cache=False).logits[0] for own in found]
    for own, scores in zip(found, logits, strict=True):
        logps.append(scores.float().log_softmax(-1)[:-1].gather(1, torch.tensor(own[1:])[:, None])[:, 0])
    weights = [torch.linspace(-1, 2, len(own)) + number for number, own in enumerate(logps)]
    sum((weight * own).sum() for weight, own in zip(weights, logps, strict=True)).backward()
    grads = {name: own.grad.clone() for name, own in model.named_parameters() if own.grad is not None}
    return torch.cat(logps).detach(), grads


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest relative difference of one parameter's gradient; of the whole where it has none but rounding (the bias
    of keys moves all scores of a query alike)."""
    assert one.keys() == other.keys()
    whole = float(sum(grad.square().sum() for grad in other.values()).sqrt())
    return max(float((one[name] - other[name]).norm()) / max(float(other[name].norm()), 1e-2 * whole) for name in one)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_gradients_of_every_parameter_are_those_of_separate_sequences(kind, lora, checkpointing):
    model = make(kind)
    choose(model)
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    calls = []
    attend = prefix_sharing.Plan.attend

    @settings(max_examples=10, deadline=None)
    @given(seed=st.integers(0, 10**6))
    @example(seed=193171)  # where separate sequences themselves are 9.2e-6 from float64, on Llama with LoRA
    def check(seed):
        found = tree(seed)
        logps, grads = gradients(model, found, shared=True)
        calls.append(len(calls))
        alone, expected = gradients(model, found, shared=False)
        torch.testing.assert_close(logps, alone, atol=1e-5, rtol=1e-5)
        if apart(grads, expected) >= 1e-5:  # two roundings; which of them it is, separate sequences tell in float64
            _, exact = gradients(copy.deepcopy(model).double(), found, shared=False)
            assert apart(grads, exact) < 1e-5

    with pytest.MonkeyPatch.context() as patch:
        passes = []
        patch.setattr(prefix_sharing.Plan, "attend", lambda *a, **k: (passes.append(1), attend(*a, **k))[1])
        check()
    assert len(passes) == len(calls) * 2 * (1 + checkpointing), "two layers, again in the backward pass if asked"


def test_bfloat16_is_as_near_to_float32_as_separate_sequences_are():
    model = make("qwen3").train()
    choose(model)
    for seed in range(5):
        found = tree(seed)
        _, exact = gradients(model, found, shared=False)
        _, separate = gradients(model, found, shared=False, dtype=torch.bfloat16)
        _, shared = gradients(model, found, shared=True, dtype=torch.bfloat16)

        def distance(one: dict[str, torch.Tensor], exact: dict[str, torch.Tensor] = exact) -> float:
            return float(sum((one[name] - exact[name]).square().sum() for name in exact).sqrt())

        assert distance(shared) < 1.2 * distance(separate)


# ---- models that cannot --------------------------------------------------------------------------

SMALL = SIZES | {"head_dim": 8}
CANNOT = {
    "sliding": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)),
    "layers of sliding_attention": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, sliding_window=4)),
    "sinks": lambda: GptOssForCausalLM(
        GptOssConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1, layer_types=["full_attention"] * 2)
    ),
    "recurrent": lambda: MambaForCausalLM(MambaConfig(vocab_size=48, hidden_size=16, num_hidden_layers=1)),
    "'eager'": lambda: LlamaForCausalLM._from_config(LlamaConfig(**SIZES), attn_implementation="eager"),
}


@pytest.mark.parametrize("why", CANNOT)
def test_a_model_that_cannot_is_named_and_left_as_it_is(why, caplog):
    model = CANNOT[why]()
    before = model.config._attn_implementation
    assert why in str(obstacle(model))
    with caplog.at_level(logging.WARNING):
        support = Support(model)
    assert not support.settle(model, CPU)
    assert not support.possible
    assert model.config._attn_implementation == before
    assert [record.getMessage() for record in caplog.records if why in record.getMessage()]


class Deaf(LlamaForCausalLM):
    """Does not hand on what it does not know."""

    def forward(self, *args: Any, prefix_plan: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class Strict(LlamaForCausalLM):
    """Refuses what it does not know."""

    def forward(self, input_ids: Any = None, use_cache: Any = None) -> Any:
        return super().forward(input_ids, use_cache=use_cache)


@pytest.mark.parametrize(("model", "why"), [(Deaf, "apart from those"), (Strict, "does not take a plan: TypeError")])
def test_a_model_that_looks_able_is_tried_before_it_is_relied_on(model, why, caplog):
    torch.manual_seed(0)
    own = model(LlamaConfig(**SIZES)).train()
    assert obstacle(own) is None
    support = Support(own)
    assert support.possible
    assert not support.settle(own, CPU)
    assert not support.possible
    assert why in caplog.text
    assert own.training


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_model_that_can_is_told_apart(kind):
    model = make(kind)
    assert obstacle(model) is None
    choose(model)
    assert difference(model, VOCABULARY, CPU) is None
    assert model.config._attn_implementation == NAME


def casting(kind: type[LlamaForCausalLM]) -> Any:
    """As accelerate prepares it for bfloat16: cast inside, float32 to look at."""
    torch.manual_seed(0)
    model = kind(LlamaConfig(**SIZES))
    choose(model)
    forward = model.forward

    def cast(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = forward(*args, **kwargs)
        output.logits = output.logits.float()
        return output

    model.forward = cast
    return model


def test_rounding_of_half_precision_is_told_from_wrong_attention():
    assert difference(casting(LlamaForCausalLM), VOCABULARY, CPU) is None
    assert "apart from those" in str(difference(casting(Deaf), VOCABULARY, CPU))


def test_what_is_switched_off_is_not_tried(caplog):
    model = make("llama")
    support = Support(model, wanted=False)
    assert not support.settle(model, CPU)
    assert model.config._attn_implementation == "sdpa"
    assert not caplog.records


def test_a_saved_model_does_not_know_of_it(tmp_path):
    model = make("llama")
    choose(model)
    model.save_pretrained(tmp_path)
    assert "memfactory" not in (tmp_path / "config.json").read_text()
    assert LlamaForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


# ---- generation ----------------------------------------------------------------------------------


def generate(policy: TransformersPolicy, texts: list[str], limits: list[int]) -> list[Any]:
    async def everything() -> list[Any]:
        return await asyncio.gather(
            *(
                policy.generate([{"role": "user", "content": text}], module="write", max_tokens=limit)
                for text, limit in zip(texts, limits, strict=True)
            )
        )

    return asyncio.run(everything())


def texts(seed: int) -> list[str]:
    """Prompts of three levels; some are equal."""
    rng = random.Random(seed)

    def words(count: int) -> str:
        return " ".join(f"w{rng.randrange(43)}" for _ in range(count))

    found = [f"{chunk} {words(rng.randint(1, 9))}" for chunk in [f"w1 w2 w3 {words(30)}" for _ in range(3)] * 5]
    return [*found, found[0], found[0], words(4)]


@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(1.0), Sampling(0.0, repetition_penalty=1.5)])
@pytest.mark.parametrize("piece", [8192, 7])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_tokens_are_the_same_with_and_without(bench, tokenizer, monkeypatch, kind, piece, sampling):
    monkeypatch.setattr(prefill, "PIECE", piece)
    model = bench.make_model(kind, len(tokenizer))
    prompts = texts(3)
    limits = [3 + 5 * number % 17 for number in range(len(prompts))]  # some end early
    found = []
    for share in (True, False):
        policy = TransformersPolicy(model, tokenizer, sampling=sampling, share_prefix=share)
        policy.seed(5)
        found.append(generate(policy, prompts, limits))
        saved = policy.metrics()["real_over_computed_prefill"]
        assert (saved > 2) == share
    for one, other in zip(*found, strict=True):
        assert one.completion_ids == other.completion_ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@given(sequences | st.integers(0, 1000).map(tree))
def test_prefixes_are_kept_so_that_fewest_positions_are(found):
    paths = Packed(found).paths
    groups = branches.groups(paths)
    assert sorted(member for members, _ in groups for member in members) == list(range(len(found)))
    for members, prefix in groups:
        assert len({tuple(found[member][:prefix]) for member in members}) == 1
        assert all(len(found[member]) > prefix for member in members)
    ordered = sorted(range(len(found)), key=lambda index: paths[index].tolist())
    if len(ordered) > 8:
        return

    def kept(parts):
        total = 0
        for part in parts:
            own = [found[member] for member in part]
            same = next((n for n in range(min(map(len, own))) if len({row[n] for row in own}) > 1), min(map(len, own)))
            prefix = min(same, *(len(row) - 1 for row in own)) if len(own) > 1 else 0
            total += sum(map(len, own)) - (len(own) - 1) * prefix
        return total

    cuts = (places for n in range(len(ordered)) for places in combinations(range(1, len(ordered)), n))
    best = min(kept([ordered[a:b] for a, b in pairwise((0, *places, len(ordered)))]) for places in cuts)
    assert sum(prefix + sum(len(found[m]) - prefix for m in members) for members, prefix in groups) == best


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_prefixes_that_are_kept_once_are_decoded_from(bench, tokenizer, monkeypatch, kind):
    """Were they not, or without float32, each sequence would have a copy."""
    attended = []
    attend = branches.Branches.attend
    monkeypatch.setattr(branches.Branches, "attend", lambda *a: (attended.append(a[2].shape[0]), attend(*a))[1])
    model = bench.make_model(kind, len(tokenizer))
    prompts = texts(4)
    limits = [30 if number % 3 else 4 for number in range(len(prompts))]
    turns = generate(TransformersPolicy(model, tokenizer, sampling=Sampling(0.0)), prompts, limits)
    assert attended[0] == len(prompts)
    assert attended[-1] < len(prompts), "those that ended have left"
    attended.clear()
    generate(TransformersPolicy(copy.deepcopy(model).bfloat16(), tokenizer, sampling=Sampling(0.0)), prompts, limits)
    assert not attended
    monkeypatch.setattr(prefill, "able", lambda *_: False)
    again = generate(TransformersPolicy(model, tokenizer, sampling=Sampling(0.0)), prompts, limits)
    assert not attended
    for one, other in zip(turns, again, strict=True):
        assert one.completion_ids == other.completion_ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_a_model_that_cannot_share_generates_all_the_same(bench, tokenizer):
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": len(tokenizer), "sliding_window": 6}
    model = MistralForCausalLM(MistralConfig(**sizes)).eval()
    prompts = texts(1)
    policies = [TransformersPolicy(model, tokenizer, sampling=Sampling(0.0), share_prefix=share) for share in (0, 1)]
    one, other = (generate(policy, prompts, [9] * len(prompts)) for policy in policies)
    assert [turn.completion_ids for turn in one] == [turn.completion_ids for turn in other]


@pytest.mark.parametrize("longest", [(6, 40), (40, 6)])
def test_two_policies_on_one_model_decode_beside_each_other(bench, tokenizer, longest):
    """Each goes on whenever a turn of the other ends, and one is done when the other is in the middle of its batch."""
    model = bench.make_model("llama", len(tokenizer))
    prompts = texts(4)
    limits = [[2 + 5 * number % most for number in range(len(prompts))] for most in longest]
    policies = [TransformersPolicy(model, tokenizer, sampling=Sampling(0.0)) for _ in longest]
    alone = [generate(policy, prompts, own) for policy, own in zip(policies, limits, strict=True)]

    async def together():
        asked = [
            policy.generate([{"role": "user", "content": text}], module="write", max_tokens=most)
            for policy, own in zip(policies, limits, strict=True)
            for text, most in zip(prompts, own, strict=True)
        ]
        return await asyncio.gather(*asked)

    turns = asyncio.run(together())
    for one, other in zip([turn for turns in alone for turn in turns], turns, strict=True):
        assert one.completion_ids == other.completion_ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)

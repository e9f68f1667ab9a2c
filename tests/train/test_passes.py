"""Passes: rows are cut to a budget as well as they can be, and together they have the gradient of separate rows."""

from __future__ import annotations

import random
from contextlib import contextmanager
from itertools import combinations, pairwise
from math import ceil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from trl.trainer.utils import add_fused_lm_head

from memfactory.policy import prefix_sharing
from memfactory.policy.prefix_sharing import common, unique_ids
from memfactory.policy.prefix_support import Support
from memfactory.policy.stem import Stem
from memfactory.train.passes import GATHERED, PASS, SCORED, cut, cut_shared, deal, plan_passes, stems_of
from memfactory.train.rows import Row, collate
from memfactory.train.scoring import CompletionScorer

CPU = torch.device("cpu")
token = st.integers(0, 3)  # few ids, so that prefixes coincide by chance too
tokens = st.lists(token, min_size=1, max_size=5)
lengths = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), max_size=40)


@contextmanager
def packing_everything():
    """However little it saves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_sharing, "LEAST", 0)
        patch.setattr(prefix_sharing, "WORTH", 1.0)
        yield


def rows_of(sizes):
    return [Row(i, [1] * p, [2] * t) for i, (p, t) in enumerate(sizes)]


@given(lengths, st.integers(1, 300))
def test_cut_keeps_the_budget_and_loses_nothing(sizes, budget):
    rows = rows_of(sizes)
    batches = cut(rows, budget)
    assert sorted(id(row) for batch in batches for row in batch) == sorted(map(id, rows))
    for batch in batches:
        assert batch
        assert len(batch) == 1 or len(batch) * max(row.length for row in batch) <= budget
    for batch in batches[:-1]:  # none is closed while the next row would have fitted
        assert (len(batch) + 1) * max(row.length for row in batch) > budget


@given(lengths, st.integers(1, 300), st.integers(1, 9))
def test_deal_is_balanced_and_loses_nothing(sizes, budget, hands):
    batches = cut(rows_of(sizes), budget)
    dealt = deal(batches, hands)
    assert len(dealt) == hands
    assert [batch for hand in dealt for batch in hand] == batches
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


rows_alike = st.lists(
    st.builds(lambda prompt, completion: Row(0, prompt, completion), tokens, tokens), min_size=1, max_size=7
)


def positions(rows):
    return unique_ids([row.prompt_ids + row.completion_ids for row in rows])


def size(rows):
    """What counts against the budget."""
    return positions(rows) + sum(GATHERED * row.length + SCORED * len(row.completion_ids) for row in rows)


@given(rows_alike, st.integers(1, 60))
def test_rows_that_begin_alike_are_cut_as_well_as_they_can_be(rows, budget):
    batches = cut_shared(rows, budget)
    assert sorted(map(id, (row for batch in batches for row in batch))) == sorted(map(id, rows))
    for batch in batches:
        assert size(batch) <= budget + 1e-9 or len(batch) == 1
    ordered = sorted(rows, key=lambda row: row.prompt_ids + row.completion_ids)

    def cost(places):  # of cutting the sorted rows there
        parts = [ordered[a:b] for a, b in zip((0, *places), (*places, len(rows)), strict=True)]
        if any(size(part) > budget + 1e-9 and len(part) > 1 for part in parts):
            return float("inf")
        return sum(size(part) for part in parts) + PASS * budget * len(parts)

    best = min(cost(places) for n in range(len(rows)) for places in combinations(range(1, len(rows)), n))
    assert sum(size(batch) for batch in batches) + PASS * budget * len(batches) == pytest.approx(best)


def test_a_group_stays_together_where_it_fits():
    groups = [[Row(0, [group] * 20, [5, member]) for member in range(4)] for group in range(3)]
    mixed = [rows[member] for member in range(4) for rows in groups]
    alone = ceil(size(groups[0]))
    assert [{row.prompt_ids[0] for row in batch} for batch in cut_shared(mixed, alone)] == [{0}, {1}, {2}]
    assert [len({row.prompt_ids[0] for row in batch}) for batch in cut_shared(mixed, 2 * alone + 5)] in (
        [2, 1],
        [1, 2],
    )


def test_a_row_over_the_budget_is_alone_and_nothing_is_lost():
    rows = [Row(0, [1] * 50, [2]), Row(0, [1, 2], [3]), Row(0, [1, 2], [4])]
    assert sorted(map(len, cut_shared(rows, 10))) == [1, 2]


# ---- passes that are joined ----------------------------------------------------------------------


def ids_of(row):
    return row.prompt_ids + row.completion_ids


@given(rows_alike, st.integers(1, 60))
def test_stems_are_what_belongs_to_earlier_rows_and_is_not_scored(rows, budget):
    batches = cut_shared(rows, budget, stems=True)
    assert sorted(map(id, (row for batch in batches for row in batch))) == sorted(map(id, rows))
    found = stems_of(batches, budget)
    assert found[0] == []
    for (before, batch), stem in zip(pairwise(batches), found[1:], strict=True):
        assert ids_of(before[-1])[: len(stem)] == stem == ids_of(batch[0])[: len(stem)]
        assert all(len(stem) < len(row.prompt_ids) for row in batch)  # the last id of a prompt predicts a scored one
    for batch, stem in zip(batches, found, strict=True):
        assert size(batch) - len(stem) <= budget + 1e-9 or len(batch) == 1


@given(rows_alike, st.integers(1, 60))
def test_rows_are_cut_for_stems_as_well_as_they_can_be(rows, budget):
    ordered = sorted(rows, key=ids_of)

    def cost(parts):
        total = 0.0
        for part, stem in zip(parts, stems_of(parts, budget), strict=True):
            own = size(part) - len(stem)
            if own > budget + 1e-9 and len(part) > 1:
                return float("inf")
            total += own + PASS * budget + (len(stem) / 3 + PASS * budget) * bool(stem)
        return total

    def parts(places):
        return [ordered[a:b] for a, b in zip((0, *places), (*places, len(rows)), strict=True)]

    best = min(cost(parts(places)) for n in range(len(rows)) for places in combinations(range(1, len(rows)), n))
    assert cost(cut_shared(rows, budget, stems=True)) == pytest.approx(best)


@given(rows_alike, st.integers(1, 60), st.integers(1, 3), st.booleans())
def test_each_step_is_whole_in_itself(rows, budget, steps, stems):
    with packing_everything():
        plan = plan_passes(rows, budget, steps, shared=True, stems=stems)
    assert len(plan) == steps
    assert sorted(id(row) for step in plan for part in step for row in part.rows) == sorted(map(id, rows))
    for step in plan:
        known: list[int] = []
        for number, part in enumerate(step):
            assert part.grown == len(part.stem) - common(known, part.stem)
            owner = next((later for later in step[number + 1 :]), None)
            if part.stem:  # the pass that is computed next has these ids, in its rows or in its own stem
                assert owner is not None
                assert ids_of(max(owner.rows, key=ids_of))[: len(part.stem)] == part.stem
            known = part.stem
        assert not step or step[-1].stem == []


def row(prompt: list[int], completion: list[int]) -> Row:
    size = len(completion)
    return Row(0, prompt, completion, [1] * size, [1.0] * size, [0.0] * size)


def test_rows_that_share_nothing_are_cut_as_if_prefixes_were_not_shared():
    rows = [Row(0, [first] * length, [1] * 5) for first, length in enumerate([100, 30, 90, 40, 80])]
    (plan,) = plan_passes(rows, 210, 1, shared=True, stems=True)
    assert [part.rows for part in plan] == cut(rows, 210)
    alike = [Row(0, [1] * 100, [number] * 5) for number in range(5)]
    (plan,) = plan_passes(alike, 210, 1, shared=True, stems=True)
    assert [part.rows for part in plan][::-1] == cut_shared(alike, 210, stems=True) != cut(alike, 210)


def tree(seed: int) -> list[Row]:
    """Rows of four levels: instructions, a question and chunk of each group, a memory, what was sampled."""
    rng = random.Random(seed)

    def words(low: int, high: int) -> list[int]:
        return [rng.randrange(5, 48) for _ in range(rng.randint(low, high))]

    instructions, rows = words(2, 9), []
    for _ in range(rng.randint(1, 3)):
        chunk = instructions + words(4, 20)
        for _ in range(rng.randint(1, 3)):
            prompt = chunk + words(0, 6)
            rows += [row(prompt, words(1, 6)) for _ in range(rng.randint(1, 3))]
    rng.shuffle(rows)
    return rows


def model_of(kind: str, **more):
    torch.manual_seed(0)
    config, model = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[kind]
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}
    return model(config(**sizes, **heads, **more))


def step_of(model, rows, budget, *, shared, stems, dtype=None):
    """Log-probs and gradients of one step, and how many positions its passes computed."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    scorer = CompletionScorer(base, share_prefix=shared)
    scorer.sharing.settle(model, CPU)
    model.zero_grad()
    weights = torch.Generator().manual_seed(1)
    factor = {id(row): torch.randn(len(row.completion_ids), generator=weights) for row in rows}
    logps, computed, joined = {}, 0, False
    (passes,) = plan_passes(rows, budget, 1, shared=shared, stems=stems)
    for part in passes:
        micro = collate(part.rows, [1.0] * len(part.rows), 0)
        columns = [torch.cat([micro[f"prompt_{of}"], micro[f"completion_{of}"]], 1) for of in ("ids", "mask")]
        width = micro["completion_ids"].shape[1]
        computed += part.grown + scorer.positions(list(map(ids_of, part.rows)), part.stem, joined=joined)
        joined = bool(part.stem)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            with scorer.continuing(model, part.stem, CPU, join_in=False):
                found, _, _ = scorer.score(model, *columns, width)
            loss = sum((found[i, : len(factor[id(row)])] * factor[id(row)]).sum() for i, row in enumerate(part.rows))
        loss.backward()
        logps |= {id(row): found[i, : len(row.completion_ids)].detach() for i, row in enumerate(part.rows)}
    grads = {name: own.grad.clone() for name, own in model.named_parameters() if own.grad is not None}
    return torch.cat([logps[id(row)] for row in rows]), grads, computed


def distance(one, other):
    return float(sum((one[name] - other[name]).square().sum() for name in other).sqrt())


@pytest.fixture
def everything_is_packed():
    with packing_everything():
        yield


@pytest.mark.parametrize("how", ["plain", "adapter", "checkpointing", "adapter, checkpointing"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_joined_passes_have_the_gradient_of_separate_rows(everything_is_packed, kind, how):
    model = model_of(kind)
    add_fused_lm_head(model)
    if "adapter" in how:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    if "checkpointing" in how:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    saved = []

    @settings(max_examples=8, deadline=None)
    @given(rows=st.integers(0, 10**6).map(tree), budget=st.integers(5, 120))
    def check(rows, budget):
        logps, grads, computed = step_of(model, rows, budget, shared=True, stems=True)
        expected_logps, expected, separate = step_of(model, rows, 10_000, shared=False, stems=False)
        torch.testing.assert_close(logps, expected_logps, atol=1e-5, rtol=1e-5)
        assert grads.keys() == expected.keys()
        whole = distance(expected, {name: torch.zeros_like(grad) for name, grad in expected.items()})
        for name, grad in expected.items():
            assert float((grads[name] - grad).norm()) < 1e-5 * max(float(grad.norm()), 1e-2 * whole), name
        saved.append(computed < separate)

    check()
    assert any(saved)


def test_every_position_goes_backward_once_whatever_the_budget(everything_is_packed):
    model = model_of("qwen3").train()
    add_fused_lm_head(model)
    rows = [row([9] * 50 + [member], [5, 6, member]) for member in range(5, 13)]
    unique = unique_ids(list(map(ids_of, rows)))
    backward = []
    model.model.layers[0].register_full_backward_hook(lambda _, __, grads: backward.append(grads[0].shape[1]))
    for budget in (1, 30, 60, 1000):
        _, _, computed = step_of(model, rows, budget, shared=True, stems=True)
        # the last id of a prompt is computed in each pass
        assert unique <= sum(backward) <= unique + len(rows)
        assert computed - sum(backward) in (0, 50), "the stem, once more and forward only"
        backward.clear()


def test_bfloat16_is_as_near_to_float32_as_separate_rows_are(everything_is_packed):
    model = model_of("qwen3").train()
    add_fused_lm_head(model)
    for seed in range(5):
        rows = tree(seed)
        _, exact, _ = step_of(model, rows, 10_000, shared=False, stems=False)
        _, separate, _ = step_of(model, rows, 10_000, shared=False, stems=False, dtype=torch.bfloat16)
        _, joined, _ = step_of(model, rows, 40, shared=True, stems=True, dtype=torch.bfloat16)
        assert distance(joined, exact) < 1.2 * distance(separate, exact)


def test_passes_in_another_order_are_told(everything_is_packed):
    """A stem whose owner does not come next would lose its gradients without a word."""
    model = model_of("qwen3").train()
    add_fused_lm_head(model)
    scorer = CompletionScorer(model, share_prefix=True)
    assert scorer.sharing.settle(model, CPU)

    def score(ids, stem):
        with scorer.continuing(model, stem, CPU, join_in=False):
            columns = torch.tensor([ids])
            scorer.score(model, columns, torch.ones_like(columns), 2)[0].sum().backward()

    score([7, 8, 9, 10, 11], [7, 8])
    with pytest.raises(AssertionError, match="another order"):
        score([30, 8, 9, 10], [])


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_what_is_dropped_at_random_is_not_joined(kind):
    assert Support(model_of(kind))._staged
    assert not Support(model_of(kind, attention_dropout=0.1))._staged
    adapter = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)
    assert not Support(get_peft_model(model_of(kind), adapter).get_base_model())._staged


def test_layers_that_do_not_say_which_they_are_are_not_joined():
    model = model_of("llama")
    for layer in model.model.layers:
        del layer.self_attn.layer_idx
    support = Support(model)
    assert support.settle(model, CPU)
    assert not support.stems


def test_only_one_path_is_kept():
    model = model_of("llama").eval()
    assert Support(model).settle(model, CPU)
    stem = Stem()
    for path, grown in (([5, 6, 7, 8], 4), ([5, 6, 9], 1), ([5], 0), ([10, 11], 2), ([], 0)):
        seen = []
        handle = model.model.embed_tokens.register_forward_hook(lambda *a, seen=seen: seen.append(a[1][0].shape[1]))
        stem.move(model, path, CPU)
        handle.remove()
        assert sum(seen) == grown
        assert all(len(states) == len(path) for states in (*stem.keys.values(), *stem.values.values()))
        assert len(stem.keys) == len(stem.values) == (2 if path else 0)

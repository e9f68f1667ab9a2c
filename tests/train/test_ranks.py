"""Two processes make the step that one makes: same episodes, same gradient, on every rank; and fail as one."""

from __future__ import annotations

import pytest
import torch

from tests.train.rank_jobs import CASES, FAILURES


@pytest.fixture(scope="module")
def on_two_ranks(pairs):
    return pairs["ddp"][1]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_gradient_is_that_of_one_process(bench, tokenizer, tmp_path, on_two_ranks, name):
    first, second = on_two_ranks[name]
    assert torch.equal(first, second), "the ranks hold different gradients: their weights will drift apart"
    alone = bench.alone(CASES[name], tokenizer, tmp_path)
    assert alone.norm() > 1e-4
    assert bench.relative(first, alone) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("where", "ranks"), FAILURES)
def test_all_ranks_end_with_the_error_of_one(on_two_ranks, where, ranks):
    first, second = on_two_ranks[f"{where} {ranks}"]
    assert first == second
    assert f"rank {ranks[0]} failed" in first
    assert f"OSError: no {where} here" in first

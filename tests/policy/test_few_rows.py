"""Products of a few rows, the other way round: the same numbers, and a model is left as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from memfactory.policy import few_rows
from memfactory.policy.few_rows import gaining, turned

pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch without Intel's library")


@pytest.fixture(autouse=True)
def two_threads(one_thread: None) -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (15, 1), (16, 1), (32, 1), (63, 1), (64, 1), (4, 8), (200,), (20,)])
@torch.no_grad()
def test_the_numbers_are_the_same_whatever_the_rows(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer, states = nn.Linear(256, 300, bias=bias), torch.randn(*shape, 256)
    expected = layer(states)
    assert gaining(layer) == [layer]
    with turned([layer]):
        found = layer(states)
    assert found.shape == expected.shape
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert vars(layer).keys() == vars(nn.Linear(2, 2)).keys(), "the layer is not as it was"


def test_only_a_few_rows_are_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    plain: list[int] = []
    monkeypatch.setattr(few_rows, "linear", lambda x, *rest: (plain.append(x.shape[0]), linear(x, *rest))[1])
    layer = nn.Linear(256, 256)
    with torch.no_grad(), turned([layer]):
        for rows in (1, 15, 16, 63, 64):
            layer(torch.randn(rows, 256))
    assert plain == [1, 15, 64]


def test_who_has_nothing_to_gain_is_left_alone() -> None:
    class Own(nn.Linear):
        """With a forward pass of its own, as quantized layers and adapters have."""

    patched = nn.Linear(256, 256)
    patched.forward = partial(nn.Linear.forward, patched)  # type: ignore[method-assign]
    layers = [
        nn.Linear(8, 8),
        nn.Linear(256, 256).bfloat16(),
        Own(256, 256),
        patched,
        nn.Linear(256, 256, device="meta"),
    ]
    assert gaining(nn.Sequential(*layers)) == []
    torch.set_num_threads(1)
    assert gaining(nn.Linear(256, 256)) == []


def test_an_error_inside_leaves_the_model_as_it_was() -> None:
    layer = nn.Linear(256, 256)
    with suppress(RuntimeError), torch.no_grad(), turned([layer]):
        layer(torch.randn(20, 255))
    assert "forward" not in vars(layer)


@torch.no_grad()
def test_half_precision_is_not_touched() -> None:
    layer, states = nn.Linear(256, 256), torch.randn(20, 256)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = layer(states)
        with turned([layer]):
            assert torch.equal(layer(states), expected)

"""Numbers that are no numbers: the run stops, and neither weights nor checkpoints have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from memfactory.errors import EngineError

OPTIONS: dict[str, Any] = {"num_generations": 4, "per_device_train_batch_size": 8, "loss_type": "dapo"}


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def test_weights_that_are_not_finite_are_not_trained(bench, tokenizer, tmp_path):
    model = bench.make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(EngineError, match=r"the weights at step 0 are not finite: first in .*layers\.1\.mlp\.up_proj"):
        bench.ours(bench.groups(2, 4), model, tokenizer, tmp_path, **OPTIONS)


def test_a_gradient_that_is_not_finite_changes_no_weight(bench, tokenizer, tmp_path):
    """The weights are finite, and what is computed with them is not."""
    model, before = bench.make_model(), bench.make_model()
    for each in (model, before):
        with torch.no_grad():
            each.model.norm.weight.fill_(1e38)
    with pytest.raises(EngineError, match="step 1: the gradient is not finite, so no update was made") as raised:
        bench.ours(bench.groups(2, 4), model, tokenizer, tmp_path, save_strategy="steps", save_steps=1, **OPTIONS)
    assert "learning_rate" in raised.value.fix
    for name, weight in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    assert saved(tmp_path) == []


def test_an_update_that_spoils_the_weights_is_not_saved(bench, tokenizer, tmp_path):
    options = OPTIONS | {"learning_rate": 1e39, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(EngineError, match="the weights after step 1 are not finite"):
        bench.ours(bench.groups(2, 4), bench.make_model(), tokenizer, tmp_path, **options)
    assert saved(tmp_path) == []

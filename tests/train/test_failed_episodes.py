"""An episode that could not be run moves no weight, whatever is left of it."""

from __future__ import annotations

import torch

from memfactory.episode import Episode


def test_it_moves_no_weight(bench, tokenizer, tmp_path):
    """The gradient is that of a batch in which the episode has no reward, to the bit."""
    options = {"num_generations": 4, "per_device_train_batch_size": 8, "loss_type": "dapo"}
    gradients = {}
    for kind in ("unmeasured", "failed", "failed with turns"):
        groups = bench.groups(2, 4)
        model = bench.make_model()
        bench.fill_in_logprobs(groups, model)
        own = groups["w0"]
        if kind == "unmeasured":
            own[1].memory = "None"
        elif kind == "failed":
            own[1] = Episode(own[1].task, failed="store: disk: full")
        else:
            own[1].failed = "service: away"
        (gradients[kind],), trainer = bench.ours(groups, model, tokenizer, tmp_path / kind, **options)
        (count,) = trainer._metrics["train"]["episodes/failed"] or [1]
        assert count == 1
    assert gradients["unmeasured"].norm() > 0
    assert torch.equal(gradients["failed"], gradients["unmeasured"])
    assert torch.equal(gradients["failed with turns"], gradients["unmeasured"])

"""What `AsyncEpisodeTrainer` relies on in TRL's experimental asynchronous trainer; see `test_trl_contract.py`."""

from __future__ import annotations

import ast
import dataclasses
import inspect

import numpy as np
import pytest
import torch
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, async_grpo_trainer, packing
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

from memfactory.train import async_config, async_trainer
from memfactory.train.async_trainer import AsyncEpisodeTrainer, _NoTransfer
from memfactory.train.async_worker import EpisodeRolloutWorker
from memfactory.train.config import EpisodeGRPOConfig
from tests.train.test_trl_contract import calls, changed, tree

METHODS = {
    "get_train_dataloader": ["self"],
    "training_step": ["self", "model", "inputs", "num_items_in_batch"],
    "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    "_sync_weight": ["self"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_get_grad_norm": ["self", "model", "grad_norm"],
    "evaluate": ["self", "eval_dataset", "ignore_keys", "metric_key_prefix"],
    "_log_step_metrics": ["self"],
}


@pytest.mark.parametrize("name", METHODS)
def test_signatures_of_methods_we_override_or_call(name):
    method = getattr(AsyncGRPOTrainer, name, None)
    assert method is not None, changed(f"AsyncGRPOTrainer.{name} is gone", async_trainer.__name__)
    found = list(inspect.signature(method).parameters)
    assert found == METHODS[name], changed(f"AsyncGRPOTrainer.{name} takes {found}", async_trainer.__name__)
    own = list(inspect.signature(getattr(AsyncEpisodeTrainer, name)).parameters)
    assert own == found, f"AsyncEpisodeTrainer.{name} takes {own}"


def test_every_override_is_in_the_table():
    own = {name for name, value in vars(AsyncEpisodeTrainer).items() if callable(value)}
    overrides = {name for name in own if hasattr(AsyncGRPOTrainer, name) and name != "__init__"}
    assert overrides == {name for name in overrides if f"``{name}``" in (async_trainer.__doc__ or "")}


@pytest.mark.parametrize(
    ("protocol", "own"),
    [("RolloutWorkerProtocol", EpisodeRolloutWorker), ("WeightTransferProtocol", _NoTransfer)],
)
def test_protocols_are_implemented(protocol, own):
    asked = {
        name: list(inspect.signature(value).parameters)
        for name, value in vars(getattr(async_grpo_trainer, protocol)).items()
        if inspect.isfunction(value) and not name.startswith("_")
    }
    assert asked, changed(f"{protocol} asks for nothing", own.__name__)
    for name, parameters in asked.items():
        assert list(inspect.signature(getattr(own, name)).parameters) == parameters, changed(protocol, own.__name__)


def test_the_worker_is_started_after_the_first_sync_and_stopped_whatever_happens():
    begin = calls(async_grpo_trainer._TrainBeginCallback.on_train_begin)
    assert {"self._trainer._sync_weight", "self._trainer.rollout_worker.start"} <= begin, changed(
        "train begin", "the order of the first sync and the worker"
    )
    loop = tree(AsyncGRPOTrainer._inner_training_loop)
    ended = {ast.unparse(n.func) for t in ast.walk(loop) if isinstance(t, ast.Try) for s in t.finalbody
             for n in ast.walk(s) if isinstance(n, ast.Call)}  # fmt: skip
    assert "self.rollout_worker.stop" in ended, changed("the loop does not stop the worker", "its life")


def test_a_transfer_of_ours_keeps_trl_from_asking_the_server():
    """Else its constructor waits for a server, and sends merged weights or adapters by itself."""
    source = ast.unparse(tree(AsyncGRPOTrainer.__init__))
    assert "if weight_transfer is None and is_peft_model(model):" in source, changed(
        "how the way of weights is decided", "AsyncEpisodeTrainer.__init__"
    )
    assert "self.rollout_worker = rollout_worker" in source, changed("the injected worker", "AsyncEpisodeTrainer")


def test_what_step_metrics_read_of_the_batches():
    read = {
        ast.unparse(node)
        for node in ast.walk(tree(AsyncGRPOTrainer._log_step_metrics))
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("self._rollout_dataset.")
    }
    assert read == {"self._rollout_dataset.wait_s"}, changed(f"step metrics read {read}", "async_trainer._Batches")


def test_the_loss_divides_by_what_we_put_in():
    loss = ast.unparse(tree(AsyncGRPOTrainer.compute_loss))
    for line in (
        "global_n_tokens = inputs['global_n_tokens'][0]",
        "tokens_per_rank = (global_n_tokens / world_size).clamp(min=1.0)",
        "loss = loss / tokens_per_rank.to(torch.float32)",
        "loss = loss / self.current_gradient_accumulation_steps",
        "per_token_loss = -torch.min(per_token_loss1, per_token_loss2)",
    ):
        assert line in loss, changed(f"compute_loss has no `{line}`", "the reduction in memfactory.train.folding")


def test_samples_that_are_equal_share_every_token_and_keep_their_own_advantages():
    ids, logprobs = np.array([3, 4, 5]), np.array([0.0, -1.0, -2.0])
    row = packing.TreeRow()
    for mask, advantage in (([0, 1, 0], 1.0), ([0, 0, 1], 2.0)):
        values = {"input_ids": ids, "completion_mask": np.array(mask), "old_log_probs": logprobs}
        row.add(values | {"advantage": advantage, "group_id": 0, "metrics": {}})
    packed = row.pack()
    assert packed["input_ids"].tolist() == [3, 4, 5]
    assert packed["advantages"].tolist() == [1.0, 2.0]
    assert packed["shift_labels"].tolist() == [4, 5, -100]
    batch = async_grpo_trainer.DataCollatorForRollout(0)([[row]])
    assert torch.equal(batch["global_n_tokens"], torch.tensor([2.0]))


def test_fields_of_a_sample():
    names = {field.name for field in dataclasses.fields(RolloutSample)}
    assert {"input_ids", "completion_mask", "old_log_probs", "advantage", "model_version", "group_id"} <= names


def test_configuration_fields():
    theirs = {field.name for field in dataclasses.fields(AsyncGRPOConfig)}
    own = {field.name for field in dataclasses.fields(EpisodeGRPOConfig)}
    assert {"max_staleness", "weight_sync_steps", "token_budget", "fork_threshold_tokens"} <= theirs
    for name in (*async_config._OURS, *async_config._NEUTRAL):
        assert name in own, changed(f"GRPOConfig has no {name}", async_config.__name__)
        assert name not in theirs, changed(f"AsyncGRPOConfig has {name} now", async_config.__name__)

"""`AsyncEpisodeTrainer`: TRL's asynchronous GRPO over episodes of many turns, sampled while it trains.

What is TRL's stays TRL's: the model and its packed attention, the head that computes log-probs, the loss, the
optimizer, the life of the worker, most metrics. This subclass replaces what an update is made from, and how weights
reach the servers:

==========================================  ==============================================================
Override                                    Replaces, in trl 1.16.0
                                            ``experimental/async_grpo/async_grpo_trainer.py``
==========================================  ==============================================================
``get_train_dataloader``                    lines 1419-1473: an item is a whole generation batch in as many
                                            passes as the token budget needs, averaged over all its tokens;
                                            TRL closes a pass when a sample does not fit and averages passes
``training_step``                           lines 1627-1632: called unchanged, once for each of these passes
``_sync_weight``                            lines 1733-1749 and, through them, 1751-1858: adapters go by
                                            :class:`memfactory.train.weight_sync.AdapterSync`, which checks that
                                            every server samples from them; NCCL and merged weights are not used
``evaluate``                                held-out episodes by the same agent; TRL's trainer has none
``_save_checkpoint``                        lines 1860-1873 are called unchanged; what a run goes on from is
                                            added, and a seal
``_load_optimizer_and_scheduler``, ``_load_from_checkpoint``   read it
``_get_grad_norm``                          a gradient that is not finite ends the run before the update
==========================================  ==============================================================

TRL's ``weight_transfer`` is given one that does nothing: it merges adapters before it sends them. TRL's own dropping
of old samples (``RolloutQueueDataset``, lines 303-408) is not reached: batches are not begun before they will be young
enough (:mod:`memfactory.train.async_worker`), and :func:`memfactory.train.folding.split_stale` sees to it.

`tests/train/test_async_contract.py` fails when an installed TRL no longer fits this table.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from queue import Empty
from typing import Any, cast

import torch
from datasets import Dataset
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy
from trl.experimental.async_grpo.async_grpo_trainer import AsyncGRPOTrainer, DataCollatorForRollout
from trl.trainer.utils import RepeatSampler

from memfactory.errors import RecipeError
from memfactory.evaluate.run import EvalOptions, evaluate_agent
from memfactory.policy.base import Sampling
from memfactory.policy.models import eos_ids
from memfactory.policy.transformers_backend import TransformersPolicy
from memfactory.policy.vllm_policy import VLLMPolicy
from memfactory.train.async_config import AsyncGRPOConfig, several_processes
from memfactory.train.async_worker import EpisodeRolloutWorker, RolloutBatch, Rules
from memfactory.train.folding import passes, split_stale
from memfactory.train.health import Health
from memfactory.train.learners import Learners
from memfactory.train.ledger import Ledger, Played, play
from memfactory.train.ranks import Ranks
from memfactory.train.rollout_log import log_rollout, rollout_metrics
from memfactory.train.sealed import NUMPY, load_state, reading, sealed, state_file
from memfactory.train.trainer import Parts, seed_of
from memfactory.train.weight_sync import WeightSync

_STATE_FILE = "async_state.pt"
_POLL = 0.5
"""Seconds between two looks at whether the worker still lives, while an update waits for episodes."""


class AsyncEpisodeTrainer(AsyncGRPOTrainer):
    """GRPO over episodes that servers sample while it trains.

    Args:
        parts: agent, tasks, rewards, credit, limits; `route` puts servers in the place of the model.
        model: name or folder of the model that is trained; TRL loads it.
        args: from :func:`memfactory.train.async_config.build_async_config`. An update takes
            `per_device_train_batch_size` episodes, `num_generations` of a task.
        recipe_args: the `GRPOConfig` it was made from: what TRL's asynchronous one has no field for.
        kwargs: passed on to TRL's trainer (processing_class, peft_config, callbacks).

    Raises:
        RecipeError: several processes train, or a batch needs more tasks than there are.
    """

    args: Any
    model: Any
    processing_class: Any

    def __init__(self, parts: Parts, model: str, args: AsyncGRPOConfig, recipe_args: Any, **kwargs: Any) -> None:
        self.parts = parts
        self.ranks = Ranks()
        if self.ranks.count > 1:
            raise several_processes(self.ranks.count)
        generations = int(args.num_generations)
        self._rules = Rules(
            loss_type=recipe_args.loss_type,
            scale_rewards=recipe_args.scale_rewards,
            max_length=args.max_completion_length,
            mask_truncated=recipe_args.mask_truncated_completions,
            max_failed_share=parts.rollout.max_failed_share,
            max_staleness=args.max_staleness,
            seed=lambda *which: seed_of(args.seed, *which),
        )
        per_batch = args.per_device_train_batch_size // generations
        order = _Order(len(parts.train_tasks), per_batch, generations, recipe_args.shuffle_dataset, args.seed)
        worker = EpisodeRolloutWorker(
            parts.agent, parts.train_tasks, parts.rewards, self._rules, order, int(args.max_steps)
        )
        super().__init__(
            model=model,
            args=args,
            train_dataset=Dataset.from_dict({"prompt": [""] * len(parts.train_tasks)}),
            rollout_worker=cast(Any, worker),  # its queues are of another type than the protocol's
            weight_transfer=cast(Any, _NoTransfer()),
            **kwargs,
        )
        self.args.eval_strategy = IntervalStrategy(recipe_args.eval_strategy)
        self.args.load_best_model_at_end = recipe_args.load_best_model_at_end
        self.worker = worker
        plain = self.accelerator.unwrap_model(self.model)
        base = plain.get_base_model() if hasattr(plain, "get_base_model") else plain
        trained = TransformersPolicy(
            plain,
            self.processing_class,
            sampling=Sampling(args.temperature),
            eos_ids=eos_ids(base, self.processing_class),
            autocast=self.accelerator.autocast,
            template_options=cast(dict[str, Any], args.chat_template_kwargs or {}),
        )
        self.policy = parts.route(trained)
        worker.policy = self.policy
        served = self.policy.trained
        if isinstance(served, VLLMPolicy):
            served.pool.beside = True
            if isinstance(served.push, WeightSync):
                served.push.options = self._chain
                served.push.kept = args.max_staleness + 2  # a server may have to read one again
        self.learners = Learners(parts.agent)
        self._seconds = {"wait": 0.0, "train": 0.0, "optimizer": 0.0}
        self._window_start: float | None = None
        self.totals = {"episodes": 0, "generated_tokens": 0, "trained_tokens": 0, "stale_samples": 0}
        self.total_seconds = dict.fromkeys((*self._seconds, "other"), 0.0)
        self.ledger = Ledger(
            [task.id for task in parts.train_tasks],
            per_batch,
            parts.run.log_ledger if parts.run is not None else None,
        )
        self.health = Health(self)
        self._rewards_state: Mapping[str, Any] = parts.rewards.state_dict()
        self.last_evaluation: tuple[int, dict[str, float]] | None = None
        """Step and metrics of the newest evaluation."""
        self.add_callback(_StepClock(self))

    # ---- one update --------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Items are the passes of a generation batch, as long as there are batches."""
        self._rollout_dataset: Any = _Batches(self)
        return DataLoader(self._rollout_dataset, batch_size=None, collate_fn=lambda item: item, num_workers=0)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward over the passes of a batch; the loss is their sum."""
        if self._window_start is None:
            self._window_start = time.perf_counter() - self._rollout_dataset.wait_s
        start = time.perf_counter()
        total = torch.zeros((), device=self.args.device)
        for own in inputs:
            total += super().training_step(model, own, None)
        self._step_trained_tokens = float(self._trained_now)  # TRL adds N for every pass
        self.ledger.enter(0)
        self.health.losses.append(total.detach())
        self._seconds["train"] += time.perf_counter() - start
        return total

    def _take(self) -> RolloutBatch:
        """The next batch; waits for it.

        Raises:
            Exception: the worker has failed; what it raised.
        """
        start = time.perf_counter()
        while True:
            try:
                batch = self.worker.rollout_buffer.get(timeout=_POLL)
                break
            except Empty:
                self.worker.check_health(self.args.heartbeat_stale_after_s)
        waited = time.perf_counter() - start
        self._rollout_dataset.wait_s += waited
        self._seconds["wait"] += waited
        return batch

    def _begin(self, batch: RolloutBatch) -> list[Mapping[str, Any]]:
        """Passes of `batch`, which is trained now; logs it."""
        step, metrics = self.state.global_step, self._metrics["train"]
        fresh, stale = split_stale(batch.samples, step, self.args.max_staleness)
        for own in fresh:
            age = float(step - own.sample.model_version)
            metrics["sample/staleness_mean"].append(age)
            metrics["sample/staleness_max"].append(age)
        metrics["sample/dropped_stale_total"].append(float(len(stale)))
        for name, value in rollout_metrics(
            batch.episodes, batch.assessment, self.ranks, self.args.num_generations
        ).items():
            metrics[name].append(value)
        for name, value in self.policy.metrics().items():
            metrics[f"server/{name}"].append(value)
        for name, value in batch.seconds.items():
            metrics[f"rollout/{name}_s"].append(value)
        self._trained_now = sum(int(own.sample.completion_mask.sum()) for own in fresh)
        metrics["rows/count"].append(float(batch.rows))
        metrics["rows/trained"].append(float(batch.rows_trained))
        metrics["tokens/trained"].append(float(self._trained_now))
        self.totals["episodes"] += len(batch.episodes)
        self.totals["generated_tokens"] += int(metrics["tokens/generated"][-1])
        self.totals["trained_tokens"] += self._trained_now
        self.totals["stale_samples"] += len(stale)
        self._enter_into_ledger(batch, {own.episode for own in fresh}, {own.episode for own in stale})
        self._rewards_state = batch.rewards_state
        run = self.parts.run
        if run is not None and (step + 1) % max(int(self.args.logging_steps), 1) == 0:
            log_rollout(run, self.ranks, step + 1, batch.episodes, batch.assessment, self.parts.rollout.log_episodes)
        return passes(fresh, self.args.token_budget, float(batch.tokens), self._collator())

    def _collator(self) -> DataCollatorForRollout:
        return DataCollatorForRollout(
            self.processing_class.pad_token_id,
            groups_trained=self._trained_groups,
            metrics=self._metrics["train"],
            token_budget=self.args.token_budget,
        )

    def _enter_into_ledger(self, batch: RolloutBatch, fresh: set[int], stale: set[int]) -> None:
        """What became of the prompts of `batch`. They are issued, for the ledger, when their batch is handed over:
        a run that was killed issues those that were under way again, and only then are they in it."""
        step = self.state.global_step + 1
        self.ledger.issue(step, batch.prompts)
        played = [
            Played.of(episode, batch.prompts[place], (0,) if place in fresh else ())
            for place, episode in enumerate(batch.episodes)
        ]
        groups = dict.fromkeys(episode.group for episode in played)  # in the order in which they were compared
        why, steps, faults = play(
            played,
            dict(zip(groups, batch.assessment.advantages.states, strict=True)),
            self.ledger.names,
            enough=min(2, self.args.num_generations),
            masked=self._rules.mask_truncated,
        )
        why |= {prompt: "stale" for prompt in why if any(batch.prompts[place] == prompt for place in stale)}
        more = {"faults": faults} if faults else {}
        counts = {"episodes": len(played), "unscored": batch.assessment.failed}
        self.ledger.finish(step, why, steps, **counts, **more)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self.health.check_gradients(norm)
        return norm

    # ---- weights -----------------------------------------------------------------------------

    def _sync_weight(self) -> None:
        """Have the servers sample from the weights of now, and tell the worker.

        Turns go on meanwhile; those that were begun end with the weights they began with.

        Raises:
            EngineError: the weights are not finite, could not be sent, or a server shows others.
        """
        start = time.perf_counter()
        self.health.check_weights()
        self._publish()
        self._metrics["train"]["perf/weight_sync_s"].append(time.perf_counter() - start)

    def _publish(self) -> None:
        step = self.state.global_step
        with self._sampling_model() as plain:
            self.policy.use(plain, step)
        self.model_version = step
        self.worker.update_model_version(step)

    @contextmanager
    def _sampling_model(self) -> Iterator[Any]:
        """The model in evaluation mode."""
        plain = self.accelerator.unwrap_model(self.model)
        was_training = plain.training
        plain.eval()
        try:
            with torch.no_grad():
                yield plain
        finally:
            plain.train(was_training)

    def _chain(self, length: int) -> dict[str, Any]:
        """What TRL's packed attention takes beside one sequence of `length` ids."""
        device = self.args.device
        ends = torch.tensor([0, length], dtype=torch.int32, device=device)
        return {
            "position_ids": torch.arange(length, device=device)[None],
            "tree_kv_index": torch.arange(length, device=device),
            "tree_cu_seqlens_q": ends,
            "tree_cu_seqlens_k": ends,
            "tree_max_seqlen_q": length,
            "tree_max_seqlen_k": length,
        }

    # ---- evaluation --------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Run the agent on the held-out tasks with the weights of now; episodes for training go on beside it.

        Returns:
            as :meth:`memfactory.train.trainer.EpisodeGRPOTrainer.evaluate`.
        """
        began = time.perf_counter()
        self._publish()
        options = self.parts.eval or EvalOptions(self.parts.rewards)
        result = evaluate_agent(self.parts.agent, self.parts.eval_tasks, self.policy, options)
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in result.metrics.items()}
        if self.parts.run is not None:
            result.log(self.parts.run, self.state.global_step)
        self.last_evaluation = (self.state.global_step, result.metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self._window_start is not None:
            self._window_start += time.perf_counter() - began  # evaluation is no part of an update
        return metrics

    # ---- checkpoints -------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        state = {
            "step": self.state.global_step,
            "rewards": self._rewards_state,  # of the newest batch that was trained: the worker may be ahead of it
            "ledger": self.ledger.state_dict(),
            "totals": self.totals,
            "seconds": self.total_seconds,
            "evaluation": self.last_evaluation,
        }
        with sealed(self, trial, self.ranks) as folder:
            torch.save(state, folder / _STATE_FILE)
            super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with reading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        path = state_file(checkpoint, _STATE_FILE)
        with reading(checkpoint):
            with torch.serialization.safe_globals(NUMPY):
                super()._load_optimizer_and_scheduler(checkpoint)
            state = load_state(path, "cpu")
        self.worker.first = state["step"]  # batches that were under way are begun again
        self.parts.rewards.load_state_dict(state["rewards"])
        self._rewards_state = state["rewards"]
        self.ledger.load_state_dict(state["ledger"])
        self.totals, self.total_seconds = state["totals"], state["seconds"]
        self.last_evaluation = state["evaluation"]


class _NoTransfer:
    """Implements TRL's ``WeightTransferProtocol``: weights go another way, see `AsyncEpisodeTrainer._sync_weight`."""

    def init_weight_transfer(self) -> None: ...

    def pause(self) -> None: ...

    def send_weights(self, iterator: Any) -> None: ...

    def resume(self) -> None: ...

    def destroy(self) -> None: ...


class _Order:
    """Which tasks a batch is made of: those that `EpisodeGRPOTrainer` would take from the same seed.

    Args:
        tasks: how many there are.
        per_batch: of them in a batch.
        generations: episodes of each.

    Raises:
        RecipeError: there are fewer than a batch takes.
    """

    def __init__(self, tasks: int, per_batch: int, generations: int, shuffle: bool, seed: int) -> None:
        if tasks < per_batch:
            raise RecipeError(
                f"train.per_device_train_batch_size: a batch of {per_batch} tasks, and there are {tasks}",
                "no batch could ever be filled",
                "lower it, or raise environment.train_tasks",
            )
        self.per_pass, self.size = tasks // per_batch, per_batch * generations
        self._sampler: Callable[[], Any] = lambda: RepeatSampler(
            range(tasks), generations, per_batch, shuffle=shuffle, seed=seed
        )
        self._drawing, self._pass, self._indexes = self._sampler(), -1, list[int]()

    def __call__(self, number: int) -> list[int]:
        wanted, place = divmod(number, self.per_pass)
        if wanted < self._pass:
            self._drawing, self._pass = self._sampler(), -1
        while self._pass < wanted:  # each pass has an order of its own, drawn from one generator
            self._indexes, self._pass = list(self._drawing), self._pass + 1
        return self._indexes[place * self.size : (place + 1) * self.size]


class _Batches(IterableDataset[Any]):
    """The worker's batches, each as the passes of one update."""

    def __init__(self, trainer: AsyncEpisodeTrainer) -> None:
        self.trainer = trainer
        self.wait_s = 0.0
        """Seconds waited since TRL has last read and reset this."""

    def __iter__(self) -> Iterator[list[Mapping[str, Any]]]:
        while True:
            yield self.trainer._begin(self.trainer._take())


class _StepClock(TrainerCallback):
    """Splits the wall time of an update into phases and logs them in seconds; tells worker, ledger and checks."""

    def __init__(self, trainer: AsyncEpisodeTrainer) -> None:
        self.trainer = trainer
        self._optimizer_start = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.health.check_weights(f"the weights at step {state.global_step}")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._optimizer_start = time.perf_counter()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._seconds["optimizer"] += time.perf_counter() - self._optimizer_start

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer.ledger.update(state.global_step, last=state.global_step >= state.max_steps)
        now = time.perf_counter()
        wall = now - trainer._window_start if trainer._window_start is not None else 0.0
        seconds = trainer._seconds | {"other": max(wall - sum(trainer._seconds.values()), 0.0)}
        for phase, value in seconds.items():
            trainer._metrics["train"][f"time/{phase}"].append(value)
            trainer.total_seconds[phase] += value
        trainer._seconds = dict.fromkeys(trainer._seconds, 0.0)
        trainer._window_start = now

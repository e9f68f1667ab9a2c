"""`EpisodeGRPOTrainer`: TRL's GRPO loop over episodes of many turns.

What is TRL's stays TRL's: options, data order, loss, optimizer, schedules, PEFT, checkpoints,
trackers. This subclass replaces how a generation batch becomes training input:

==========================================  ==============================================================
Override                                    Replaces, in trl 1.16.0 ``trainer/grpo_trainer.py``
==========================================  ==============================================================
``training_step``                           lines 1510-1520: one forward and backward per step becomes one
                                            per micro-batch, their number set by a token budget
``_prepare_inputs``                         lines 1522-1551 and, through them, ``_generate_and_score_completions``
                                            (2324-2937): episodes, rewards, credit, rows
``_get_per_token_logps_and_entropies``      lines 1419-1508: the same numbers without work on padding
``_compute_loss``                           lines 3015-3292 are called unchanged, with the ``dapo`` reduction
                                            and token weights that express every other one
``evaluate``                                held-out episodes by the same agent instead of a loss
``_save_checkpoint``, ``_load_optimizer_and_scheduler``   add the rollout buffer to the checkpoint, and a seal
``save_model``, ``_save_rng_state``         whole weights of sharded models, and files of all ranks before the last one
``_load_from_checkpoint``                   an unreadable file is named
``_get_train_sampler``                      lines 1280-1316 are called unchanged; the sampler is kept, because a
                                            resumed run has to draw the orders of earlier passes again
``_get_grad_norm``                          a gradient that is not finite ends the run before the update
==========================================  ==============================================================

`tests/train/test_trl_contract.py` fails when an installed TRL no longer fits this table.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, cast

import torch
from datasets import Dataset
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import use_adapter

from memfactory.agents.base import Agent
from memfactory.agents.rerolls import places, reroll
from memfactory.agents.running import run_episodes
from memfactory.episode import Episode, StopReason, Task
from memfactory.errors import EngineError
from memfactory.evaluate.run import EvalOptions, evaluate_agent
from memfactory.policy.base import Sampling
from memfactory.policy.models import eos_ids
from memfactory.policy.quantization import adapters_in_float32
from memfactory.policy.routing import RoutedPolicy
from memfactory.policy.transformers_backend import TransformersPolicy
from memfactory.recipe import RolloutSection
from memfactory.reward.measure import Measuring
from memfactory.reward.system import Assessment, RewardSystem
from memfactory.runs import RunFolder
from memfactory.train.distribution import Asked, CheckWrapped, check_options, check_running
from memfactory.train.health import Health
from memfactory.train.learners import Learners
from memfactory.train.ledger import Ledger, Played, play
from memfactory.train.micro_batches import MicroBatch, Positions, assemble
from memfactory.train.passes import Pass, plan_passes
from memfactory.train.ranks import Ranks
from memfactory.train.rollout_log import log_rollout, over_ranks, rollout_metrics
from memfactory.train.rows import Row, build_rows, loss_weights
from memfactory.train.scoring import CompletionScorer
from memfactory.train.sealed import NUMPY, load_state, reading, sealed, state_file
from memfactory.train.sharding import placed, unsharded, whole_state_dict
from memfactory.train.step_clock import StepClock

_BUFFER_FILE = "rollout_buffer.pt"
# Loss types that share the clipped per-token term and differ in how they average it: each is the
# ``dapo`` reduction with other token weights (see `rows.loss_weights`).
_AS_DAPO = ("grpo", "bnpo", "dr_grpo", "luspo")
SUPPORTED_LOSS_TYPES = ("dapo", "cispo", "vespo", *_AS_DAPO)


@dataclass
class Parts:
    """What an episode trainer needs beside TRL's arguments."""

    agent: Agent
    train_tasks: Sequence[Task]
    eval_tasks: Sequence[Task]
    rewards: RewardSystem
    eval: EvalOptions | None = None
    """Absent: evaluate with `rewards` and the defaults."""
    rollout: RolloutSection = field(default_factory=RolloutSection)
    run: RunFolder | None = None
    """Where episodes are logged; None logs none."""
    route: Callable[[TransformersPolicy], RoutedPolicy] = RoutedPolicy
    """Puts other models beside the trained one, for modules that are not trained. Default: there are none."""


def _never_called(completions: list[Any], **columns: Any) -> list[float | None]:
    """TRL refuses to start without a reward function; rewards here come from `Parts.rewards`."""
    raise EngineError(
        "TRL's own reward path was reached",
        "the installed TRL no longer calls `_prepare_inputs` as 1.16 does",
        "install the pinned version: pip install 'trl>=1.16,<1.17'",
    )


class EpisodeGRPOTrainer(GRPOTrainer):
    """GRPO over episodes.

    Args:
        parts: agent, tasks, rewards, credit, limits.
        model: policy model, not yet wrapped.
        args: TRL's configuration. Batch sizes count episodes: `per_device_train_batch_size` episodes per
            training step, `num_generations` episodes per task.
        kwargs: passed on to `trl.GRPOTrainer` (processing_class, peft_config, callbacks, optimizers).

    Raises:
        RecipeError: an option is not supported with episodes (see `train.config`).
    """

    # TRL annotates these with types that hold at other times of their life, or not at all
    args: Any
    model: Any
    ref_model: Any
    processing_class: Any

    def __init__(self, parts: Parts, model: Any, args: GRPOConfig, **kwargs: Any) -> None:
        self.parts = parts
        asked = Asked.of(args)  # before TRL: what it makes of `args` puts its own marks into the environment
        check_options(args, asked)
        # The trainer sees only which task an episode works on; agents read the task itself.
        train = Dataset.from_dict({"prompt": [""] * len(parts.train_tasks), "task": range(len(parts.train_tasks))})
        test = Dataset.from_dict({"prompt": [""] * len(parts.eval_tasks), "task": range(len(parts.eval_tasks))})
        super().__init__(
            model=model, reward_funcs=[_never_called], args=args, train_dataset=train, eval_dataset=test, **kwargs
        )
        adapters_in_float32(self.model)
        check_running(asked, self.accelerator)
        self.ranks = Ranks()
        plain = self.accelerator.unwrap_model(self.model)
        base = plain.get_base_model() if hasattr(plain, "get_base_model") else plain
        share = getattr(args, "share_prefix", True)
        self._scorer = CompletionScorer(base, share_prefix=share)
        self._ref_scorer = CompletionScorer(self.ref_model, share_prefix=share) if self.ref_model is not None else None
        trained = TransformersPolicy(
            plain,
            self.processing_class,
            sampling=Sampling(
                args.temperature, args.top_p, args.top_k or 0, args.min_p or 0.0, args.repetition_penalty
            ),
            eos_ids=eos_ids(base, self.processing_class),
            token_budget=parts.rollout.generate_token_budget,
            share_prefix=share,
            autocast=self.accelerator.autocast,
            template_options=cast(dict[str, Any], args.chat_template_kwargs or {}),
        )
        # where the model will be by then: FSDP and DeepSpeed move it only when training begins
        trained.generator = torch.Generator(device=args.device).manual_seed(0)
        self.policy = parts.route(trained)
        self.learners = Learners(parts.agent)
        self._buffer: list[list[MicroBatch]] = []
        """Micro-batches of each training step of the current generation batch."""
        self._computed_logps: torch.Tensor | None = None
        """Log-probs (B, T) of the newest forward pass with gradients."""
        self._passes = 1
        """Micro-batches of the training step that is going on."""
        self._continued: tuple[list[int], bool] = [], False
        """The stem of the micro-batch that is computed, and whether a rank has some of it to compute first."""
        self._seconds = {"generate": 0.0, "reward": 0.0, "forward": 0.0, "backward": 0.0, "optimizer": 0.0}
        self._window_start: float | None = None
        self._positions = Positions()
        self.totals = {"episodes": 0, "generated_tokens": 0, "trained_tokens": 0, "real": 0, "computed": 0}
        self.total_seconds = dict.fromkeys((*self._seconds, "other"), 0.0)
        self.ledger = Ledger(
            [task.id for task in parts.train_tasks],
            self.args.generation_batch_size // self.args.num_generations,
            parts.run.log_ledger if parts.run is not None and self.ranks.main else None,
        )
        self.health = Health(self)
        self._entering: dict[int, list[int]] = {}
        """Training steps of the current generation batch that rows enter, by `id` of their episode."""
        self.last_evaluation: tuple[int, dict[str, float]] | None = None
        """Step and metrics of the newest evaluation."""
        self.add_callback(StepClock(self))
        self.add_callback(CheckWrapped(self, asked))

    # ---- one training step -------------------------------------------------------------------

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward over this step's micro-batches; the loss is their sum."""
        if self._window_start is None:
            self._window_start = time.perf_counter()
        began = time.perf_counter()
        steps = self.args.steps_per_generation
        if self._step % (steps * self.num_iterations) == 0 or not self._buffer:
            self._buffer = self._roll_out(model, inputs)
        micro_batches = self._buffer[self._step % steps]
        self._passes = max(len(micro_batches), 1)
        total = torch.zeros((), device=self.args.device)
        sync = self.accelerator.sync_gradients
        for number, micro in enumerate(micro_batches):
            last = number == len(micro_batches) - 1
            before = self._seconds["forward"]
            start = time.perf_counter()
            if "stem_ids" in micro:  # absent in older checkpoints
                self._continued = micro["stem_ids"].tolist(), bool(micro["stem_pass"])
            with self._accumulate(model, sync=sync and last):
                total += Trainer.training_step(self, model, micro, num_items_in_batch)
            elapsed = time.perf_counter() - start
            self._seconds["backward"] += elapsed - (self._seconds["forward"] - before)
        self.ledger.enter(self._step % steps)
        self.health.losses.append(total.detach())
        self._step += 1
        self._current_train_step_time += time.perf_counter() - began
        if self._step % self.current_gradient_accumulation_steps == 0:
            self._metrics["train"]["step_time"].append(self._current_train_step_time)
            self._current_train_step_time = 0.0
        return total

    @contextmanager
    def _accumulate(self, model: Any, *, sync: bool) -> Iterator[None]:
        """Gradients are exchanged between ranks once, on the last micro-batch of an optimizer step."""
        state = self.accelerator.gradient_state
        before = state.sync_gradients
        state._set_sync_gradients(sync)
        try:
            with nullcontext() if sync else self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(before)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self.health.check_gradients(norm)
        return norm

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """Micro-batches are complete when they reach here."""
        return generation_batch

    def _compute_loss(self, model: Any, inputs: MicroBatch) -> torch.Tensor:
        start = time.perf_counter()
        if self.beta != 0.0 and "ref_per_token_logps" not in inputs:
            inputs["ref_per_token_logps"] = self._reference_logps(inputs)
        asked, coefficient = self.loss_type, self.router_aux_loss_coef
        self.loss_type = "dapo" if asked in _AS_DAPO else asked
        self.router_aux_loss_coef = coefficient / self._passes  # TRL adds it in every pass; a step wants it once
        stem, join_in = self._continued
        try:
            with self._scorer.continuing(model, stem, self.args.device, join_in=join_in):
                loss = super()._compute_loss(model, inputs)
            if self.policy.elsewhere and self._computed_logps is not None:
                self._log_difference(inputs, self._computed_logps)
            return loss
        finally:
            self.loss_type, self.router_aux_loss_coef = asked, coefficient
            self._seconds["forward"] += time.perf_counter() - start

    def _log_difference(self, inputs: MicroBatch, logps: torch.Tensor) -> None:
        """How far the engine that sampled and the trainer are apart on the tokens that are trained, in nats."""
        apart = (logps - inputs["sampling_per_token_logps"]).abs()[inputs["completion_mask"].bool()]  # (tokens,)
        if apart.numel():
            self._metrics["train"]["sampling/sampling_logp_difference/mean"].append(float(apart.mean()))
            self._metrics["train"]["sampling/sampling_logp_difference/max"].append(float(apart.max()))

    @torch.no_grad()
    def _reference_logps(self, inputs: MicroBatch) -> torch.Tensor:
        """Log-probs (B, T) under the reference model, or under the model without its adapter."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        width = inputs["completion_ids"].size(1)
        if self._ref_scorer is not None:
            with self.accelerator.autocast():
                return self._ref_scorer.score(self.ref_model, ids, mask, width)[0]
        plain = self.accelerator.unwrap_model(self.model)
        with use_adapter(plain, adapter_name="ref" if "ref" in plain.peft_config else None):
            return self._get_per_token_logps_and_entropies(self.model, ids, mask, width)[0]

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        options = {"output_router_logits": True} if compute_aux_loss else {}
        with self.accelerator.autocast():
            logps, entropies, aux_loss = self._scorer.score(
                model, input_ids, attention_mask, logits_to_keep, **options
            )
        self._computed_logps = logps.detach()
        return logps, entropies if compute_entropy else None, aux_loss

    # ---- from tasks to micro-batches ---------------------------------------------------------

    def _roll_out(self, model: Any, inputs: Sequence[dict[str, Any]]) -> list[list[MicroBatch]]:
        """Run, score and credit this rank's share of a generation batch, and cut it into micro-batches.

        Raises:
            MemFactoryError: this rank or another one failed; the same on every rank.
        """
        with self.ranks.together():
            return self._own_share(model, inputs)

    def _own_share(self, model: Any, inputs: Sequence[dict[str, Any]]) -> list[list[MicroBatch]]:
        tasks = [self.parts.train_tasks[row["task"]] for row in inputs]
        rank = self.ranks.own
        self.ledger.issue(self.state.global_step + 1, self.ranks.gather([row["task"] for row in inputs]))
        start = time.perf_counter()
        with self._sampling_model() as sampling_model:
            self.policy.use(sampling_model, self.state.global_step)
            seed = seed_of(self.args.seed, self.state.global_step, self._step, rank)
            self.policy.seed(seed)
            self.learners.seed(seed)
            if not self.policy.elsewhere:
                self.policy.metrics()  # what an evaluation has counted before
            measuring = self.parts.rewards.begin()
            episodes = run_episodes(self.parts.agent, tasks, self.policy, measuring.submit)
            episodes += self._reroll(episodes, seed, measuring)
            self.policy.confirm()
        model.train()
        self._seconds["generate"] += time.perf_counter() - start
        for number, episode in enumerate(episodes):
            episode.id = f"{self.state.global_step}/{rank}/{number}"
        start = time.perf_counter()
        assessment = self._assess(episodes, measuring)
        self._seconds["reward"] += time.perf_counter() - start

        for name, value in self._learn(episodes).items():
            self._metrics["train"][name].append(value)
        measured = self.policy.metrics()
        for name, value in (over_ranks(measured, self.ranks) if self.policy.elsewhere else measured).items():
            self._metrics["train"][f"{'server' if self.policy.elsewhere else 'tokens'}/{name}"].append(value)
        buffer = self._micro_batches(episodes)
        self._enter_into_ledger(
            episodes, assessment, {task.id: row["task"] for task, row in zip(tasks, inputs, strict=True)}
        )
        self._log_rollout(episodes, assessment)
        return buffer

    def _enter_into_ledger(self, episodes: Sequence[Episode], assessment: Assessment, places: dict[str, int]) -> None:
        """What became of the prompts of this batch; `places` has this rank's, by id of the task."""
        origin = [(episode.task.metadata.get("reroll") or [episode.task.id])[0] for episode in episodes]
        own = [
            Played.of(episode, places[task], self._entering.get(id(episode), ()))
            for episode, task in zip(episodes, origin, strict=True)
        ]
        played = self.ranks.gather(own)
        groups = dict.fromkeys(episode.group for episode in played)  # in the order in which they were compared
        why, steps, faults = play(
            played,
            dict(zip(groups, assessment.advantages.states, strict=True)),
            self.ledger.names,
            enough=min(2, self.args.num_generations),
            masked=self.mask_truncated_completions,
            learned=bool(self.learners),
        )
        more = {"faults": faults} if faults else {}
        counts = {"episodes": len(played), "unscored": assessment.failed}
        self.ledger.finish(self.state.global_step + 1, why, steps, **counts, **more)

    def _learn(self, episodes: Sequence[Episode]) -> dict[str, float]:
        """Let what learns beside the policy learn from the episodes of all ranks, everywhere the same."""
        if not self.learners:
            return {}
        return self.learners.learn(episodes, self.ranks.gather if self.ranks.sharing else None)

    def _reroll(self, episodes: Sequence[Episode], seed: int, measuring: Measuring) -> list[Episode]:
        """Local re-rolls of some of `episodes`; equally many on every rank."""
        section = self.parts.rollout.rerolls
        wanted = round(section.share * len(episodes))
        if not wanted:
            return []
        able = [episode for episode in episodes if places(episode)]
        count = min(wanted, -self.ranks.max(-len(able)))
        chosen = random.Random(seed).sample(able, count)
        self._metrics["train"]["rerolls/count"].append(self.ranks.sum(count * section.count))
        return reroll(self.parts.agent, chosen, self.policy, section.count, seed, measuring.submit)

    def _assess(self, episodes: list[Episode], measuring: Measuring) -> Assessment:
        """Scores, rewards, advantages and credit of this rank's episodes, compared over whole groups."""
        gather = self.ranks.gather if self.ranks.sharing else None
        assessment = self.parts.rewards.assess(
            episodes,
            measuring.finish(episodes, gather),
            scale_rewards=self.scale_rewards,
            seed=seed_of(self.args.seed, "shuffle", self._step),
            gather=gather,
            rank=self.ranks.own,
            max_failed_share=self.parts.rollout.max_failed_share,
        )
        if self.mask_truncated_completions:
            for turn in (turn for episode in episodes for turn in episode.turns):
                turn.trainable &= turn.stop is not StopReason.LENGTH
        return assessment

    @contextmanager
    def _sampling_model(self) -> Iterator[Any]:
        """The model in evaluation mode, gathered and without gradient checkpointing."""
        plain = self.accelerator.unwrap_model(self.model)
        prepared = self.model_wrapped is not self.model or isinstance(plain, FSDPModule)
        with (
            nullcontext() if prepared else placed(plain, self.args.device),
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as plain,
            torch.no_grad(),
            unsharded(plain),
        ):
            was_training = plain.training
            plain.eval()
            try:
                yield plain
            finally:
                plain.train(was_training)

    def _micro_batches(self, episodes: list[Episode]) -> list[list[MicroBatch]]:
        """Rows of the episodes that carry signal, in micro-batches, for each training step."""
        measured = [episode for episode in episodes if episode.reward is not None]
        tokens = [0] * len(measured)
        all_rows = build_rows(measured)
        for row in all_rows:
            tokens[row.episode] += row.trained_tokens
        # Groups without spread have advantage 0 and so no gradient: they count in every mean and cost no pass.
        rows = [row for row in all_rows if any(row.advantages)]
        total = float(self.ranks.sum(sum(tokens)))
        counted = self.ranks.sum(sum(number > 0 for number in tokens))
        values = loss_weights(
            rows, tokens, self.loss_type, self.args.max_completion_length, total=total, episodes=counted
        )
        # TRL keeps sums of a row's weights from falling below 1, so weights and their divisor are scaled up together
        scale = max([1.0, *(1 / value for value in values)])
        weights = {id(row): value * scale for row, value in zip(rows, values, strict=True)}

        steps, accumulation = self.args.steps_per_generation, self.args.gradient_accumulation_steps
        windows = steps // accumulation if steps % accumulation == 0 else 1
        sharing = self._scorer.sharing
        shared = sharing.settle(self.model_wrapped, self.args.device) and not self.aux_loss_enabled
        plan: list[list[Pass]] = []
        for window in _windows(rows, len(measured), windows, seed_of(self.args.seed, "windows", self._step)):
            budget, parts = self.parts.rollout.train_token_budget, steps // windows
            plan += plan_passes(window, budget, parts, shared=shared, stems=shared and sharing.stems)

        self._entering = {}
        for place, step in enumerate(plan):
            for row in (row for part in step for row in part.rows):
                self._entering.setdefault(id(measured[row.episode]), []).append(place)

        # While the weights have not moved since sampling, TRL takes the ratio against the pass itself; otherwise
        # it is taken against what was sampled. TRL's rule for which of the two it is:
        reused = accumulation % (steps * self.num_iterations) != 0
        # Another engine computes log-probs a little differently: the ratio against what it sampled by corrects that.
        reused |= self.policy.elsewhere
        buffer = assemble(plan, weights, self._scorer, self._tokenizer.pad_token_id, self.ranks, self._positions)
        for micro in chain.from_iterable(buffer):
            micro |= {key: value.to(self.args.device) for key, value in micro.items()}
            if reused:
                micro["old_per_token_logps"] = micro["sampling_per_token_logps"]
            # where no turn of the policy is trained at all (only learners are), the sum is empty, not 0 / 0
            micro["num_items_in_batch"] = torch.tensor(max(total, 1.0) * scale, device=self.args.device)
        self.totals["trained_tokens"] += int(self.ranks.sum(sum(row.trained_tokens for row in rows)))
        self._metrics["train"]["rows/count"].append(self.ranks.sum(len(all_rows)))
        self._metrics["train"]["rows/trained"].append(self.ranks.sum(len(rows)))
        self._metrics["train"]["tokens/trained"].append(self.ranks.sum(sum(row.trained_tokens for row in rows)))
        return buffer

    # ---- logging -----------------------------------------------------------------------------

    def _log_rollout(self, episodes: list[Episode], assessment: Assessment) -> None:
        measured = rollout_metrics(episodes, assessment, self.ranks, self.args.num_generations)
        for name, value in measured.items():
            self._metrics["train"][name].append(value)
        self.totals["episodes"] += len(assessment.rewards)
        self.totals["generated_tokens"] += int(measured["tokens/generated"])
        step = self.state.global_step + 1  # the update these episodes are for
        if self.parts.run is not None and step % max(int(self.args.logging_steps), 1) == 0:
            log_rollout(self.parts.run, self.ranks, step, episodes, assessment, self.parts.rollout.log_episodes)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training and "loss" in logs and self._positions.computed:
            real, computed = self._positions.real, self._positions.computed
            logs["tokens/real_over_computed"] = real / computed
            self.totals["real"] += real
            self.totals["computed"] += computed
            self._positions = Positions()
        super().log(logs, start_time)

    # ---- evaluation --------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Run the agent on the held-out tasks with the weights of now, sampled and (if asked) greedy.

        Returns:
            e.g. ``eval_sampled_em``, ``eval_greedy_em``, ``eval_sampled_retain``; also logged.
        """
        began = time.perf_counter()
        was_training = self.model.training
        with self.ranks.together(), self._sampling_model() as plain:
            self.policy.use(plain, self.state.global_step)
            options = self.parts.eval or EvalOptions(self.parts.rewards)
            share = self.ranks.sharing
            result = evaluate_agent(self.parts.agent, self.parts.eval_tasks, self.policy, options, share=share)
            self.policy.confirm()
        self.model.train(was_training)
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in result.metrics.items()}
        if self.parts.run is not None and self.ranks.main:
            result.log(self.parts.run, self.state.global_step)
        self.last_evaluation = (self.state.global_step, result.metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self._window_start is not None:
            self._window_start += time.perf_counter() - began  # evaluation is no part of a training step
        return metrics

    # ---- checkpoints -------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the whole weights, or the whole adapter, to `output_dir`, whatever they are sharded over.

        transformers does so for FSDP only with `state_dict_type: FULL_STATE_DICT` and for ZeRO-3 only with
        `stage3_gather_16bit_weights_on_model_save`, and writes no model, with at most a warning, without them.
        """
        weights = whole_state_dict(self.model_wrapped, self.accelerator)
        if weights is None:
            return super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            self._save(output_dir, state_dict=weights)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # the last file of each rank; `trainer_state.json` comes next and says that the checkpoint is complete
        self.accelerator.wait_for_everyone()

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        self._sampler: Any = super()._get_train_sampler(dataset)
        return self._sampler

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        state: dict[str, Any] = {"step": self._step, "buffer": [], "rewards": self.parts.rewards.state_dict()}
        state["learners"] = self.learners.state_dict()
        state["ledger"] = self.ledger.state_dict()
        state["totals"], state["seconds"] = self.totals, self.total_seconds
        state["evaluation"] = self.last_evaluation  # where it was of these weights, it is not done again
        if self._step % (self.args.steps_per_generation * self.num_iterations) != 0:
            state["buffer"] = self._buffer  # updates are still to be made on these episodes
        with sealed(self, trial, self.ranks) as folder:
            torch.save(state, folder / f"{self.ranks.own}_{_BUFFER_FILE}")
            if self.ranks.main:
                self.learners.save(folder)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with reading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        path = state_file(checkpoint, f"{self.ranks.own}_{_BUFFER_FILE}")
        with reading(checkpoint):
            with torch.serialization.safe_globals(NUMPY):
                super()._load_optimizer_and_scheduler(checkpoint)
            state = load_state(path, self.args.device)
        self._step, self._buffer = state["step"], state["buffer"]
        self.parts.rewards.load_state_dict(state["rewards"])
        self.learners.load_state_dict(state["learners"])
        if "ledger" in state:  # absent in older checkpoints
            self.ledger.load_state_dict(state["ledger"])
            self.totals, self.total_seconds = state["totals"], state["seconds"]
            self.last_evaluation = state["evaluation"]
        # Each pass has an order of its own, drawn from one generator, and the trainer begins with the first again.
        per_pass = self.ledger.per_pass * self.args.steps_per_generation * self.num_iterations
        for _ in range(self._step // per_pass if self.args.shuffle_dataset else 0):
            torch.randperm(self._sampler.num_samples, generator=self._sampler.generator)


def _windows(rows: list[Row], episodes: int, count: int, seed: int) -> list[list[Row]]:
    """`rows` by optimizer step: episodes dealt at random, all rows of an episode in the same step."""
    if count == 1:
        return [rows]
    order = torch.randperm(episodes, generator=torch.Generator().manual_seed(seed)).tolist()
    window_of = {episode: position * count // episodes for position, episode in enumerate(order)}
    return [[row for row in rows if window_of[row.episode] == window] for window in range(count)]


def seed_of(*parts: object) -> int:
    """A 63-bit seed that depends on all `parts`; a resumed run draws the same numbers."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "big") >> 1

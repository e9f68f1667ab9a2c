"""Contestant `plain_trl`: `trl.GRPOTrainer` as it comes, on single-turn rows of the same lengths.

Every turn of every task is one prompt of its own (tasks x turns prompts, G completions each), so rows,
prompt lengths and completion lengths are those of the episodes, without the turns depending on each
other. TRL may generate all of them at once, which a real agent cannot.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from measure import LEARNING_RATE, Result, begin, load, warm_up
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import GRPOConfig, GRPOTrainer
from workload import Spec, Workload


class _Measured(GRPOTrainer):
    """TRL's trainer with a stop-watch around its own methods."""

    result: Result

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        output = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        self.result.seconds["generate"] += time.perf_counter() - start
        self.result.prompt_tokens += sum(map(len, prompt_ids))
        self.result.generated_tokens += sum(map(len, output[0]))
        return output

    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        start = time.perf_counter()
        loss = super()._compute_loss(model, inputs)
        self.result.seconds["forward"] += time.perf_counter() - start
        ids = (inputs["prompt_ids"], inputs["completion_ids"])
        self.result.computed_tokens += sum(part.numel() for part in ids)
        self.result.real_tokens += int(inputs["prompt_mask"].sum() + inputs["completion_mask"].sum())
        self.result.trained_tokens += int(inputs["completion_mask"].sum())
        self.result.rows += len(inputs["prompt_ids"])
        return loss


class _StepWatch(TrainerCallback):
    def __init__(self, result: Result) -> None:
        self.result = result
        self.step = self.optimizer = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.optimizer = time.perf_counter()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.result.seconds["optimizer"] += time.perf_counter() - self.optimizer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.result.total_seconds = time.perf_counter() - self.step


def run(spec: Spec) -> Result:
    """One step."""
    result = Result("plain_trl", spec.dump())
    model, tokenizer = load(spec)
    workload = Workload(spec, tokenizer)
    prompts = [workload.messages(task, 0, turn) for task in range(spec.tasks) for turn in range(spec.turns)]
    batch = next(size for size in (8, 4, 2, 1) if spec.rows % size == 0)
    seen = 0

    def fixed(completions: list[Any], **columns: Any) -> list[float]:
        nonlocal seen
        numbers = range(seen, seen + len(completions))
        seen += len(completions)
        return [workload.reward(number % spec.group) for number in numbers]

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=spec.rows // batch,
            num_generations=spec.group,
            max_completion_length=spec.new_tokens,
            generation_kwargs={"min_new_tokens": spec.new_tokens},
            max_steps=1,
            learning_rate=LEARNING_RATE,
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            disable_tqdm=True,
            seed=spec.seed,
        )
        watch = _StepWatch(result)
        trainer = _Measured(
            model=model,
            reward_funcs=[fixed],
            args=config,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer,
            callbacks=[watch],
        )
        trainer.result = result
        for silent in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(silent)
        inner = trainer.accelerator.backward

        def backward(*args: Any, **kwargs: Any) -> None:
            start = time.perf_counter()
            inner(*args, **kwargs)
            result.seconds["backward"] += time.perf_counter() - start

        trainer.accelerator.backward = backward
        warm_up(model)
        clock = begin(result)
        trainer.train()
        step = result.total_seconds
        clock.stop()
    result.outside_seconds = result.total_seconds - step
    result.total_seconds = step
    result.seconds["other"] -= result.outside_seconds
    result.episodes = spec.episodes
    result.gradient_norm = next(log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log)
    return result

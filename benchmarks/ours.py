"""Contestants `ours` and `ours_unshared`: one optimizer step of the real `EpisodeGRPOTrainer`."""

from __future__ import annotations

import tempfile
from pathlib import Path

from measure import LEARNING_RATE, PHASES, Result, begin, load, warm_up
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from workload import ScriptedAgent, Spec, Workload

from memfactory.episode import Episode
from memfactory.recipe import RolloutSection
from memfactory.reward.catalogue import WeightedDimension
from memfactory.reward.dimension import RewardDimension
from memfactory.reward.system import RewardSystem
from memfactory.train.config import build_config
from memfactory.train.trainer import EpisodeGRPOTrainer, Parts


def run(spec: Spec, *, bf16: bool = False, share_prefix: bool = True, ranks: int = 1) -> Result:
    """One step.

    Args:
        spec: the workload.
        share_prefix: compute what prompts and rows begin with once.
        bf16: compute in bfloat16 autocast on float32 weights.
        ranks: processes that share the workload; each calls this.
    """
    result = Result("ours" + "_bf16" * bf16 + "_unshared" * (not share_prefix), spec.dump())
    model, tokenizer = load(spec)
    workload = Workload(spec, tokenizer)

    def fixed(episodes: list[Episode]) -> list[float]:
        return [workload.reward(number % spec.group) for number in range(len(episodes))]

    with tempfile.TemporaryDirectory() as folder:
        config = build_config(
            {
                "use_cpu": True,
                "bf16": bf16,
                "share_prefix": share_prefix,
                "per_device_train_batch_size": spec.episodes // ranks,
                "num_generations": spec.group,
                "gradient_accumulation_steps": 1,
                "steps_per_generation": 1,
                "max_steps": 1,
                "learning_rate": LEARNING_RATE,
                "save_strategy": "no",
                "disable_tqdm": True,
            },
            checkpoints=Path(folder),
            seed=spec.seed,
            max_completion_length=spec.new_tokens,
        )
        trainer = EpisodeGRPOTrainer(
            Parts(
                agent=ScriptedAgent(workload),
                train_tasks=workload.tasks,
                eval_tasks=workload.tasks[:1],
                rewards=RewardSystem([WeightedDimension("fixed", RewardDimension("fixed", fixed, batched=True))]),
                rollout=RolloutSection(train_token_budget=spec.budget),
            ),
            model,
            config,
            processing_class=tokenizer,
        )
        for silent in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(silent)
        trainer.policy.trained.eos_ids = [-1]  # no such token: every turn has all its tokens
        warm_up(model)
        clock = begin(result)
        trainer.train()
        clock.stop()

    measured = trainer.total_seconds
    for phase in PHASES:
        result.seconds[phase] = measured.get(phase, 0.0)
    # the step as the trainer itself saw it; data loader and optimizer are made before it, once per run
    result.seconds["other"] = measured["other"] + measured["reward"]
    result.outside_seconds = result.total_seconds - sum(measured.values())
    result.total_seconds = sum(measured.values())
    totals = trainer.totals
    result.episodes = totals["episodes"]
    result.rows = spec.rows
    result.generated_tokens = totals["generated_tokens"]
    result.trained_tokens = totals["trained_tokens"]
    result.real_tokens, result.computed_tokens = totals["real"], totals["computed"]
    result.prompt_tokens = result.real_tokens - result.trained_tokens
    result.real_over_computed_prefill = next(
        log[name] for log in trainer.state.log_history if (name := "tokens/real_over_computed_prefill") in log
    )
    result.gradient_norm = next(log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log)
    return result

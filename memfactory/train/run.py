"""The main job: `train` runs a recipe from an empty folder to a report."""

from __future__ import annotations

import platform
import resource
import shutil
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from accelerate import PartialState
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from memfactory.errors import EngineError
from memfactory.evaluate.report import write_report
from memfactory.evaluate.run import evaluate_agent
from memfactory.policy.models import eos_ids, load_checkpoint, load_model, load_tokenizer, lora_config
from memfactory.policy.transformers_backend import TransformersPolicy
from memfactory.runs import RunFolder
from memfactory.train.callbacks import RunLog, StopOnInterrupt, describe, progress_bar
from memfactory.train.config import build_config
from memfactory.train.prepare import Prepared, check_documents
from memfactory.train.trainer import EpisodeGRPOTrainer, Parts
from memfactory.train.warmup import warm_up


@dataclass
class Clock:
    """Wall and CPU seconds of this process since it was made."""

    wall: float
    cpu: float

    @classmethod
    def start(cls) -> Clock:
        return cls(time.perf_counter(), time.process_time())

    def read(self) -> dict[str, float]:
        return {
            "wall_seconds": time.perf_counter() - self.wall,
            "cpu_seconds": time.process_time() - self.cpu,
        }


def train(prepared: Prepared, *, resume: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Run a prepared recipe: warm-up, evaluation, GRPO, evaluation, report.

    Args:
        prepared: from :func:`memfactory.train.prepare.prepare`.
        resume: go on from the newest checkpoint of the run folder.
        console: where to print; default standard output.

    Returns:
        The summary, as written to `summary.json`.

    Raises:
        MemFactoryError: see its classes; the run folder keeps everything written so far.
    """
    clock = Clock.start()
    console = console or Console()
    recipe = prepared.recipe
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = build_config(
        recipe.train,
        checkpoints=RunFolder(recipe.run_dir).checkpoints,
        seed=recipe.seed,
        max_completion_length=prepared.max_turn_tokens,
    )
    ranks = PartialState()
    if not ranks.is_main_process:
        console = Console(quiet=True)
    earlier = RunFolder(recipe.run_dir)
    if not resume and ranks.is_main_process:
        earlier.refuse_if_taken()  # before a model is loaded
    if (
        resume
        and (done := earlier.read_summary()).get("stopped") == "finished"
        and done["recipe_hash"] == recipe.hash()
    ):
        console.print(f"already finished; report: {earlier.path / 'report.html'}", soft_wrap=True)
        return done
    transformers.set_seed(recipe.seed)
    tokenizer = load_tokenizer(recipe.model, prepared.vocabulary)
    with ranks.main_process_first():  # one process makes the folder, the others find it
        run = (
            RunFolder.open(recipe.run_dir, recipe, resume=resume)
            if ranks.is_main_process
            else RunFolder(recipe.run_dir)
        )
    checkpoint = run.latest_checkpoint() if resume else None
    if checkpoint is not None:
        console.print(f"resuming from {checkpoint}", soft_wrap=True)
    initial = run.path / "initial"
    with ranks.main_process_first():  # one process warms up, the others load what it saved
        model = _initial_model(
            prepared,
            run,
            tokenizer,
            initial,
            saved=checkpoint is not None or not ranks.is_main_process,
            console=console,
        )
    if config.beta != 0 and recipe.model.lora is None:
        # TRL loads the reference model by name; the name of our starting point is this folder
        if ranks.is_main_process and not initial.is_dir():
            _save(model, tokenizer, initial)
        ranks.wait_for_everyone()
        model.config._name_or_path = str(initial)
    stop = StopOnInterrupt(console)
    log = RunLog(run, console, config.max_steps)
    trainer = EpisodeGRPOTrainer(
        Parts(
            agent=prepared.agent,
            train_tasks=prepared.train_tasks,
            eval_tasks=prepared.eval_tasks,
            dimensions=prepared.dimensions,
            credit=recipe.credit,
            rollout=recipe.rollout,
            eval=prepared.eval_options,
            run=run,
        ),
        model,
        config,
        processing_class=tokenizer,
        peft_config=lora_config(recipe.model.lora) if recipe.model.lora else None,
        callbacks=[log, stop],
    )
    for noisy in (PrinterCallback, ProgressCallback):  # their lines are replaced by ours
        trainer.remove_callback(noisy)
    check_documents(prepared.agent, [*prepared.train_tasks, *prepared.eval_tasks], trainer.policy)

    summary: dict[str, Any] = _facts(prepared, trainer)
    summary["before"] = run.read_summary().get("before") if checkpoint is not None else None
    if summary["before"] is None:
        before = _evaluate(prepared, trainer, run, console)
        summary["before"] = before
        console.print(f"before: {describe(before)}")
        if ranks.is_main_process:
            run.write_summary(summary | {"stopped": "unfinished"})

    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)

    step = trainer.state.global_step
    summary |= {"steps": step, "stopped": "interrupted" if stop.interrupted else "finished"}
    if stop.interrupted:
        summary["after"] = None
        console.print(f"stopped at step {step}; go on with --resume")
    else:
        # the last step may have ended with an evaluation of these very weights
        newest = trainer.last_evaluation
        fresh = newest is not None and newest[0] == step
        summary["after"] = newest[1] if newest and fresh else _evaluate(prepared, trainer, run, console)
        trainer.save_model(str(run.path / "model"))
        if ranks.is_main_process:
            tokenizer.save_pretrained(run.path / "model")
    summary |= clock.read() | {
        "peak_memory_bytes": _peak_memory(),
        "seconds": trainer.total_seconds,
        "totals": trainer.totals,
    }
    if ranks.is_main_process:
        run.write_summary(summary)
        report = write_report(run.path)
        if summary["after"] is not None:
            console.print(f"before: {describe(summary['before'])}")
            console.print(f"after:  {describe(summary['after'])}")
        console.print(f"report: {report}", soft_wrap=True)
    return summary


def _initial_model(
    prepared: Prepared,
    run: RunFolder,
    tokenizer: PreTrainedTokenizerBase,
    initial: Path,
    *,
    saved: bool,
    console: Console,
) -> PreTrainedModel:
    """The policy before GRPO: as loaded, or warmed up; from the run folder where it is `saved` there."""
    recipe = prepared.recipe
    if saved and initial.is_dir():
        return load_checkpoint(initial, recipe.model)
    model = load_model(recipe.model, tokenizer, recipe.seed)
    device: Any = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if recipe.warmup is not None:
        if device is not None:
            cast(torch.nn.Module, model).to(device)
        with progress_bar(console) as progress:
            bar = progress.add_task("warm up", total=recipe.warmup.steps)

            def on_step(step: int, loss: float) -> None:
                progress.update(bar, completed=step)
                if step % 25 == 0 or step == 1:
                    run.log_metrics(step, {"loss": loss}, phase="warmup")

            warm_up(
                model,
                tokenizer,
                prepared.agent,
                prepared.environment,
                prepared.train_tasks,
                recipe.warmup,
                recipe.seed,
                on_step,
            )
        _save(model, tokenizer, initial)
    return model


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save whole or not at all: a killed run must not leave half a starting point."""
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    temporary.rename(folder)


def _evaluate(prepared: Prepared, trainer: EpisodeGRPOTrainer, run: RunFolder, console: Console) -> dict[str, float]:
    with progress_bar(console) as progress, trainer._sampling_model() as plain:
        trainer.policy.model = plain
        result = evaluate_agent(prepared.agent, prepared.eval_tasks, trainer.policy, prepared.eval_options, progress)
    if trainer.accelerator.is_main_process:
        result.log(run, trainer.state.global_step)
    return result.metrics


def _facts(prepared: Prepared, trainer: EpisodeGRPOTrainer) -> dict[str, Any]:
    recipe = prepared.recipe
    plain = trainer.accelerator.unwrap_model(trainer.model)
    return {
        "name": recipe.name,
        "seed": recipe.seed,
        "recipe_hash": recipe.hash(),
        "versions": versions(),
        "device": str(trainer.args.device),
        "processes": trainer.accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in plain.parameters()),
        "trainable_parameters": sum(p.numel() for p in plain.parameters() if p.requires_grad),
    }


def versions() -> dict[str, str]:
    """Versions of what decides a run's result."""
    found = {"python": platform.python_version()}
    for package in ("memfactory", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _peak_memory() -> int:
    """Largest resident set of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _adapter_base(prepared: Prepared, checkpoint: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model an adapter was trained on: the run's warmed-up one, or the recipe's own."""
    for folder in (checkpoint.parent, checkpoint.parent.parent):  # RUN/model, RUN/checkpoints/checkpoint-N
        if (folder / "initial" / "config.json").is_file():
            return load_checkpoint(folder / "initial", prepared.recipe.model)
    if prepared.recipe.warmup is not None:
        raise EngineError(
            f"{checkpoint}: its base model is missing",
            "this adapter was trained on a warmed-up model, which lies in `initial` in its run folder",
            "name the checkpoint inside its run folder",
        )
    return load_model(prepared.recipe.model, tokenizer, prepared.recipe.seed)


def load_policy(prepared: Prepared, checkpoint: Path | None) -> TransformersPolicy:
    """A policy for evaluation: the model saved at `checkpoint`, or the recipe's own starting point.

    Raises:
        EngineError: there is no checkpoint at that path.
    """
    recipe = prepared.recipe
    tokenizer = load_tokenizer(recipe.model, prepared.vocabulary)
    model: Any
    if checkpoint is None:
        model = load_model(recipe.model, tokenizer, recipe.seed)
    elif (checkpoint / "adapter_config.json").is_file():
        model = load_checkpoint(checkpoint, recipe.model, _adapter_base(prepared, checkpoint, tokenizer))
    else:
        model = load_checkpoint(checkpoint, recipe.model)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    model.to(device or torch.device("cpu")).eval()
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    return TransformersPolicy(
        model, tokenizer, eos_ids=eos_ids(base, tokenizer), token_budget=recipe.rollout.generate_token_budget
    )

"""The main job: `train` runs a recipe from an empty folder to a report."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import GRPOConfig

from memfactory.checkpoints import saving
from memfactory.evaluate.report import write_report
from memfactory.evaluate.run import evaluate_agent
from memfactory.policy.models import load_checkpoint, load_tokenizer, lora_config
from memfactory.policy.quantization import check_installed, divided
from memfactory.policy.routing import RoutedPolicy
from memfactory.policy.transformers_backend import TransformersPolicy
from memfactory.policy.vllm_needs import SERVED, base_model
from memfactory.recipe import Recipe
from memfactory.runs import RunFolder
from memfactory.train.callbacks import RunLog, describe, progress_bar
from memfactory.train.config import build_config
from memfactory.train.distribution import Asked, check_launcher, check_options, check_started
from memfactory.train.policies import needs_initial, route
from memfactory.train.prepare import Prepared, check_documents
from memfactory.train.ranks import Ranks
from memfactory.train.sharding import loaded_whole
from memfactory.train.signals import Interrupted, StopOnSignal
from memfactory.train.start import save_whole, starting_model
from memfactory.train.summary import Clock, facts, peak_memory
from memfactory.train.trainer import EpisodeGRPOTrainer, Parts

if TYPE_CHECKING:
    from memfactory.train.async_trainer import AsyncEpisodeTrainer  # imports TRL's experimental part


def train(prepared: Prepared, *, start_over: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Run a prepared recipe: warm-up, evaluation, GRPO, evaluation, report.

    Where the run folder holds an unfinished run of this recipe, it goes on from its newest checkpoint; a finished one
    is left as it is.

    Args:
        prepared: from :func:`memfactory.train.prepare.prepare`.
        start_over: begin anew; a run that lies in the folder is set aside.
        console: where to print; default standard output.

    Returns:
        The summary, as written to `summary.json`.

    Raises:
        MemFactoryError: see its classes; the run folder keeps everything written so far.
        KeyboardInterrupt: a second SIGINT.
    """
    clock = Clock.start()
    check_launcher()
    recipe, run = prepared.recipe, RunFolder(prepared.recipe.run_dir)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = build_config(
        recipe.train,
        checkpoints=run.checkpoints,
        seed=recipe.seed,
        max_completion_length=prepared.max_turn_tokens,
    )
    ranks = Ranks()  # not before there is a configuration: `use_cpu` in it decides how processes find each other
    console = (console or Console()) if ranks.main else Console(quiet=True)
    with StopOnSignal(console) as stop, ExitStack() as held:
        try:
            return _train(prepared, run, config, clock, stop, held, console, start_over=start_over)
        except RuntimeError as error:
            if (lost := ranks.lost(error)) is not None:
                raise lost from error
            raise
        except Interrupted:
            summary: dict[str, Any] = {"name": recipe.name}
            if stop.opened:
                summary |= run.read_summary()
            summary |= {"stopped": "interrupted", "signal": stop.name}
            if stop.opened and ranks.main:
                run.write_summary(summary)
            console.print(f"stopped by {stop.name}; the same command goes on", highlight=False)
            return summary


def _train(
    prepared: Prepared,
    run: RunFolder,
    config: GRPOConfig,
    clock: Clock,
    stop: StopOnSignal,
    held: ExitStack,
    console: Console,
    *,
    start_over: bool,
) -> dict[str, Any]:
    recipe = prepared.recipe
    asked = Asked.of(config)
    check_options(config, asked)
    check_started(asked)
    check_installed(recipe.model)
    if recipe.model.quantization is not None and (asked.fsdp or asked.deepspeed):
        raise divided(asked.words)
    ranks = Ranks()
    if recipe.rollout.engine == "async":
        from memfactory.train.async_config import check_attention, several_processes

        if ranks.count > 1:
            raise several_processes(ranks.count)
        check_attention()
    with ranks.together():
        aside = ranks.first(run.set_aside() if start_over and ranks.main else None)
    if aside is not None:
        console.print(f"the run that was in {run.path} is now {aside}", soft_wrap=True)
    done = ranks.first(run.read_summary())
    if done.get("stopped") == "finished" and not ranks.first(run.differences(recipe)):
        if ranks.main and not (run.path / "report.html").exists():
            write_report(run.path)  # killed between the two
        console.print(
            f"already finished; report: {run.path / 'report.html'} (--start-over or output_dir=... for a new run)",
            soft_wrap=True,
        )
        return done

    if recipe.rollout.served:
        from memfactory.train.serving import check_answering  # its libraries are an extra

        with ranks.together():
            if ranks.main:
                check_answering(recipe, run.path)
    transformers.set_seed(recipe.seed)
    tokenizer = load_tokenizer(recipe.model, prepared.vocabulary)  # a wrong name fails before there is a folder
    with ranks.together():  # one process makes the folder, the others find it
        if ranks.main:
            held.enter_context(run.held())
            taken = run.recipe_file.exists()
            RunFolder.open(run.path, recipe, resume=True)
            stop.opened = True
            for told in run.clean_checkpoints():
                console.print(told, style="yellow", markup=False, highlight=False, soft_wrap=True)
            if taken and run.latest_checkpoint() is None:
                console.print(f"{run.path} holds a run without a checkpoint: it begins again", soft_wrap=True)
        checkpoint = ranks.first(run.latest_checkpoint() if ranks.main else None)
    if checkpoint is not None:
        console.print(f"unfinished run of this recipe: resuming from {checkpoint}", soft_wrap=True)
    with ranks.together():  # one process warms up, the others load what it saved
        if ranks.main:
            model = starting_model(prepared, run, tokenizer, saved=checkpoint is not None, console=console)
        ranks.gather([])
        if not ranks.main:
            model = starting_model(prepared, run, tokenizer, saved=True, console=console)
    if recipe.warmup is not None:
        transformers.set_seed(recipe.seed)  # what follows is the same where the warm-up was done before a kill
    trainer = _trainer(prepared, run, model, tokenizer, config, [RunLog(run, console, config.max_steps), stop])
    del model  # the trainer has it, or one of its own
    closing = held.enter_context(ExitStack())  # whatever ends the run
    closing.callback(trainer.policy.close)
    closing.callback(prepared.rewards.close)
    check_documents(prepared.agent, [*prepared.train_tasks, *prepared.eval_tasks], trainer.policy)
    trainer.health.check_weights("the weights before training")

    summary = facts(prepared, trainer)
    before = ranks.first(run.read_summary().get("before") if checkpoint is not None else None)
    if before is None:
        before = _evaluate(prepared, trainer, run, console)
        console.print(f"before: {describe(before)}", highlight=False, soft_wrap=True)
    summary["before"] = before
    if ranks.main:
        run.write_summary(summary | {"stopped": "unfinished"})

    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)

    step = trainer.state.global_step
    after: dict[str, float] | None = None
    if stop.name:
        console.print(f"stopped by {stop.name} at step {step}; the same command (or --resume) goes on")
    else:
        # the last step may have ended with an evaluation of these very weights
        newest = trainer.last_evaluation
        after = newest[1] if newest and newest[0] == step else _evaluate(prepared, trainer, run, console)
        with saving(run.path / "model"):
            trainer.save_model(str(run.path / "model"))
            if ranks.main:
                tokenizer.save_pretrained(run.path / "model")
                trainer.learners.save(run.path / "model")
    summary |= clock.read() | {
        "after": after,
        "steps": step,
        "stopped": "interrupted" if stop.name else "finished",
        "peak_memory_bytes": peak_memory(),
        "seconds": trainer.total_seconds,
        "totals": trainer.totals,
        "ledger": trainer.ledger.totals(),
    }
    if stop.name:
        summary["signal"] = stop.name
    closing.close()
    if ranks.main:
        run.write_summary(summary)
        report = write_report(run.path)
        if after is not None:
            console.print(f"before: {describe(before)}", highlight=False, soft_wrap=True)
            console.print(f"after:  {describe(after)}", highlight=False, soft_wrap=True)
        console.print(f"report: {report}", highlight=False, soft_wrap=True)
    return summary


def _trainer(
    prepared: Prepared,
    run: RunFolder,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: GRPOConfig,
    callbacks: list[Any],
) -> EpisodeGRPOTrainer | AsyncEpisodeTrainer:
    recipe = prepared.recipe
    initial, ranks = run.path / "initial", Ranks()
    serving = recipe.rollout.served
    with ranks.together():
        if serving and ranks.main:  # what the servers wait for
            if base_model(recipe, run.path) == str(initial.resolve()) and not initial.is_dir():
                save_whole(model, tokenizer, initial)
            if recipe.model.lora is None and not (run.path / SERVED).is_dir():
                save_whole(model, tokenizer, run.path / SERVED, untied=True)
    if (config.beta != 0 or needs_initial(recipe)) and recipe.model.lora is None:
        with ranks.together():
            if ranks.main and not initial.is_dir():
                save_whole(model, tokenizer, initial)
        # TRL loads the reference model by name; the name of our starting point is its folder
        model.config._name_or_path = str(initial)
    parts = Parts(
        agent=prepared.agent,
        train_tasks=prepared.train_tasks,
        eval_tasks=prepared.eval_tasks,
        rewards=prepared.rewards,
        rollout=recipe.rollout,
        eval=prepared.eval_options,
        run=run,
        route=lambda trained: _route(recipe, trained, initial, run.path),
    )
    options = {
        "processing_class": tokenizer,
        "peft_config": lora_config(recipe.model.lora) if recipe.model.lora else None,
        "callbacks": callbacks,
    }
    trainer: EpisodeGRPOTrainer | AsyncEpisodeTrainer
    if recipe.rollout.engine == "async":
        from memfactory.train.async_config import build_async_config
        from memfactory.train.async_trainer import AsyncEpisodeTrainer

        asynchronous = build_async_config(config, recipe, len(prepared.train_tasks))
        # TRL loads the model itself, with its own attention, from where the servers load it
        trainer = AsyncEpisodeTrainer(parts, base_model(recipe, run.path), asynchronous, config, **options)
    else:
        trainer = EpisodeGRPOTrainer(parts, model, config, **options)
    for noisy in (PrinterCallback, ProgressCallback):  # their lines are replaced by ours
        trainer.remove_callback(noisy)
    return trainer


def _route(recipe: Recipe, trained: TransformersPolicy, initial: Path, folder: Path) -> RoutedPolicy:
    # a rank that finds a server wanting ends all of them; models beside the trained one are not sharded
    with Ranks().together(), loaded_whole():
        return route(recipe, trained, lambda: load_checkpoint(initial, recipe.model), folder)


def _evaluate(
    prepared: Prepared, trainer: EpisodeGRPOTrainer | AsyncEpisodeTrainer, run: RunFolder, console: Console
) -> dict[str, float]:
    with trainer.ranks.together(), progress_bar(console) as progress, trainer._sampling_model() as plain:
        trainer.policy.use(plain, trainer.state.global_step)
        options, share = prepared.eval_options, trainer.ranks.sharing
        result = evaluate_agent(prepared.agent, prepared.eval_tasks, trainer.policy, options, progress, share)
        trainer.policy.confirm()
    if trainer.ranks.main:
        result.log(run, trainer.state.global_step)
    for example in result.faults.examples:
        console.print(f"could not be measured: {example}", style="yellow", markup=False, highlight=False)
    return result.metrics

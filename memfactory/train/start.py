"""Where a run starts from: the recipe's model, warmed up, or what an earlier run saved."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, cast

import torch
from peft import get_peft_model
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memfactory.checkpoints import saving
from memfactory.errors import EngineError
from memfactory.policy.models import eos_ids, load_checkpoint, load_model, load_tokenizer, lora_config
from memfactory.policy.routing import RoutedPolicy
from memfactory.policy.transformers_backend import TransformersPolicy
from memfactory.runs import RunFolder
from memfactory.train.callbacks import progress_bar
from memfactory.train.learners import Learners
from memfactory.train.policies import route
from memfactory.train.prepare import Prepared
from memfactory.train.sharding import loaded_whole
from memfactory.train.warmup import warm_up


def starting_model(
    prepared: Prepared,
    run: RunFolder,
    tokenizer: PreTrainedTokenizerBase,
    *,
    saved: bool,
    console: Console,
) -> PreTrainedModel:
    """The policy before GRPO: as loaded, or warmed up; from the run folder where it is `saved` there.

    A warm-up that was done is not done again: `initial` is there as a whole or not at all.
    """
    recipe, initial = prepared.recipe, run.path / "initial"
    with loaded_whole():
        if (saved or recipe.warmup is not None) and initial.is_dir():
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
        save_whole(model, tokenizer, initial)
    return model


def save_whole(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, untied: bool = False
) -> None:
    """Save whole or not at all: a killed run must not leave half a starting point.

    Args:
        untied: for servers that are sent all weights later, see :func:`memfactory.train.weight_sync.save_untied`.
    """
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    with saving(temporary, remove=True):
        if untied:
            from memfactory.train.weight_sync import save_untied  # its libraries are an extra

            temporary.mkdir()
            save_untied(model, model.state_dict(), temporary)
        else:
            model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        shutil.rmtree(folder, ignore_errors=True)  # of a run that got no further than to save it
        temporary.rename(folder)


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


def load_policy(prepared: Prepared, checkpoint: Path | None, *, learned: bool = True, label: str = "") -> RoutedPolicy:
    """A policy for evaluation: the model saved at `checkpoint`, or the recipe's own starting point.

    Models of `policies:` stand beside it, and what learns in the agent beside the policy is as it was saved.

    Args:
        learned: whether that is wanted; a model from before training has none saved with it.
        label: where servers sample from others at the same time, tells this one from them.

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
    if recipe.rollout.served and recipe.model.lora is not None and not hasattr(model, "peft_config"):
        # A server is sent adapters: a fresh one changes nothing, and the canary finds a server of other weights.
        model = get_peft_model(model, lora_config(recipe.model.lora))
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    model.to(device or torch.device("cpu")).eval()
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    policy = TransformersPolicy(
        model,
        tokenizer,
        eos_ids=eos_ids(base, tokenizer),
        token_budget=recipe.rollout.generate_token_budget,
        share_prefix=recipe.train.get("share_prefix", True),
    )
    if checkpoint is not None and learned:
        Learners(prepared.agent).load(checkpoint)

    def initial() -> PreTrainedModel:
        for folder in (checkpoint.parent, checkpoint.parent.parent) if checkpoint is not None else ():
            if (folder / "initial" / "config.json").is_file():
                return load_checkpoint(folder / "initial", recipe.model)
        if checkpoint is not None and recipe.warmup is not None:
            raise EngineError(
                f"{checkpoint}: the weights before training are missing",
                "a module of this recipe answers with them, and they lie in `initial` in the run folder",
                "name the checkpoint inside its run folder",
            )
        return load_model(recipe.model, tokenizer, recipe.seed)

    routed = route(recipe, policy, initial, prepared.recipe.run_dir, label)
    try:
        routed.use(model)  # servers have none yet, or those of a run
    except BaseException:
        routed.close()  # it may be loaded already
        raise
    return routed

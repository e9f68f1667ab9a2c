"""`--dry-run`: check a recipe completely, then really do a little of everything with a stand-in model.

The stand-in is a two-layer model of the recipe's shape of work: its agent, prompts, rewards, loss, LoRA
and trainer options are the real ones; only the weights (and, for a model on the Hub, the tokenizer) are
made up, so it runs on a CPU in seconds and without a network.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from memfactory.agents import MemAgent
from memfactory.environments import build_environment
from memfactory.environments.base import Split
from memfactory.episode import Episode
from memfactory.errors import DataError
from memfactory.policy.models import lora_config
from memfactory.policy.tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer
from memfactory.recipe import Recipe, TinyModel
from memfactory.reward.aggregate import WeightedSum
from memfactory.reward.catalogue import WeightedDimension
from memfactory.reward.dimension import RewardDimension
from memfactory.reward.lint import print_findings
from memfactory.reward.system import RewardSystem
from memfactory.train.config import build_config
from memfactory.train.prepare import Prepared, turn_limits
from memfactory.train.trainer import EpisodeGRPOTrainer, Parts

_SHORT = 16
"""Tokens per turn and chunks per document in the trial run: enough to go through every line."""


def dry_run(prepared: Prepared, console: Console, data_problem: DataError | None = None) -> None:
    """Print the resolved recipe and its arithmetic, then run one batch of episodes and one optimizer step.

    Args:
        prepared: from :func:`memfactory.train.prepare.prepare`.
        console: where to print.
        data_problem: why the recipe's own data could not be read, if so; synthetic documents stand in.

    Raises:
        MemFactoryError: whatever a real run would have met later.
    """
    recipe = prepared.recipe
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console.rule("resolved recipe")
    console.print(yaml.safe_dump(recipe.dump(), sort_keys=False, allow_unicode=True), highlight=False, markup=False)
    with tempfile.TemporaryDirectory() as folder:
        config = build_config(
            recipe.train | {"report_to": "none", "use_cpu": True, "bf16": False, "fp16": False, "deepspeed": None},
            checkpoints=Path(folder),
            seed=recipe.seed,
            max_completion_length=prepared.max_turn_tokens,
        )
        console.rule("batch arithmetic")
        console.print(_arithmetic(prepared, config))
        console.rule("trial run on a stand-in model")
        if data_problem is not None:
            console.print(f"[yellow]data not checked:[/yellow] {data_problem}", highlight=False)
            console.print("synthetic documents stand in for it")
        _trial(prepared, Path(folder), console)
    console.print("[green]dry run passed[/green]")


def _arithmetic(prepared: Prepared, config: Any) -> Table:
    """How many tasks, episodes and rows one optimizer step is made of."""
    group = config.num_generations
    episodes = config.generation_batch_size
    table = Table(show_header=False, box=None)
    table.add_row("tasks per generation batch", f"{episodes // group}")
    table.add_row("episodes per task (num_generations)", f"{group}")
    table.add_row("episodes per generation batch", f"{episodes}")
    tasks, limit = prepared.train_tasks[:256], getattr(prepared.agent, "max_chunks", None)
    rows: str | None = None
    if tasks and isinstance(prepared.agent, MemAgent) and prepared.agent.chunk_tokens is None:
        mean = sum(len(task.stream) + len(task.probes) for task in tasks) / len(tasks)
        rows, product = f"{mean:.1f}", f"{episodes * mean:.0f}"
    elif limit is not None:  # how many chunks a document gives is up to the real tokenizer
        rows, product = f"at most {limit + 1}", f"at most {episodes * (limit + 1)}"
    if rows is not None:
        table.add_row("rows per episode", rows)
        table.add_row("", f"[bold]{episodes // group} tasks x {group} episodes x {rows} rows = {product} rows")
    updates = config.steps_per_generation / config.gradient_accumulation_steps * config.num_iterations
    table.add_row("optimizer steps per generation batch", f"{updates:g}")
    table.add_row("optimizer steps in all", f"{config.max_steps if config.max_steps > 0 else 'by epochs'}")
    table.add_row("positions per forward pass, at most", f"{prepared.recipe.rollout.train_token_budget}")
    table.add_row("weighting of the loss", f"{config.loss_type}, advantages scaled by {config.scale_rewards}")
    return table


def _trial(prepared: Prepared, folder: Path, console: Console) -> None:
    recipe = prepared.recipe
    tokenizer = tiny_tokenizer(prepared.vocabulary) if recipe.model.tiny and prepared.vocabulary else byte_tokenizer()
    shape = recipe.model.tiny or TinyModel(hidden_size=32, layers=2, heads=2, mlp_size=64)
    model = tiny_model(shape, tokenizer, recipe.seed)
    model.config.max_position_embeddings = 1 << 20
    model.save_pretrained(folder / "initial")
    model.config._name_or_path = str(folder / "initial")

    tasks = list(prepared.train_tasks[:1]) or list(
        build_environment("ruler", {"task": "niah_single", "length": 600}).tasks(Split.TRAIN, 1)
    )
    agent = _shortened(prepared.agent)
    if not hasattr(agent, "max_chunks"):  # agents that cut no documents read the beginning of one
        tasks = [dataclasses.replace(task, stream=task.stream[:2], probes=task.probes[:2]) for task in tasks]
    group = 2
    config = build_config(
        _without_scale(recipe) | {"num_generations": group, "per_device_train_batch_size": group},
        checkpoints=folder / "checkpoints",
        seed=recipe.seed,
        max_completion_length=_SHORT,
    )
    seen: list[Episode] = []
    spread = RewardDimension("dry_run.spread", lambda episode: float(_note(seen, episode) % 2))
    own = prepared.rewards
    # a plain sum, because a veto on what the stand-in writes would leave no spread at all; see below for the recipe's
    rewards = RewardSystem(
        [*own.dimensions, WeightedDimension("dry_run.spread", spread, 1.0)], WeightedSum(), own.credit, own.judge
    )
    trainer = EpisodeGRPOTrainer(
        Parts(agent, tasks, tasks, rewards, prepared.eval_options, recipe.rollout),
        model,
        config,
        processing_class=tokenizer,
        peft_config=lora_config(recipe.model.lora) if recipe.model.lora else None,
    )
    for noisy in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noisy)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    moved = sum(
        not torch.equal(p.detach(), before[name]) for name, p in trainer.model.named_parameters() if name in before
    )

    own.reward(seen)  # the recipe's aggregator, on the scores that are there
    episode = seen[0]
    console.print(
        f"episode: {len(episode.turns)} turns ({', '.join(turn.module for turn in episode.turns[:6])}"
        f"{', ...' if len(episode.turns) > 6 else ''}), "
        f"{sum(len(t.prompt_ids) + len(t.completion_ids) for t in episode.turns)} tokens"
    )
    for weighted in prepared.rewards.dimensions:
        score = episode.scores[weighted.name]
        shown = f"{score.value:g}" if score.value is not None else f"None ({score.reason})"
        console.print(f"reward {weighted.name} (weight {weighted.weight:g}): {shown}", markup=False)
    value = f"{episode.reward:g}" if episode.reward is not None else "none: a dimension could not be measured"
    console.print(f"reward, {recipe.aggregate.name}: {value}", markup=False)
    console.print(f"optimizer step: {moved} of {len(before)} trainable tensors moved")
    console.print("(a made-up reward was added, so that the group has something to teach)")
    console.rule("rewards")
    print_findings(console, prepared.rewards, seen, scale_rewards=config.scale_rewards)


def _note(seen: list[Episode], episode: Episode) -> int:
    seen.append(episode)
    return len(seen)


def _shortened(agent: Any) -> Any:
    """The same agent with short turns over the first chunks of a document, where it has such limits."""
    if not dataclasses.is_dataclass(agent) or isinstance(agent, type):
        return agent
    names = {field.name for field in dataclasses.fields(agent)}
    values: dict[str, Any] = dict.fromkeys(turn_limits(agent), _SHORT)
    if "max_chunks" in names:
        values["max_chunks"] = 2
    if "on_overflow" in names:
        values["on_overflow"] = "truncate_end"
    return dataclasses.replace(agent, **values)


def _without_scale(recipe: Recipe) -> dict[str, Any]:
    """The recipe's `train:` without what belongs to many devices, long runs and other services."""
    dropped = (
        "generation_batch_size",
        "steps_per_generation",
        "num_train_epochs",
        "eval_strategy",
        "eval_steps",
        "deepspeed",
        "fsdp",
        "fsdp_config",
    )
    small = {
        "max_steps": 1,
        "gradient_accumulation_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "fp16": False,
        "warmup_steps": 0,
        "lr_scheduler_type": "constant",
    }
    return {key: value for key, value in recipe.train.items() if key not in dropped} | small


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer for any text with one token per byte: no vocabulary to download, nothing unknown."""
    special = ["<pad>", "<end>", "<user>", "<assistant>", "<system>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({token: index for index, token in enumerate([*special, *alphabet])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<end>", additional_special_tokens=special[2:]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer

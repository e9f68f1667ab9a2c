"""What a recipe needs of the vLLM servers that sample for it. Importable without torch."""

from __future__ import annotations

from pathlib import Path

from packaging.version import InvalidVersion, Version

from memfactory.errors import MemFactoryError, RecipeError
from memfactory.recipe import Recipe
from memfactory.untested import refuse

TESTED = (Version("0.26"), Version("0.32"))
"""vLLM from here up to, not including, there: those whose interfaces we rely on. 0.31.0 is the one in our tests."""
BASE = "base"
"""The name under which servers serve the base model (`--served-model-name`)."""
SERVED = "served"
"""Folder in the run folder with what servers load first, where they are sent all weights."""
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes for ``--max-lora-rank``."""


def check_tested(where: str, version: str) -> None:
    """Compare a version of vLLM with those whose interfaces we rely on; one that does not say what it is passes.

    Args:
        where: who has it, for the message.

    Raises:
        EngineError: see :func:`memfactory.untested.refuse`.
    """
    try:
        inside = TESTED[0] <= Version(Version(version).base_version) < TESTED[1]
    except InvalidVersion:
        return
    if not inside:
        why = f"its interfaces were tested from {TESTED[0]} up to, not including, {TESTED[1]}"
        refuse(f"{where} vLLM {version}", why, "install a tested one: pip install 'memfactory[gpu]'")


def unfit(recipe: Recipe) -> list[MemFactoryError]:
    """What in a recipe does not go with `rollout.engine: vllm` or `async`; empty for any other engine."""
    errors: list[MemFactoryError] = []
    engine = recipe.rollout.engine
    if not recipe.rollout.served:
        return errors
    before = [name for name, section in recipe.modules.items() if section.policy == "initial"]
    if recipe.model.lora is None and before:
        why = "all weights are trained, so the servers have those from before training no more"
        fix = "add `lora: {r: 16}` to `model:`, or name the model under `policies:`"
        errors.append(RecipeError(f"modules.{before[0]}.policy: initial with rollout.engine {engine}", why, fix))
    for name, neutral in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0), ("repetition_penalty", 1.0)):
        if recipe.train.get(name) not in (None, neutral):
            why = "vLLM's log-probs are then those of the cut distribution, and the trainer's are not"
            errors.append(RecipeError(f"train.{name}: not with rollout.engine {engine}", why, "leave it out"))
    if recipe.model.lora is not None and recipe.model.lora.r > RANKS[-1]:
        errors.append(RecipeError(f"model.lora.r: {recipe.model.lora.r}", "vLLM takes at most 512", "lower it"))
    return errors


def base_model(recipe: Recipe, folder: Path) -> str:
    """What the servers must load: the recipe's model, or what the trainer saved as the start of the run `folder`.

    Where all weights are sent, servers begin with a copy that can be loaded again (`weight_sync.save_untied`).
    """
    model = recipe.model
    if model.lora is None:
        return str((folder / SERVED).resolve())
    plain = model.name is not None and model.gguf_file is None and not model.name.startswith("package:")
    if plain and recipe.warmup is None:
        assert model.name is not None
        return model.name
    return str((folder / "initial").resolve())


def adapters_at_once(recipe: Recipe) -> int:
    """How many of the recipe's adapters a server holds at the same time (`--max-loras`).

    Turns that are under way keep the adapter they began with: those of the last `max_staleness` updates, that of now,
    and the one that is being loaded.
    """
    return recipe.rollout.async_grpo.max_staleness + 2 if recipe.rollout.engine == "async" else 2


def lora_rank(recipe: Recipe) -> int:
    """The smallest ``--max-lora-rank`` that takes the recipe's adapter."""
    assert recipe.model.lora is not None
    rank = recipe.model.lora.r
    return next(size for size in RANKS if size >= rank)

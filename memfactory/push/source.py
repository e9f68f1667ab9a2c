"""What is pushed: the checkpoint of a run, checked before anything is copied."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from memfactory.errors import EngineError, RecipeError
from memfactory.evaluate.candidates import find_candidates
from memfactory.evaluate.report_source import Evaluation, read_evaluation
from memfactory.recipe import Recipe, load_recipe
from memfactory.runs import Record, RunFolder

_WEIGHTS = ("model*.safetensors", "adapter_model.safetensors", "pytorch_model*.bin", "adapter_model.bin")
_FILES = (
    *(*_WEIGHTS, "*.safetensors", "*.index.json", "config.json", "generation_config.json", "adapter_config.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja", "*.model"),
)
"""What a model needs. A checkpoint also holds optimizer, random state and the like, which nobody loads."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Pushed:
    """A checkpoint, and what is known of it."""

    run: RunFolder
    recipe: Recipe
    summary: Record
    checkpoint: Path
    fingerprint: str
    """Of its weights, by which an evaluation knows it."""
    files: tuple[Path, ...]
    left_out: tuple[str, ...]
    """Names of files of the checkpoint that are not pushed."""
    base: str | None
    """Name on the Hub of the model that was trained; None where it is not from there."""
    adapter: bool
    merge: bool = False
    """The adapter is put into its base, and the whole model is pushed."""
    evaluation: Evaluation | None = None


def find_pushed(
    run: Path, checkpoint: Path | None = None, evaluation: Path | None = None, *, merge: bool = False
) -> Pushed:
    """The checkpoint of `run`: the model that it ended with, or the one at `checkpoint`.

    Args:
        evaluation: an evaluation folder, for the table of the card.
        merge: put an adapter into its base.

    Raises:
        DataError: `run` is no run folder, or `evaluation` no evaluation folder.
        EngineError: the run has no finished model, the checkpoint is damaged or lacks its tokenizer, or is an adapter
            whose base nobody else has.
        RecipeError: `evaluation` is of other weights.
    """
    folder = RunFolder(run)
    folder.read_recipe()
    recipe = load_recipe(folder.recipe_file)
    if checkpoint is None and not (run / "model").is_dir():
        newest = folder.latest_checkpoint()
        raise EngineError(
            f"{run} has no finished model",
            "training has not ended, so there is no model/ in it",
            f"push a checkpoint: --checkpoint {newest}" if newest else "let it go on: memfactory train RECIPE",
        )
    (found,) = find_candidates(recipe, [checkpoint or run / "model"], base=False)
    chosen = found.checkpoint
    assert chosen is not None
    names = sorted(file for file in chosen.iterdir() if file.is_file())
    files = tuple(file for file in names if any(fnmatch(file.name, pattern) for pattern in _FILES))
    if not any(fnmatch(file.name, pattern) for file in files for pattern in _WEIGHTS):
        raise EngineError(
            f"{chosen}: no weights in it",
            f"none of {', '.join(_WEIGHTS)}",
            "push RUN/model, or gather the shards of a sharded checkpoint into one model first",
        )
    if not (chosen / "tokenizer_config.json").is_file():
        raise EngineError(
            f"{chosen}: no tokenizer beside the weights",
            "tokenizer_config.json is missing, and without it nobody can use the model",
            "push RUN/model or a checkpoint-N that `memfactory train` wrote",
        )
    adapter = (chosen / "adapter_config.json").is_file()
    if merge and not adapter:
        raise RecipeError("--merge", f"{chosen} is a whole model and no adapter", "leave --merge out")
    if merge and recipe.model.quantization is not None:
        why = "the adapter was trained on 4-bit weights, and merging would round them again"
        raise RecipeError("--merge", why, "leave --merge out, and push the adapter")
    told = None if evaluation is None else read_evaluation(evaluation / "evaluation.json")
    if told is not None and not candidates(told, found.fingerprint):
        known = ", ".join(str(candidate.get("name")) for candidate in told.candidates)
        raise RecipeError(
            f"{evaluation} is not an evaluation of {chosen}",
            f"its candidates ({known}) have other weights",
            f"memfactory eval {folder.recipe_file} --checkpoint {chosen} --output {evaluation}",
        )
    return Pushed(
        run=folder,
        recipe=recipe,
        summary=folder.read_summary(),
        checkpoint=chosen,
        fingerprint=found.fingerprint,
        files=files,
        left_out=tuple(file.name for file in names if file not in files),
        base=_base_of_adapter(chosen) if adapter and not merge else on_hub(recipe.model.name),
        adapter=adapter and not merge,
        merge=merge,
        evaluation=told,
    )


def candidates(evaluation: Evaluation, fingerprint: str) -> list[str]:
    """Names under which weights with this fingerprint were evaluated."""
    return [str(one.get("name")) for one in evaluation.candidates if one.get("fingerprint") == fingerprint]


def on_hub(name: str | None) -> str | None:
    """`name` where it can be that of a model on the Hub, and not a folder or a file of a package."""
    return name if name and _HUB_NAME.fullmatch(name) and not os.path.exists(name) else None


def _base_of_adapter(folder: Path) -> str:
    file = folder / "adapter_config.json"
    try:
        data: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EngineError(f"{file} is not readable", str(error), "use another checkpoint") from error
    base = str(data.get("base_model_name_or_path") or "") if isinstance(data, dict) else ""
    name = on_hub(base)
    if name is None:
        raise EngineError(
            f"{folder}: an adapter without its base",
            f"its base model {base or '(not named)'} is no name on the Hub, so nobody else could load it",
            "push the whole model instead: add --merge",
        )
    return name

"""What is evaluated: a base model and checkpoints, named and recognised again by their weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from memfactory.agents.baselines import Baseline
from memfactory.checkpoints import SEAL, damage
from memfactory.errors import EngineError, RecipeError
from memfactory.evaluate.fingerprints import base_fingerprint, weights_fingerprint
from memfactory.recipe import Recipe
from memfactory.runs import RunFolder

BASE = "base"
_WEIGHTS = ("config.json", "adapter_config.json")


@dataclass(frozen=True)
class Candidate:
    """One model, and how it is asked."""

    name: str
    checkpoint: Path | None = None
    """None: the recipe's own model, untrained, or an endpoint."""
    fingerprint: str = ""
    """The same for the same weights, wherever they lie."""
    under: str = ""
    """What it answers with beyond its own weights: the fingerprint of the model that an adapter is put on, or the
    context that an endpoint was said to take."""
    untrained: bool = False
    """What training began with: small models that learn beside the policy are as they were made."""
    baseline: Baseline | None = None
    """Asked without the agent's memory, see :mod:`memfactory.agents.baselines`."""

    def as_baseline(self, kind: Baseline) -> Candidate:
        return replace(self, name=f"{kind} ({self.name})", baseline=kind)


def find_candidates(recipe: Recipe, paths: Sequence[Path], *, base: bool = True) -> list[Candidate]:
    """The base model and the checkpoints at `paths`.

    The base is what the run of the first checkpoint began with: the warmed-up model in its folder, or else the
    recipe's own.

    Args:
        paths: each a folder with weights, or a run folder, which stands for the model it ended with or else its
            newest checkpoint.

    Raises:
        EngineError: there are no weights at a path, or they are damaged.
    """
    found = [_checkpoint(path) for path in paths]
    first = _started_from(found[0]) if found else None
    fingerprint = weights_fingerprint(first) if first is not None else base_fingerprint(recipe)
    own = Candidate(BASE, first, fingerprint, untrained=True)
    every = [own] if base or not found else []
    for path, folder in zip(paths, found, strict=True):
        every.append(Candidate(_name(path, folder), folder, weights_fingerprint(folder)))
    return apart(every)


def _checkpoint(path: Path) -> Path:
    """The folder with weights that `path` stands for."""
    if any((path / name).is_file() for name in _WEIGHTS):
        folder: Path | None = path
    elif (path / "recipe.yaml").is_file():
        folder = path / "model" if (path / "model").is_dir() else RunFolder(path).latest_checkpoint()
        if folder is None:
            raise EngineError(f"{path}: the run has no model yet", "no model/ and no checkpoint in it", "let it go on")
    else:
        folder = None
    if folder is None or not any((folder / name).is_file() for name in _WEIGHTS):
        raise EngineError(
            f"{path}: no checkpoint in it",
            "neither config.json nor adapter_config.json" if path.is_dir() else "there is no such folder",
            "name a run folder, its model/ or a checkpoint-N in its checkpoints/",
        )
    if (folder / SEAL).is_file() and (wrong := damage(folder)):
        raise EngineError(f"{folder} is damaged", wrong, "use another checkpoint, or restore it from a backup")
    return folder


def _started_from(checkpoint: Path) -> Path | None:
    """The warmed-up model that the run of `checkpoint` began with, where it has one."""
    for folder in (checkpoint.parent, checkpoint.parent.parent):  # RUN/model, RUN/checkpoints/checkpoint-N
        if (folder / "initial" / "config.json").is_file():
            return folder / "initial"
    return None


def run_recipe(folder: Path) -> Path | None:
    """The recipe of the run whose model or checkpoint lies in `folder`; None where it is in no run folder."""
    places = (place / "recipe.yaml" for place in (folder, *folder.resolve().parents[:2]))
    return next((place for place in places if place.is_file()), None)


def _name(path: Path, folder: Path) -> str:
    path = path.resolve()
    if path.name == "model":
        return path.parent.name
    if path.name.startswith("checkpoint-"):
        return f"{path.parent.parent.name}/{path.name}"
    return path.name if folder.resolve() == path or folder.name == "model" else f"{path.name}/{folder.name}"


def apart(candidates: list[Candidate]) -> list[Candidate]:
    """Names made different, where two are the same."""
    taken = {candidate.name for candidate in candidates}
    named: list[Candidate] = []
    for candidate in candidates:
        name, number = candidate.name, 1
        while any(other.name == name for other in named) or (number > 1 and name in taken):
            number += 1
            name = f"{candidate.name} ({number})"
        named.append(replace(candidate, name=name))
    return named


def on_base(candidate: Candidate, recipe: Recipe) -> Candidate:
    """`candidate`, with the weights that an adapter is put on."""
    folder = candidate.checkpoint
    if folder is None or not (folder / "adapter_config.json").is_file():
        return candidate
    first = _started_from(folder)
    return replace(candidate, under=weights_fingerprint(first) if first is not None else base_fingerprint(recipe))


# ---- does it fit the recipe? --------------------------------------------------------------------


def check_candidate(candidate: Candidate, recipe: Recipe, tokenizer: Any) -> None:
    """Fail before a model is loaded where a checkpoint is not one of this recipe.

    Args:
        tokenizer: the recipe's.

    Raises:
        EngineError: it is an adapter of another base, or its tokenizer is another one.
        RecipeError: its configuration is not readable.
    """
    folder = candidate.checkpoint
    if folder is None:
        return
    adapter, fix = folder / "adapter_config.json", "give the recipe it was trained with: RUN/recipe.yaml"
    if adapter.is_file():
        base = str(_json(adapter).get("base_model_name_or_path") or "")
        wanted = recipe.model.name
        warmed = _started_from(folder) is not None
        if wanted and base and not warmed and not _same(base, wanted):
            raise EngineError(f"{folder}: an adapter of another base", f"of {base}, and the recipe has {wanted}", fix)
        if recipe.warmup is not None and not warmed:
            raise EngineError(
                f"{folder}: its base model is missing",
                "this adapter was trained on a warmed-up model, which lies in `initial` in its run folder",
                "name the checkpoint inside its run folder",
            )
    else:
        known: int | None = _json(folder / "config.json").get("vocab_size")
        if isinstance(known, int) and known < len(tokenizer):
            why = f"it knows {known} tokens, and the recipe's tokenizer has {len(tokenizer)}"
            raise EngineError(f"{folder}: a checkpoint of another base", why, fix)
        own, wanted_shape = _json(folder / "config.json"), _shape(recipe, tokenizer)
        for name in ("model_type", "hidden_size", "num_hidden_layers"):
            if name in own and name in wanted_shape and own[name] != wanted_shape[name]:
                why = f"its {name} is {own[name]}, and that of the recipe's model {wanted_shape[name]}"
                raise EngineError(f"{folder}: a checkpoint of another base", why, fix)
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        words = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
        other = tokenizer.get_vocab()
        if words != other:
            differ = sorted(word for word in words.keys() | other.keys() if words.get(word) != other.get(word))
            why = f"{len(differ)} tokens have other ids than in the recipe's, e.g. {differ[0]!r}"
            raise EngineError(f"{folder}: a checkpoint with another tokenizer", why, fix)


def _shape(recipe: Recipe, tokenizer: Any) -> dict[str, Any]:
    """Configuration of the recipe's own model; empty where it cannot be read, which loading it will say."""
    from transformers import AutoConfig

    from memfactory.policy.models import locate
    from memfactory.policy.tiny import tiny_config

    model = recipe.model
    if model.tiny is not None:
        return dict(tiny_config(model.tiny, tokenizer).to_dict())
    try:
        source, packaged = locate(str(model.name))
        gguf = model.gguf_file or packaged
        options = {"gguf_file": gguf} if gguf else {}
        found = AutoConfig.from_pretrained(source, trust_remote_code=model.trust_remote_code, **options)
    except (OSError, ValueError, RecipeError):
        return {}
    return dict(found.to_dict())


def _same(base: str, wanted: str) -> bool:
    """Whether two names of a model may mean the same one: folders and Hub ids are both written in many ways."""
    return base == wanted or Path(base).name == Path(wanted).name or wanted.startswith("package:")


def _json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{file} is not readable", str(error), "is the checkpoint whole?") from error
    return data if isinstance(data, dict) else {}

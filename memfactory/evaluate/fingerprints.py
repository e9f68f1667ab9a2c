"""What an episode depends on, in a few letters: weights, wherever they lie, and the code and prompts of the agent.

The key of a kept episode is made of these, so that it is found again under the same conditions and under no others.
What only an endpoint knows, its weights and its version, is not in them: of an endpoint there is its address and the
name of its model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from memfactory.errors import RecipeError
from memfactory.recipe import Recipe

_LARGE = 64 * 2**20
"""Files of more than this are read once, and known by size and times afterwards. Unit: bytes."""
_CONFIGURATION = ("config.json", "adapter_config.json")
_KNOWN = Path(".memfactory") / "weights.json"
"""What large files came to, beside the judge's verdicts."""


def weights_fingerprint(folder: Path, file: str | None = None) -> str:
    """16 hex digits that follow from every byte of the weights in `folder` and from their configuration.

    Args:
        file: the one that holds the weights, where others lie beside it that are not used (GGUF).
    """
    digest = hashlib.sha256()
    names = [file] if file is not None else sorted(one.name for one in folder.iterdir() if _holds_weights(one.name))
    for name in names:
        digest.update(f"{name} {_content(folder / name)}\n".encode())
    for name in _CONFIGURATION:
        if (folder / name).is_file():
            # where it was saved and by which version says nothing about what it computes
            told = json.loads((folder / name).read_bytes())
            left_out = ("transformers_version", "_name_or_path", "base_model_name_or_path")
            kept = {key: value for key, value in told.items() if key not in left_out}
            digest.update(f"{name} {json.dumps(kept, sort_keys=True)}\n".encode())
    return digest.hexdigest()[:16]


def _holds_weights(name: str) -> bool:
    """Not what training goes on from: optimizer, schedule, random state."""
    return name.endswith((".safetensors", ".gguf")) or (name.endswith(".bin") and "model" in name)


def _content(file: Path) -> str:
    """SHA-256 of `file`. Of a large one it is kept, and told again as long as the file is the same to its file system:
    size, times of content and of entry, number."""
    stat = file.stat()
    if stat.st_size <= _LARGE:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    place = f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"
    known = _known()
    if place not in known:
        with file.open("rb") as stream:
            known = {**_known(), place: hashlib.file_digest(stream, "sha256").hexdigest()}
        with suppress(OSError):  # it is only slower without
            _KNOWN.parent.mkdir(parents=True, exist_ok=True)
            temporary = _KNOWN.with_name(f"{_KNOWN.name}.{os.getpid()}.tmp")
            temporary.write_text(json.dumps(known, indent=0), encoding="utf-8")
            os.replace(temporary, _KNOWN)
    return known[place]


def _known() -> dict[str, str]:
    try:
        told = json.loads(_KNOWN.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(place): str(digest) for place, digest in told.items()} if isinstance(told, dict) else {}


def named_fingerprint(name: str, gguf_file: str | None = None) -> str:
    """Of the weights that a recipe names: by their bytes in a folder or a package, by the commit on the Hub.

    Raises:
        RecipeError: the package is not installed.
    """
    from memfactory.policy.models import locate

    source, packaged = locate(name)
    if Path(source).is_dir():
        return weights_fingerprint(Path(source), gguf_file or packaged)
    from transformers.utils.hub import cached_file, extract_commit_hash

    commit = None
    with suppress(OSError, ValueError):  # it cannot be had: loading it says so
        commit = extract_commit_hash(cached_file(source, "config.json"), None)
    return _short([source, gguf_file, commit])


def base_fingerprint(recipe: Recipe) -> str:
    """Of the recipe's own model: of what its weights follow from where it is built from nothing."""
    if recipe.model.name is None:
        return _short([recipe.model.model_dump(mode="json", exclude={"lora"}), recipe.seed])
    return named_fingerprint(recipe.model.name, recipe.model.gguf_file)


def beside_fingerprints(recipe: Recipe) -> dict[str, str]:
    """Of the models that answer for modules beside the policy, by their names in `policies:`."""
    return {
        name: named_fingerprint(str(section.model))
        for name, section in recipe.policies.items()
        if section.base_url is None
    }


def agent_fingerprint(agent: object) -> str:
    """Of the prompts of `agent` and its modules, as they are now, and of the source files of those classes that are
    not MemFactory's own: of theirs the version is enough. What such a file imports is not followed."""
    parts = [agent, *getattr(agent, "modules", ())]
    return _short([[f"{type(part).__module__}:{type(part).__qualname__}", _told(part)] for part in parts]) + _sources(
        cls for part in parts for cls in type(part).__mro__ if not _ours(cls)
    )


def _told(value: Any) -> Any:
    """`value` as JSON can hold it: fields of dataclasses with their values, so the texts of prompts too."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _told(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _told(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_told(own) for own in value]
    return value if isinstance(value, str | int | float | bool | None) else type(value).__qualname__


def _ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] in ("memfactory", "builtins", "typing", "abc")


def _sources(classes: Iterable[type]) -> str:
    digests = []
    for cls in classes:
        with suppress(OSError, TypeError):  # one that was written at a prompt has no file
            digests.append(hashlib.sha256(Path(inspect.getfile(cls)).read_bytes()).hexdigest())
    return _short(digests) if digests else ""


def _short(told: Any) -> str:
    try:
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
    except TypeError as error:
        raise RecipeError("the settings of an evaluation", f"cannot be written as JSON: {error}") from error

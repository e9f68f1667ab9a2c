"""Writes the folder that is pushed, in one go, and sends it to the Hub where that is asked for."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml

from memfactory.checkpoints import saving
from memfactory.errors import EngineError, RecipeError, boundary
from memfactory.push.card import clean_recipe, make_card
from memfactory.push.source import Pushed

LARGE = 2**20
"""Files from this size on are hard-linked where the disk allows it: they cost no room. Smaller ones are copied, so
that editing one does not edit the checkpoint. Unit: bytes."""


@dataclass(frozen=True)
class Written:
    """A folder that was written."""

    folder: Path
    linked: tuple[str, ...]
    copied: tuple[str, ...]


def check_output(folder: Path) -> None:
    """Raises RecipeError: there is something at `folder` that would be lost."""
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"--output {folder}", "it is a file", "choose another folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise RecipeError(f"--output {folder}", "the folder is not empty", "choose another folder, or remove it")


def check_upload(repo: str | None) -> str:
    """The name on the Hub, checked with everything else that an upload needs.

    Raises:
        RecipeError: no name, a name that the Hub does not take, or no token.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if repo is None or repo.count("/") != 1:
        why = "an upload needs a name on the Hub" if repo is None else f"'{repo}' has no owner"
        raise RecipeError("--repo", why, "--repo OWNER/NAME")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise RecipeError(f"--repo {repo}", str(error), "--repo OWNER/NAME") from error
    if constants.HF_HUB_OFFLINE:
        raise RecipeError("--upload", "HF_HUB_OFFLINE is set, so nothing can be sent", "unset it")
    if not get_token():
        fix = "set HF_TOKEN to a token with write access (hf.co/settings/tokens), or run `hf auth login`"
        raise RecipeError("--upload", "there is no token for the Hub", fix)
    return repo


def write_folder(pushed: Pushed, output: Path, *, repo: str | None = None, license: str | None = None) -> Written:
    """Put model, tokenizer, card and recipe into `output`: whole, or not at all.

    Raises:
        RecipeError: `output` is not empty.
        EngineError: it cannot be written, or the adapter cannot be merged.
    """
    check_output(output)
    linked: list[str] = []
    copied: list[str] = []
    with saving(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        with saving(made):
            made.chmod(0o755)  # a temporary folder is its owner's alone
            for file in pushed.files:
                if pushed.merge and file.name.startswith("adapter_"):
                    continue
                (linked if _take(file, made / file.name) else copied).append(file.name)
            if pushed.merge:
                _merge(pushed, made)
            recipe = yaml.safe_dump(clean_recipe(pushed), sort_keys=False, allow_unicode=True)
            (made / "recipe.yaml").write_text(recipe, encoding="utf-8")
            make_card(pushed, repo=repo, license=license).save(made / "README.md")
            os.replace(made, output)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return Written(output, tuple(linked), tuple(copied))


def upload(folder: Path, repo: str, *, private: bool) -> str:
    """Send `folder` to the Hub, making the repository where there is none; returns its address.

    Raises:
        EngineError: the Hub refused (a refused token is told as such), or could not be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    what, again = f"{repo} could not be uploaded", f"upload it with `hf upload {repo} {folder}`"
    with boundary(EngineError, what, f"the folder {folder} is whole: try again, or {again}"):
        api = HfApi(library_name="memfactory")
        try:
            api.create_repo(repo, private=private or None, exist_ok=True)
            sent = api.upload_folder(folder_path=folder, repo_id=repo, commit_message="Upload with memfactory push")
        except HfHubHTTPError as error:
            if error.response.status_code not in (401, 403):
                raise
            owner = repo.partition("/")[0]
            fix = f"set HF_TOKEN to a token with write access to {owner} (hf.co/settings/tokens), and {again}"
            why = f"{error.response.status_code}: {error.server_message or error}"
            raise EngineError(f"{what}: the Hub refused the token", why, fix) from error
        return str(sent)


def _take(file: Path, target: Path) -> bool:
    """Whether `file` was linked; it is copied where it is small, or lies on another disk."""
    source = file.resolve()
    if source.stat().st_size >= LARGE:
        try:
            os.link(source, target)
            return True
        except OSError:
            pass
    shutil.copy2(source, target)
    return False


def _merge(pushed: Pushed, target: Path) -> None:
    """Write the whole model: the adapter in its base.

    Raises:
        EngineError: the base cannot be loaded.
    """
    import json

    from memfactory.policy.models import load_checkpoint, load_model, load_tokenizer

    named = json.loads((pushed.checkpoint / "adapter_config.json").read_text(encoding="utf-8"))
    base = str(named.get("base_model_name_or_path") or "")
    section = pushed.recipe.model
    with boundary(EngineError, f"{pushed.checkpoint}: its base {base} cannot be loaded", "is the run folder whole?"):
        if Path(base).is_dir():
            whole = load_checkpoint(Path(base), section)
        else:
            whole = load_model(section, load_tokenizer(section, None), pushed.recipe.seed)
        load_checkpoint(pushed.checkpoint, section, whole).merge_and_unload().save_pretrained(target)

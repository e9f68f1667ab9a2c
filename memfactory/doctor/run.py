"""All checks, in the order in which they are shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from memfactory.doctor.check import Check, Level, of_error
from memfactory.doctor.machine import gpu_memory, gpus, machine_checks, memory_bytes
from memfactory.doctor.needs import recipe_packages, vllm_here
from memfactory.doctor.packages import check_python, package_checks
from memfactory.doctor.ports import check_main_port
from memfactory.errors import MemFactoryError, attempt
from memfactory.recipe import load_recipe

if TYPE_CHECKING:
    from memfactory.launch.plan import Plan, Request
    from memfactory.train.prepare import Prepared


@dataclass(frozen=True)
class Asked:
    """A recipe, and how it would be launched."""

    path: Path
    typed: str
    """The recipe as it was named, and the overrides: for commands in messages."""
    overrides: Sequence[str] = ()
    config: str | None = None
    gpus: int | None = None
    processes: int | None = None


def machine() -> list[Check]:
    """What every recipe needs; torch is not imported."""
    found = gpus()
    return [check_python(), *package_checks(bool(found)), *machine_checks(found)]


def recipe(asked: Asked) -> Iterable[Check]:
    """What this recipe needs beyond that; no weights are loaded but to compare a server with them.

    Raises:
        RecipeErrors: the recipe itself is wrong.
    """
    loaded = load_recipe(asked.path, list(asked.overrides))
    yield from recipe_packages(loaded, asked.config)
    try:  # they import torch and TRL, which may be what is missing
        from memfactory.doctor.folders import folder_checks
        from memfactory.launch.plan import Request
        from memfactory.train.prepare import prepare
    except ImportError as error:
        fix = "pip install 'memfactory[train]'"
        yield Check("recipe", f"not looked at further: {error}", "", Level.WRONG, fix)
        return
    prepared = prepare(asked.path, asked.overrides, splits=())
    plan = None
    divided = [key for key in ("deepspeed", "fsdp") if loaded.train.get(key)]
    if divided and asked.config is None:
        why = f"not estimated: train.{divided[0]} says how the model is divided"
        yield Check("memory for the run", why, "", Level.NOTE, f"train.{divided[0]}=null and --config zero3 or fsdp2")
    else:
        errors: list[MemFactoryError] = []
        request = Request(asked.config, asked.gpus, asked.processes)
        plan = attempt(lambda: _planned(prepared, request), errors)
        yield from (of_error("launch", wrong) for wrong in errors)
        if plan is not None:
            yield from _of_plan(prepared, request, plan)
    yield from folder_checks(loaded, plan)
    if loaded.rollout.served:
        yield from _servers(prepared, asked.typed)


def _planned(prepared: Prepared, request: Request) -> Plan:
    from memfactory.launch.plan import lay_out, make_plan

    return make_plan(prepared, request, lay_out(request))


def _of_plan(prepared: Prepared, request: Request, plan: Plan) -> Iterable[Check]:
    from memfactory.doctor.fits import check_memory, check_shared
    from memfactory.launch.plan import Layout

    layout = Layout(plan.settings, plan.nodes, plan.per_node)
    found = gpu_memory()
    yield from check_memory(prepared, request, layout, plan, found, memory_bytes())
    yield from check_shared(plan, len(found))
    if plan.processes > 1:
        yield check_main_port(plan.port)


def _servers(prepared: Prepared, typed: str) -> Iterable[Check]:
    try:
        from memfactory.doctor.served import Served
    except ImportError:  # httpx and its like, which have a line of their own
        return
    if prepared.recipe.rollout.vllm.mode == "colocate":  # the trainer starts its own, at ports that are free then
        yield vllm_here()
        return
    served = Served(prepared, typed)
    if served.starts_here():
        yield vllm_here()
    yield from served.checks()

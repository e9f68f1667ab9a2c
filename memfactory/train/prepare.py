"""From a recipe to its parts: everything that can be checked before a model is loaded."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memfactory.agents import Agent, build_agent
from memfactory.environments import build_environment
from memfactory.environments.base import Environment, Split
from memfactory.environments.overlap import check_disjoint
from memfactory.episode import Task
from memfactory.errors import DataError, MemFactoryError, RecipeError, RecipeErrors, attempt
from memfactory.evaluate.run import EvalOptions
from memfactory.policy import quantization
from memfactory.policy.base import Policy
from memfactory.policy.vllm_needs import unfit
from memfactory.recipe import Recipe, apply_overrides, nearest, read_yaml, schema_errors
from memfactory.reward.catalogue import WeightedDimension, load_dimension
from memfactory.reward.system import RewardSystem
from memfactory.train.config import alone, check_train
from memfactory.train.learners import Learner
from memfactory.train.policies import trains


@dataclass
class Prepared:
    """A checked recipe and the objects it names; no model yet."""

    recipe: Recipe
    agent: Agent
    environment: Environment
    train_tasks: Sequence[Task]
    eval_tasks: Sequence[Task]
    rewards: RewardSystem

    @property
    def eval_options(self) -> EvalOptions:
        section = self.recipe.eval
        rewards = self.rewards
        if section.metric not in [weighted.name for weighted in rewards.dimensions]:
            rewards = rewards.also(WeightedDimension(section.metric, load_dimension(section.metric), 0.0))
        return EvalOptions(
            rewards=rewards,
            metric=section.metric,
            samples=section.samples,
            temperature=section.temperature,
            top_p=section.top_p,
            greedy=section.greedy,
            seed=self.recipe.seed,
            max_failed_share=self.recipe.rollout.max_failed_share,
        )

    @property
    def vocabulary(self) -> list[str] | None:
        """Every word of the environment, where it has a closed vocabulary."""
        words = getattr(self.environment, "vocabulary", None)
        return words() if words is not None else None

    @property
    def max_turn_tokens(self) -> int:
        """Longest turn the agent allows: TRL's `max_completion_length`."""
        return max(turn_limits(self.agent).values(), default=1024)


GROUPLESS = ("batch", "none")
"""Values of `credit.advantage` that compare nothing inside groups."""


def prepare(path: Path, overrides: Sequence[str] = (), splits: Collection[Split] = tuple(Split)) -> Prepared:
    """Read and check a recipe completely.

    Args:
        path: the recipe file.
        overrides: ``key=value`` entries that replace or add to it.
        splits: which tasks to load: none to check the recipe itself, the test split alone to evaluate.

    Raises:
        RecipeErrors: everything that is wrong with the recipe, in one message.
        DataError: the recipe is right but a dataset is not.
    """
    data = apply_overrides(read_yaml(path), list(overrides))
    recipe, errors = schema_errors(data)
    train = data.get("train")
    # a recipe that names who answers for modules may train none of them by groups; looked into when there is an agent
    groups = not data.get("modules") and (data.get("credit") or {}).get("advantage") not in GROUPLESS
    errors += check_train(train, groups=groups) if isinstance(train, dict) else []
    if recipe is None:
        raise RecipeErrors(str(path), errors)

    agent = attempt(lambda: build_agent(recipe.agent.name, recipe.agent.options), errors)
    environment = attempt(lambda: build_environment(recipe.environment.name, recipe.environment.options), errors)
    rewards = attempt(lambda: RewardSystem.from_recipe(recipe), errors)
    errors += _unfit(recipe, agent) if agent is not None else []
    errors += unfit(recipe) + quantization.unfit(recipe)
    if recipe.rollout.engine == "async":
        from memfactory.train.async_config import check_async  # imports TRL's experimental part

        errors += check_async(recipe)
    if recipe.eval.metric not in [section.label or section.name for section in recipe.rewards]:
        attempt(lambda: load_dimension(recipe.eval.metric), errors)
    if errors:
        raise RecipeErrors(str(path), errors)
    assert agent is not None
    assert environment is not None
    assert rewards is not None

    counts = {Split.TRAIN: recipe.environment.train_tasks, Split.TEST: recipe.environment.test_tasks}
    tasks: dict[Split, Sequence[Task]] = {}
    for split in splits:
        tasks[split] = environment.tasks(split, counts[split])
        if not tasks[split]:
            raise DataError(f"environment {recipe.environment.name}", f"it has no {split} tasks")
    train_tasks, eval_tasks = tasks.get(Split.TRAIN, []), tasks.get(Split.TEST, [])
    check_disjoint(train_tasks, eval_tasks)
    return Prepared(recipe, agent, environment, train_tasks, eval_tasks, rewards)


def _unfit(recipe: Recipe, agent: Agent) -> list[MemFactoryError]:
    """What the recipe asks of its agent that this agent cannot do."""
    errors: list[MemFactoryError] = []
    names = [module.name for module in getattr(agent, "modules", ())]
    for name in recipe.modules:
        if names and name not in names:
            errors.append(RecipeError(f"modules.{name}: agent {recipe.agent.name} has none", "", nearest(name, names)))
    if recipe.rollout.engine == "async":
        errors += [
            RecipeError(
                f"rollout.engine: async with {module.name}",
                "it learns beside the policy, from every batch and for the next one",
                "rollout.engine=vllm",
            )
            for module in getattr(agent, "modules", ())
            if isinstance(module, Learner)
        ]
    asked = [module.name for module in getattr(agent, "modules", ()) if hasattr(module, "render")]
    compared = recipe.credit.advantage not in GROUPLESS and (not asked or any(trains(recipe, name) for name in asked))
    if recipe.train.get("num_generations") == 1 and compared:
        errors.append(alone(1))
    if recipe.rollout.rerolls.share and not hasattr(agent, "restore"):
        errors.append(
            RecipeError(
                "rollout.rerolls: not with this agent",
                f"{type(agent).__name__} cannot begin from a snapshot of its store",
                "use an agent over a bank (memory_r1, compose), or leave the section out",
            )
        )
    return errors


def turn_limits(agent: object) -> dict[str, int]:
    """The agent's limits on the length of a turn, in tokens: its fields called ``max_..._tokens``."""
    names = [field.name for field in dataclasses.fields(agent)] if dataclasses.is_dataclass(agent) else list[str]()
    values = {name: getattr(agent, name) for name in names if re.fullmatch(r"max_\w+_tokens", name)}
    return {name: value for name, value in values.items() if isinstance(value, int)}


def check_documents(agent: Agent, tasks: Sequence[Task], policy: Policy) -> None:
    """Fail now, not after hours, on documents the agent would refuse.

    Raises:
        DataError: the first such task, and how many there are.
    """
    chunks: Any = getattr(agent, "chunks", None)
    if chunks is None:
        return
    refused: list[DataError] = []
    for task in tasks:
        try:
            chunks(task, policy)
        except DataError as error:
            refused.append(error)
    if refused:
        first = refused[0]
        raise DataError(f"{len(refused)} of {len(tasks)} documents, first {first.what}", first.why, first.fix)

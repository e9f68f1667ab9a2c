"""Supervised warm-up: imitate a teacher's turns, so that reinforcement learning has something to choose from.

The teacher plays the agent's part: it is a policy that writes scripted text, and the rows it leaves are
cut like those of any other episode.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memfactory.agents.base import Agent
from memfactory.agents.running import blocking, episodes_of
from memfactory.environments.base import Environment
from memfactory.episode import Message, StopReason, Task, Turn
from memfactory.errors import RecipeError
from memfactory.recipe import WarmupSection
from memfactory.train.rows import Row, build_rows

Demonstration = Callable[[str, Any], Any]
"""(name of a module, the state it is asked about) -> the result that is right, or that a poor teacher would give."""


class TeachingEnvironment(Environment, Protocol):
    """An environment that can show how its tasks are done."""

    def teacher(self, task: Task, seed: int) -> Iterator[str] | Demonstration:
        """How a teacher does `task`: its texts, turn by turn; or its decisions, which modules then put into words
        (:class:`memfactory.modules.base.Teachable`)."""
        ...


class _TeacherPolicy:
    """A policy that does as a teacher does. Its tokens are made from text: the one place where they are."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, teacher: Iterator[str] | Demonstration, greedy: bool = False
    ) -> None:
        self.tokenizer = tokenizer
        self.teacher = teacher
        self.greedy = greedy

    async def demonstrate(self, module: Any, state: Any) -> Turn:
        if isinstance(self.teacher, Iterator):
            return self._turn(module.render(state), module.name, self._next(self.teacher, module.name))
        if not hasattr(module, "write"):
            raise RecipeError(
                f"warmup: module '{module.name}' cannot be taught",
                f"{type(module).__name__} has no method `write(result) -> str`, the inverse of `parse`",
                "give it one",
            )
        return self._turn(module.render(state), module.name, module.write(self.teacher(module.name, state)))

    async def generate(self, messages: list[Message], *, module: str, max_tokens: int) -> Turn:
        if not isinstance(self.teacher, Iterator):
            raise RecipeError(
                f"warmup: module '{module}' cannot be taught",
                "the agent asks the policy itself, so a teacher does not learn about which state",
                "ask through `memfactory.agents.ask`",
            )
        return self._turn(messages, module, self._next(self.teacher, module))

    @staticmethod
    def _next(script: Iterator[str], module: str) -> str:
        text = next(script, None)
        if text is None:
            raise RecipeError(
                "warmup: the environment's teacher does not fit the agent",
                f"it wrote nothing for the turn of module '{module}'",
                "a teacher yields one text for every turn the agent takes, in their order",
            )
        return text

    def _turn(self, messages: list[Message], module: str, text: str) -> Turn:
        prompt_ids = cast(
            list[int], self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        )
        ids = [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]
        return Turn(module, prompt_ids, ids, [0.0] * len(ids), text, StopReason.STOP, messages)

    def split(self, text: str, max_tokens: int) -> list[str]:
        raise RecipeError("warmup", "teachers read chunks as the environment cuts them", "remove agent.chunk_tokens")


def teacher_rows(
    agent: Agent,
    environment: TeachingEnvironment,
    tasks: Sequence[Task],
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    seed: int,
) -> list[Row]:
    """`count` rows of the teacher on `tasks`, in random order; tasks repeat with other moods of the teacher."""
    rows = blocking(lambda: _taught(agent, environment, tasks, tokenizer, count, seed))
    random.Random(seed).shuffle(rows)
    return rows[:count]


async def _taught(
    agent: Agent,
    environment: TeachingEnvironment,
    tasks: Sequence[Task],
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    seed: int,
) -> list[Row]:
    """At least `count` rows, in order. One event loop for all: to make one takes longer than a short episode."""
    rows: list[Row] = []
    number = 0
    while len(rows) < count:
        task = tasks[number % len(tasks)]
        script = environment.teacher(task, seed * 1_000_003 + number)
        # what draws without a model (a linear reranker) shows good choices and poor ones: each task has both by turns
        greedy = (number + number // len(tasks)) % 2 == 0
        rows += build_rows(await episodes_of(agent, [task], _TeacherPolicy(tokenizer, script, greedy)))
        number += 1
    return rows


def warm_up(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    agent: Agent,
    environment: Environment,
    tasks: Sequence[Task],
    section: WarmupSection,
    seed: int,
    on_step: Callable[[int, float], None],
) -> None:
    """Train `model` in place on teacher traces.

    Muon takes the matrices inside the layers, AdamW embeddings and norms: at this width AdamW alone does
    not get there in the same time.

    Args:
        tasks: training tasks; held-out ones must not be among them.
        on_step: called with (step, mean loss per token) after each step.

    Raises:
        RecipeError: the environment has no teacher.
    """
    if not hasattr(environment, "teacher"):
        raise RecipeError(
            "warmup: the environment has no teacher",
            f"{type(environment).__name__} has no method `teacher(task, seed)`",
            "remove the section warmup:, or use environment.name: fact_words",
        )
    size = section.batch_rows
    rows = teacher_rows(agent, cast(TeachingEnvironment, environment), tasks, tokenizer, section.steps * size, seed)
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inner = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
        (matrices if inner else others).append(parameter)
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [
        (torch.optim.Muon(matrices, lr=section.muon_lr, weight_decay=0.0), section.muon_lr),
        (torch.optim.AdamW(others, lr=section.adam_lr, betas=(0.9, 0.95), weight_decay=0.0), section.adam_lr),
    ]
    was_training = model.training
    model.train()
    for step in range(section.steps):
        scale = _schedule(step, section.steps, section.ramp_steps)
        for optimizer, rate in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
        loss = _imitation_loss(model, rows[step * size : (step + 1) * size], cast(int, tokenizer.pad_token_id))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        on_step(step + 1, loss.item())
    model.train(was_training)


def _imitation_loss(model: PreTrainedModel, rows: Sequence[Row], pad_id: int) -> torch.Tensor:
    """Mean cross-entropy over the teacher's tokens."""
    width = max(row.length for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    keep = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : row.length] = torch.tensor(row.prompt_ids + row.completion_ids)
        keep[i, len(row.prompt_ids) : row.length] = True
    ids, keep = ids.to(model.device), keep.to(model.device)
    # padding stands on the right, where causal attention never looks
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][keep[:, 1:]]  # (N, H)
    return cross_entropy(model.get_output_embeddings()(hidden).float(), ids[keep])


def _schedule(step: int, steps: int, ramp: int) -> float:
    """Linear ramp, then a cosine down to 10 %."""
    if step < ramp:
        return (step + 1) / ramp
    progress = (step - ramp) / max(steps - ramp, 1)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))

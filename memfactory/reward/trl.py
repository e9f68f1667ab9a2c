"""TRL's reward functions, unchanged: ``f(prompts, completions, **columns) -> list[float | None]``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from memfactory.episode import Episode
from memfactory.reward.dimension import RewardDimension, is_async


def is_trl_function(function: Any) -> bool:
    """Whether `function` is written to TRL's contract: it takes `completions`, or their ids alone."""
    try:
        return not {"completions", "completion_ids"}.isdisjoint(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return False


def from_trl(function: Callable[..., Any], name: str) -> RewardDimension:
    """A dimension of a TRL reward function, sync or async. Its range is open, because it declares none."""
    parameters = inspect.signature(function).parameters
    everything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def arguments(episodes: Sequence[Episode]) -> dict[str, Any]:
        given = columns(episodes)
        return given if everything else {key: value for key, value in given.items() if key in parameters}

    if is_async(function):

        async def call_async(episodes: Sequence[Episode], **options: Any) -> Any:
            return await function(**(arguments(episodes) | options))

        adapted: Callable[..., Any] = call_async
    else:

        def call(episodes: Sequence[Episode], **options: Any) -> Any:
            return function(**(arguments(episodes) | options))

        adapted = call
    adapted = wraps(function)(adapted)  # messages name the user's file and line, checkpoints find an object's state
    return RewardDimension(name, adapted, float("-inf"), float("inf"), batched=True)


def columns(episodes: Sequence[Episode]) -> dict[str, Any]:
    """What TRL would pass: prompts and completions of the last turn as chats, and the columns of the dataset.

    Columns are the task's metadata, `question`, `answers` (all accepted ones), `answer` and `solution` (the first of
    them), and `episodes` for functions that want to see more.
    """
    last = [episode.turns[-1] if episode.turns else None for episode in episodes]
    probes = [episode.task.probes[0] if episode.task.probes else None for episode in episodes]
    golds = [list(probe.answers) if probe else [] for probe in probes]
    first = [gold[0] if gold else None for gold in golds]
    given: dict[str, Any] = {
        "question": [probe.question if probe else None for probe in probes],
        "answers": golds,
        "answer": first,
        "solution": first,
    }
    keys = dict.fromkeys(key for episode in episodes for key in episode.task.metadata)
    given |= {key: [episode.task.metadata.get(key) for episode in episodes] for key in keys}
    return given | {
        "prompts": [turn.messages if turn else [] for turn in last],
        "completions": [[{"role": "assistant", "content": turn.text if turn else ""}] for turn in last],
        "completion_ids": [turn.completion_ids if turn else [] for turn in last],
        "episodes": list(episodes),
        "trainer_state": None,
        "log_extra": lambda *_: None,
        "log_metric": lambda *_: None,
    }

"""From a run folder to an agent that can be asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from memfactory.agents import Agent
from memfactory.errors import DataError
from memfactory.policy.base import Sampling
from memfactory.policy.routing import RoutedPolicy
from memfactory.runs import RunFolder
from memfactory.train.prepare import prepare
from memfactory.train.start import load_policy

_UNSCORED = ("rewards=[{name: answer.exact_match}]", "eval.metric=answer.exact_match", "aggregate={}", "judge={}")
"""Nothing is scored here: a run's own rewards, and the keys of its judge, need not be on this machine."""
_WRITTEN = ("record_memory", "record_final_memory")
"""Options of an agent over a bank that write all of it as text."""


@dataclass(frozen=True, slots=True)
class Served:
    """A trained agent with its model."""

    name: str
    """The recipe's."""
    agent: Agent
    policy: RoutedPolicy
    checkpoint: Path
    sampling: Sampling
    """As the recipe evaluates: where a request does not say how to draw."""

    @property
    def keeps_bank(self) -> bool:
        """Whether it remembers entries in a bank, which it can restore; else it keeps one text."""
        return hasattr(self.agent, "restore")

    @property
    def answering(self) -> str:
        """Name of the module that answers."""
        modules = getattr(self.agent, "modules", ())
        return str(modules[-1].name) if modules else "answer"


def open_run(path: Path, checkpoint: Path | None = None, overrides: Sequence[str] = ()) -> Served:
    """The agent that was trained in the run folder `path`.

    Turns are sampled in this process, whatever sampled them in training, unless `overrides` name another
    `rollout.engine`.

    Args:
        checkpoint: the weights; absent ``model`` in the run folder, or else its newest checkpoint.
        overrides: ``key=value`` entries that change the run's recipe.

    Raises:
        DataError: `path` is no run folder, or holds no weights.
        RecipeErrors: the recipe cannot be used here.
        EngineError: the weights cannot be read.
    """
    disable_progress_bar()  # of the weights' reading, which would stand above all that is said
    run = RunFolder(path)
    run.read_recipe()  # says what is wrong where it is none
    weights = checkpoint or trained_weights(run)
    changes = [*_UNSCORED, "rollout.engine=transformers", *overrides]
    prepared = prepare(run.recipe_file, changes, splits=())
    # the whole bank as text on every turn and at the end, for reports: its time grows with what a user has told
    told = {option.partition("=")[0] for option in overrides}
    written = [name for name in _WRITTEN if hasattr(prepared.agent, name) and f"agent.{name}" not in told]
    if written:
        prepared = prepare(run.recipe_file, [*changes, *(f"agent.{name}=false" for name in written)], splits=())
    section = prepared.recipe.eval
    return Served(
        prepared.recipe.name,
        prepared.agent,
        load_policy(prepared, weights),
        weights,
        Sampling(section.temperature, section.top_p),
    )


def trained_weights(run: RunFolder) -> Path:
    """``model``, which a finished run leaves, or else the newest checkpoint.

    Raises:
        DataError: there is neither.
    """
    model = run.path / "model"
    if (model / "config.json").is_file() or (model / "adapter_config.json").is_file():
        return model
    newest = run.latest_checkpoint()
    if newest is None:
        raise DataError(
            f"{run.path} holds no trained model",
            "there is neither model/ nor a whole checkpoint in it",
            f"memfactory train {run.recipe_file}, or --checkpoint PATH",
        )
    return newest

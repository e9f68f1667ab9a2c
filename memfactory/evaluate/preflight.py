"""What can be known before a model is loaded: do the documents go with the agent, and its prompts into the model?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memfactory.agents.base import Agent, Longest
from memfactory.errors import DataError, EngineError, RecipeError
from memfactory.evaluate.candidates import Candidate
from memfactory.evaluate.failures import too_many
from memfactory.evaluate.rows import Measured
from memfactory.policy.models import locate
from memfactory.policy.rendering import pieces, prompt_of
from memfactory.recipe import Recipe


class _Cutter:
    """As much of a policy as cutting a document needs."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def split(self, text: str, max_tokens: int) -> list[str]:
        return pieces(self.tokenizer, text, max_tokens)


def positions(recipe: Recipe, candidates: Sequence[Candidate]) -> int | None:
    """Tokens that prompt and completion may have together, in the smallest of the models; None where none says."""
    from transformers import AutoConfig

    if recipe.rollout.served and recipe.rollout.vllm.max_model_len is not None:
        return recipe.rollout.vllm.max_model_len
    places = [
        str(one.checkpoint) for one in candidates if one.checkpoint and (one.checkpoint / "config.json").is_file()
    ]
    if recipe.model.name is not None:
        try:
            source, gguf = locate(recipe.model.name)
        except RecipeError:
            source, gguf = "", "unknown"
        if not gguf and recipe.model.gguf_file is None:
            places.append(source)
    limits = []
    for place in dict.fromkeys(places):
        try:
            config = AutoConfig.from_pretrained(place, trust_remote_code=recipe.model.trust_remote_code)
        except (OSError, ValueError):  # loading the model will say what is wrong
            continue
        limit = getattr(config, "max_position_embeddings", None)
        limits += [limit] if isinstance(limit, int) else []
    return min(limits, default=None)


def check_context(
    agent: Agent, suites: Sequence[Measured], tokenizer: Any, limit: int | None, max_failed_share: float
) -> list[str]:
    """Fail now, not after hours, on documents that the agent refuses or prompts that the model does not take.

    Args:
        limit: see :func:`positions`.
        max_failed_share: of a suite's tasks that may be refused; they are then counted as failed.

    Returns:
        notes on suites some of whose tasks will fail, or may.

    Raises:
        DataError: more of them are refused.
        EngineError: the longest prompt of a turn does not fit the model, see the agent's `longest`.
    """
    notes = []
    cutter: Any = _Cutter(tokenizer)
    chunks: Any = getattr(agent, "chunks", None)
    prompts: Any = getattr(agent, "longest", None)
    for suite in suites:
        refused: list[DataError] = []
        longest: dict[str, Longest] = {}
        for task in suite.tasks if chunks is not None else ():
            try:
                cut = chunks(task, cutter)
            except DataError as error:
                refused.append(error)
                continue
            for prompt in prompts(task, cut) if prompts is not None and limit is not None else ():
                if prompt.what not in longest or _length(prompt) > _length(longest[prompt.what]):
                    longest[prompt.what] = prompt
        if refused:
            first = refused[0]
            what = f"{suite.name}: {len(refused)} of {len(suite.tasks)} tasks are refused, first {first.what}"
            if too_many(len(refused), len(suite.tasks), max_failed_share):
                raise DataError(what, first.why, first.fix)
            notes.append(f"{what}: {first.why}")
        if limit is not None:
            for prompt in longest.values():
                notes += _check_fits(prompt, suite.name, tokenizer, limit)
    return notes


def _length(prompt: Longest) -> int:
    return sum(len(message["content"]) for message in prompt.messages)


def _check_fits(prompt: Longest, suite: str, tokenizer: Any, limit: int) -> list[str]:
    """Fail where `prompt` cannot fit, or is likely not to; a note where only many long replies can bring it there."""
    given = len(prompt_of(tokenizer, prompt.messages, prompt.module, {}))
    needed = given + prompt.written + prompt.reply
    if needed <= limit:
        return []
    if prompt.likely or given + prompt.reply > limit:
        raise EngineError(
            f"{suite}: {prompt.what} does not fit the model",
            f"{given} tokens of what is given, up to {prompt.written} of what was written before and {prompt.reply} "
            f"new ones are {needed}, of {limit} positions",
            prompt.fix,
        )
    why = f"{given} tokens, {prompt.reply} new ones and up to {prompt.written} of entries, of {limit} positions"
    return [f"{suite}: {prompt.what} may come to be too long for the model: {why}; {prompt.fix}"]

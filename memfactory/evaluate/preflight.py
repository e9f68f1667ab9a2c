"""What can be known before a model is loaded: do the documents go with the agent, and its prompts into the model?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memfactory.agents.base import Agent
from memfactory.agents.memagent import MemAgent
from memfactory.errors import DataError, EngineError, RecipeError
from memfactory.evaluate.candidates import Candidate
from memfactory.evaluate.failures import too_many
from memfactory.evaluate.rows import Measured
from memfactory.modules import WriteState
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
        notes on suites some of whose tasks will fail.

    Raises:
        DataError: more of them are refused.
        EngineError: a writing turn cannot fit the model.
    """
    notes = []
    cutter: Any = _Cutter(tokenizer)
    chunks: Any = getattr(agent, "chunks", None)
    for suite in suites:
        refused: list[DataError] = []
        longest: tuple[int, str, str] = (0, "", "")
        for task in suite.tasks if chunks is not None else ():
            try:
                cut = chunks(task, cutter)
            except DataError as error:
                refused.append(error)
                continue
            most = max(cut, key=len, default="")
            longest = max(longest, (len(most), "\n".join(probe.question for probe in task.probes), most))
        if refused:
            first = refused[0]
            what = f"{suite.name}: {len(refused)} of {len(suite.tasks)} tasks are refused, first {first.what}"
            if too_many(len(refused), len(suite.tasks), max_failed_share):
                raise DataError(what, first.why, first.fix)
            notes.append(f"{what}: {first.why}")
        if isinstance(agent, MemAgent) and limit is not None and longest[0]:
            _check_write(agent, suite.name, longest[1], longest[2], tokenizer, limit)
    return notes


def _check_write(agent: MemAgent, suite: str, question: str, chunk: str, tokenizer: Any, limit: int) -> None:
    messages = agent.writer.render(WriteState(question, chunk, ""))
    prompt = len(prompt_of(tokenizer, messages, agent.writer.name, {}))
    needed = prompt + 2 * agent.max_memory_tokens
    if needed > limit:
        raise EngineError(
            f"{suite}: a turn that reads does not fit the model",
            f"{prompt} tokens of question and chunk, {agent.max_memory_tokens} of memory and as many new ones are "
            f"{needed}, of {limit} positions",
            "use smaller chunks (agent.chunk_tokens) or a shorter memory (agent.max_memory_tokens)",
        )

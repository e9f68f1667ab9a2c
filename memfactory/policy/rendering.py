"""From messages to token ids, and from a text to pieces: the same for every engine that samples for the trainer."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from memfactory.episode import Message
from memfactory.errors import EngineError, TooLongError, boundary


def prompt_of(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], module: str, options: Mapping[str, Any]
) -> list[int]:
    """Token ids of `messages` in the chat template, up to where the answer begins.

    Raises:
        EngineError: the template cannot render them.
    """
    with boundary(EngineError, f"the chat template cannot render the prompt of module '{module}'"):
        return cast(
            list[int],
            tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False, **options),
        )


def digest(prompt_ids: Sequence[int]) -> bytes:
    """A prompt in 32 bytes."""
    return sha256(array("q", prompt_ids).tobytes()).digest()


def check_fits(prompt: int, max_tokens: int, limit: int | None, module: str) -> None:
    """Fail now where a turn cannot fit.

    Args:
        prompt: tokens of the prompt.
        limit: positions of the model or of its server; None where that is not known.

    Raises:
        TooLongError: it does not fit.
    """
    if limit is not None and prompt + max_tokens > limit:
        raise TooLongError(
            f"a prompt of module '{module}' does not fit the model",
            f"{prompt} prompt tokens + {max_tokens} new ones > {limit} positions",
            "use smaller chunks (agent.chunk_tokens) or a shorter memory (agent.max_memory_tokens)",
        )


def pieces(tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int) -> list[str]:
    """See :meth:`memfactory.policy.base.Policy.split`. Pieces joined give `text` back."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    starts = [offsets[index][0] for index in range(0, len(offsets), max_tokens)]
    if not starts:
        return []
    starts[0] = 0
    # a token of a byte-level tokenizer can begin inside a character: then its piece begins with it
    return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True) if a < b]

"""Reading model output. It is data: parsed, never evaluated, and nothing it says can raise here
except :class:`ModelOutputError`."""

from __future__ import annotations

from memfactory.errors import ModelOutputError

_OPEN, _CLOSE = "<think>", "</think>"


def strip_reasoning(text: str) -> str:
    """The text after the last reasoning block, without surrounding white space.

    Chat templates may put the opening tag into the prompt, so a closing tag alone also counts.

    Raises:
        ModelOutputError: the last block is never closed.
    """
    end = text.rfind(_CLOSE)
    if text.find(_OPEN, end + 1 if end >= 0 else 0) >= 0:
        raise ModelOutputError(
            "the reply has no text after its reasoning",
            f"{_OPEN} is never closed",
            "raise the turn's token limit or turn the model's thinking mode off",
        )
    return (text[end + len(_CLOSE) :] if end >= 0 else text).strip()


def last_boxed(text: str, *, window: int | None = 300) -> str | None:
    r"""Content of the last ``\boxed{...}`` (or ``\fbox{...}``), braces balanced; None if there is none.

    Args:
        text: model output.
        window: look only at that many last characters, as MemAgent's verifier does (300); None for all.

    Linear in ``len(text)``, so 100 kB of braces cost nothing.
    """
    tail = text if window is None else text[-window:]
    start = max(tail.rfind("\\boxed{"), tail.rfind("\\fbox{"))
    if start < 0:
        return None
    begin = tail.index("{", start) + 1
    depth = 1
    for position in range(begin, len(tail)):
        depth += {"{": 1, "}": -1}.get(tail[position], 0)
        if depth == 0:
            return tail[begin:position].strip()
    return None

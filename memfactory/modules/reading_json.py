"""JSON in model output: found wherever it stands in the reply, and never trusted."""

from __future__ import annotations

import json
from typing import Any

from memfactory.errors import ModelOutputError
from memfactory.modules.parsing import strip_reasoning

_DECODER = json.JSONDecoder()
_TRIES = 64
"""Opening brackets that are tried as the beginning: a text of brackets alone must not take quadratic time."""
_READ = 4
"""How many times the length of a long reply may be read in vain, all tries together."""


def find_json(text: str) -> Any:
    """The first JSON array or object in the reply behind its reasoning; around it may stand prose or a code fence.

    An array of nothing but numbers counts only where nothing else stands: in prose it is a citation, ``[1]``.

    Raises:
        ModelOutputError: there is none.
    """
    reply = strip_reasoning(text)
    position, problem = -1, "it holds neither [ nor {"
    left = _READ * max(len(reply), 10_000)
    numbers: list[Any] | None = None
    for _ in range(_TRIES):
        starts = [place for mark in "[{" if (place := reply.find(mark, position + 1)) >= 0]
        if not starts:
            break
        position = min(starts)
        try:
            found, end = _DECODER.raw_decode(reply, position)
        except (ValueError, RecursionError) as error:  # also a number of more digits than Python reads
            problem = str(error)[:80]
            left -= getattr(error, "pos", len(reply)) - position
            if left < 0:
                break
            continue
        if not (found and isinstance(found, list) and all(isinstance(item, int | float) for item in found)):
            return found
        numbers, position = numbers or found, end - 1
    if numbers is not None:
        return numbers
    raise ModelOutputError("the reply holds no JSON", problem)


def json_items(text: str, *keys: str) -> list[Any]:
    """The items of the list that a reply holds, alone or under one of `keys` of an object.

    An object with none of `keys` is one item.

    Raises:
        ModelOutputError: there is no JSON, or something else stands under the key.
    """
    found = find_json(text)
    if isinstance(found, dict):
        found = next((found[key] for key in keys if key in found), [found])
    if not isinstance(found, list):
        raise ModelOutputError("the reply holds no list", f"a {type(found).__name__} stands there")
    return found


def text_of(item: dict[str, Any], *names: str) -> str:
    """The text under the first of `names` that `item` has, as `sound` text; empty where there is none.

    Raises:
        TypeError: it is neither text nor null.
    """
    value = next((item[name] for name in names if item.get(name) is not None), "")
    if not isinstance(value, str):
        raise TypeError(f"{names[0]} is a {type(value).__name__}, not text")
    return sound(value).strip()


def sound(text: str) -> str:
    """`text` as it can be written down and tokenised: halves of a character, as the escape ``\\ud83d`` alone makes
    them, are replaced."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

"""Rewards on form: could the output be read, did every turn end by itself."""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonschema.exceptions import SchemaError
from jsonschema.validators import validator_for
from referencing import Registry

from memfactory import Episode, ModelOutputError, RecipeError, Score, StopReason, Turn, reward
from memfactory.modules import strip_reasoning

Value = float | Score


@reward
def answered(episode: Episode) -> Value:
    """Share of questions with an extractable answer (a closed box where the recipe asks for one), in [0, 1].

    Gaming: any answer will do. Only a gate, or a small part of a reward.
    """
    return _share([answer.text is not None for answer in episode.answers], "answers no question")


@reward
def stopped(episode: Episode) -> Value:
    """Share of turns that ended by themselves and not at the token limit, in [0, 1].

    Gaming: very short turns. Use it beside a reward on what the turns say.
    """
    return _share([turn.stop is StopReason.STOP for turn in episode.turns], "has no turn")


@reward(role="gate")
def json_schema(episode: Episode, *, schema: dict[str, Any] | str = "") -> Value:
    """Share of questions whose reply, behind its reasoning, is JSON that fits `schema`, in [0, 1].

    `schema` is a JSON Schema or the path of a file that holds one; absent: any JSON. The reply must be JSON and
    nothing else, without a code fence; NaN and Infinity are no JSON. References to other files or sites are not
    followed. Source: JSON Schema, draft 2020-12 unless the schema names another.
    Gaming: the emptiest value that fits. State `required`, `minLength` and `minItems` in the schema.
    """
    fits = _of_file(schema) if isinstance(schema, str) else _of_text(json.dumps(schema))
    return _share([_is_json(_reply(answer.raw), fits) for answer in episode.answers], "answers no question")


@reward(role="gate")
def tags(episode: Episode, *, tags: tuple[str, ...] = ("think", "answer")) -> Value:
    """Share of questions whose reply opens and closes each tag exactly once, in the order of the list, in [0, 1].

    A tag ``answer/quote`` belongs inside ``answer``; tags of one level stand one after another. So ``[think, answer,
    answer/quote]`` asks for ``<think>..</think> <answer>..<quote>..</quote>..</answer>``. Other tags and any text
    between are ignored. The whole reply is read, reasoning included; do not list a tag that the prompt opens.
    Gaming: empty tags. Put a reward on what stands in them beside it.
    """
    wanted = _sequence(tags)
    if len(wanted) != 2 * len(tags):
        raise RecipeError(f"format.tags, tags {list(tags)}", "one is inside a tag that is not listed", "list both")
    names = "|".join(re.escape(tag.rpartition("/")[2]) for tag in tags)
    pattern = re.compile(f"</?(?:{names})>")
    return _share([pattern.findall(answer.raw) == wanted for answer in episode.answers], "answers no question")


@reward(scope="turn")
def operations_valid(episode: Episode, turn: Turn) -> float:
    """0 if the module could not use the turn's text, else the share of its memory operations that were carried out, in
    [0, 1]; 1 for a turn that asks for none.

    Source: the tool-call success rate of Mem-alpha (arXiv 2509.25911), per turn.
    Gaming: ask for nothing, or add operations that cannot fail. Put a reward on what the memory holds beside it.
    """
    if turn.error or not turn.operations:
        return float(not turn.error)
    return sum(not operation.error for operation in turn.operations) / len(turn.operations)


def _share(flags: list[bool], nothing: str) -> Value:
    return sum(flags) / len(flags) if flags else Score(None, f"the episode {nothing}")


def _reply(raw: str) -> str:
    try:
        return strip_reasoning(raw)
    except ModelOutputError:  # reasoning without an end
        return ""


def _is_json(text: str, fits: Callable[[Any], bool]) -> bool:
    try:
        return fits(json.loads(text, parse_constant=_refuse))
    except (ValueError, RecursionError):  # RecursionError: brackets nested thousands deep
        return False


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


@functools.cache
def _of_text(schema: str) -> Callable[[Any], bool]:
    return _make_validator(json.loads(schema), "the schema")


@functools.cache
def _of_file(path: str) -> Callable[[Any], bool]:
    if not path:
        return lambda value: True
    try:
        schema = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"format.json_schema, schema {path}", str(error), "give a readable JSON file") from error
    return _make_validator(schema, path)


def _make_validator(schema: Any, where: str) -> Callable[[Any], bool]:
    kind = validator_for(schema)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise RecipeError(f"format.json_schema, {where}", error.message, "correct the schema") from error
    is_valid: Callable[[Any], bool] = kind(schema, registry=Registry()).is_valid  # an empty registry fetches nothing
    return is_valid


def _sequence(tags: tuple[str, ...], parent: str = "") -> list[str]:
    """The tags of one reply in order: ``["<a>", "<b>", "</b>", "</a>"]`` for ``("a", "a/b")``."""
    found: list[str] = []
    for tag in tags:
        above, _, name = tag.rpartition("/")
        if above == parent:
            found += [f"<{name}>", *_sequence(tags, tag), f"</{name}>"]
    return found

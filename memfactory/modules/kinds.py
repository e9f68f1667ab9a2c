"""Modules by the names recipes use: for each role in an agent, the kinds that can play it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memfactory.errors import RecipeError
from memfactory.plugins import construct, resolve
from memfactory.recipe import nearest

KINDS: dict[str, dict[str, str]] = {
    "extract": {
        "lines": "memfactory.modules.facts:LineExtractor",
        "chunk": "memfactory.modules.facts:ChunkExtractor",
        "facts": "memfactory.modules.facts:FactExtractor",
        "topics": "memfactory.modules.facts:TopicExtractor",
    },
    "update": {
        "crud": "memfactory.modules.updates:CrudUpdater",
        "events": "memfactory.modules.updates:EventUpdater",
        "merge": "memfactory.modules.updates:MergeUpdater",
        "words": "memfactory.modules.updates:WordUpdater",
        "add": "memfactory.modules.updates:AddAll",
    },
    "retrieve": {"search": "memfactory.modules.retrieve:Retriever"},
    "rerank": {
        "model": "memfactory.modules.rerank:ModelReranker",
        "linear": "memfactory.modules.linear_reranker:LinearReranker",
    },
    "answer": {
        "distill": "memfactory.modules.entry_answer:DistilledAnswer",
        "cite": "memfactory.modules.entry_answer:CitedAnswer",
        "direct": "memfactory.modules.entry_answer:DirectAnswer",
        "words": "memfactory.modules.entry_answer:WordAnswer",
    },
}
"""By role: name in recipes, and the class behind it. ``pkg.module:Class`` and ``path/file.py:Class`` work too."""


def build_module(role: str, options: Mapping[str, Any]) -> Any:
    """The module that `options` describe: ``kind`` and the fields of its class.

    Raises:
        RecipeError: no kind is named, or there is none of that name.
        RecipeErrors: its options are wrong; all of them are listed.
    """
    known = KINDS[role]
    values = dict(options)
    kind = values.pop("kind", None)
    if not isinstance(kind, str):
        raise RecipeError(f"agent.{role}.kind: missing", "", f"one of {', '.join(known)}, or pkg.module:Class")
    if ":" not in kind and kind not in known:
        raise RecipeError(f"agent.{role}.kind: there is no '{kind}'", "", nearest(kind, list(known)))
    return construct(resolve(known.get(kind, kind)), values, f"agent.{role}")

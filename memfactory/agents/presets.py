"""Memory-R1 and RMM: the bank agent with the modules and defaults of their papers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from memfactory.agents.bank_agent import BankAgent, Options


def _with(options: Mapping[str, Any] | None, defaults: dict[str, Any]) -> dict[str, Any]:
    """`options` over `defaults`; those of another kind than the default's stand alone."""
    if options is None:
        return dict(defaults)
    if options.get("kind", defaults["kind"]) != defaults["kind"]:
        return dict(options)
    return defaults | dict(options)


@dataclass(frozen=True)
class MemoryR1(BankAgent):
    """Memory-R1 (arXiv 2508.19828): a manager keeps the bank by events, an answerer distils 60 entries and answers.

    The paper trains the two apart: the manager (`update`) against a frozen answerer, then the answerer against banks
    that a frozen manager keeps. Which is trained, and what the others are, stands in the recipe's `modules:`. Options
    of a module that name no other kind go over the paper's.
    """

    extract: Options = field(default_factory=dict)
    update: Options = field(default_factory=dict)
    retrieve: Options = field(default_factory=dict)
    answer: Options = field(default_factory=dict)
    max_update_tokens: int = 2048
    """Responses of up to 2048 tokens, as in the paper."""

    def __post_init__(self) -> None:
        _preset(
            self,
            extract={"kind": "facts"},
            update={"kind": "events"},
            retrieve={"kind": "search", "k": 60, "per_speaker": True, "related": 10},
            answer={"kind": "distill"},
        )
        super().__post_init__()


@dataclass(frozen=True)
class RMM(BankAgent):
    """RMM (arXiv 2503.08026): topics are added or merged after each session, a linear reranker learns from citations.

    20 entries are retrieved by meaning (K), the reranker draws 5 (M), the reply cites what it used, and each drawn
    entry is worth +1 if cited and -1 if not. The language model is not trained.
    """

    extract: Options = field(default_factory=dict)
    update: Options = field(default_factory=dict)
    retrieve: Options = field(default_factory=dict)
    rerank: Options | None = field(default_factory=dict)
    answer: Options = field(default_factory=dict)

    def __post_init__(self) -> None:
        _preset(
            self,
            extract={"kind": "topics"},
            update={"kind": "merge"},
            retrieve={"kind": "search", "k": 20, "related": 5, "search": {"name": "dense"}},
            rerank={"kind": "linear", "m": 5},
            answer={"kind": "cite"},
        )
        super().__post_init__()


@dataclass(frozen=True)
class RMMGRPO(RMM):
    """RMM with a language model as the reranker, trained by GRPO: a variant of ours, not the paper's method."""

    def __post_init__(self) -> None:
        _preset(self, rerank={"kind": "model", "m": 5})
        super().__post_init__()


def _preset(agent: BankAgent, **defaults: dict[str, Any]) -> None:
    for role, values in defaults.items():
        object.__setattr__(agent, role, _with(getattr(agent, role) or None, values))

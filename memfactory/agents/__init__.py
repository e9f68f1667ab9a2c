"""Agents: ordinary async code that composes modules."""

from __future__ import annotations

from typing import Any

from memfactory.agents.asking import ask
from memfactory.agents.bank_agent import BankAgent
from memfactory.agents.base import Agent
from memfactory.agents.memagent import MemAgent, Overflow
from memfactory.agents.presets import RMM, RMMGRPO, MemoryR1
from memfactory.errors import RecipeError
from memfactory.plugins import construct, resolve
from memfactory.recipe import nearest

AGENTS: dict[str, type] = {
    "memagent": MemAgent,
    "compose": BankAgent,
    "memory_r1": MemoryR1,
    "rmm": RMM,
    "rmm_grpo": RMMGRPO,
}
"""Shipped agents by the name recipes use."""


def build_agent(name: str, options: dict[str, Any]) -> Agent:
    """The agent a recipe names, with its options.

    Raises:
        RecipeError: no such agent, or wrong options (all of them in one message).
    """
    if name in AGENTS:
        return construct(AGENTS[name], options, "agent")
    if ":" in name:
        return construct(resolve(name), options, "agent")
    raise RecipeError(f"agent.name: no agent is called '{name}'", "", nearest(name, [*AGENTS]))


__all__ = [
    "AGENTS",
    "RMM",
    "RMMGRPO",
    "Agent",
    "BankAgent",
    "MemAgent",
    "MemoryR1",
    "Overflow",
    "ask",
    "build_agent",
]

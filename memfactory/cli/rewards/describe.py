"""How the commands speak about a reward: range, place, and its line in a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from memfactory.reward.dimension import RewardDimension


def spoken_range(dimension: RewardDimension) -> str:
    """``[0, 1]``, or ``open``."""
    if dimension.low == float("-inf") and dimension.high == float("inf"):
        return "open"
    return f"[{dimension.low:g}, {dimension.high:g}]"


def spoken_scope(dimension: RewardDimension) -> str:
    """``episode``, or ``module write``."""
    return f"module {', '.join(dimension.modules)}" if dimension.modules else str(dimension.scope)


def short_path(text: str | Path) -> str:
    """A path as one types it: relative where it lies below the working folder."""
    try:
        return str(Path(text).relative_to(Path.cwd()))
    except ValueError:
        return str(text)


def in_recipe(name: str, dimension: RewardDimension, *, options: bool = False) -> str:
    """The lines that put it into a recipe, with its options at their defaults if asked for."""
    more = ""
    if options and dimension.options:
        values = {key: None if p.default is p.empty else p.default for key, p in dimension.options.items()}
        more = ", options: " + yaml.safe_dump(_as_yaml(values), default_flow_style=True, width=1000).strip()
    if spoken_range(dimension) == "open":
        more += ", transform: {name: clip, low: 0, high: 1}"
    return f"rewards:\n  - {{name: {_quoted(name)}, weight: 1.0{more}}}"


def _as_yaml(value: Any) -> Any:
    """`value` of a default as YAML can hold it."""
    if isinstance(value, dict):
        return {str(key): _as_yaml(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_as_yaml(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _quoted(name: str) -> str:
    return f'"{name}"' if ":" in name else name

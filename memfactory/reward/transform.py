"""Transforms: what is done to one dimension's scores before they are aggregated.

A transform maps scores (N,) to scores (N,), element by element, keeps NaN, and says what range it maps to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from memfactory.errors import RecipeError
from memfactory.plugins import construct, resolve
from memfactory.recipe import nearest
from memfactory.reward.table import Floats


@runtime_checkable
class Transform(Protocol):
    """Scores of one dimension -> scores of it. With state, it has ``state_dict`` and ``load_state_dict``."""

    def __call__(self, values: Floats, low: float, high: float) -> Floats:
        """Transformed `values` (N,) of a dimension with declared range [low, high]; NaN stays NaN."""
        ...

    def bounds(self, low: float, high: float) -> tuple[float, float]:
        """The range it maps [low, high] to."""
        ...


@dataclass(frozen=True)
class Unit:
    """(x - low) / (high - low): the declared range to [0, 1]."""

    def __call__(self, values: Floats, low: float, high: float) -> Floats:
        return (values - low) / (high - low)

    def bounds(self, low: float, high: float) -> tuple[float, float]:
        if not (math.isfinite(low) and math.isfinite(high)):
            raise RecipeError(
                "transform 'unit'", f"the range [{low}, {high}] is not finite", "give `low:` and `high:`"
            )
        return 0.0, 1.0


@dataclass(frozen=True)
class Clip:
    """min(max((x - offset) / scale, low), high), the usual way to tame an open range."""

    low: float = 0.0
    high: float = 1.0
    offset: float = 0.0
    scale: float = 1.0

    def __call__(self, values: Floats, low: float, high: float) -> Floats:
        return np.clip((values - self.offset) / self.scale, self.low, self.high)

    def bounds(self, low: float, high: float) -> tuple[float, float]:
        return self.low, self.high


@dataclass(frozen=True)
class Tiers:
    """Number of `edges` that x reaches, over their number: differences inside a tier are noise."""

    edges: tuple[float, ...]

    def __call__(self, values: Floats, low: float, high: float) -> Floats:
        reached = (values[:, None] >= np.array(self.edges)).mean(axis=1)
        return np.where(np.isnan(values), np.nan, reached)

    def bounds(self, low: float, high: float) -> tuple[float, float]:
        return 0.0, 1.0


TRANSFORMS: dict[str, Any] = {"unit": Unit, "clip": Clip, "tiers": Tiers}


def build_transform(section: str | dict[str, Any], where: str) -> Transform:
    """The transform a recipe names.

    Raises:
        RecipeError: there is none of that name, or its options are wrong.
    """
    options = dict(section) if isinstance(section, dict) else {"name": section}
    name = str(options.pop("name", ""))
    if ":" not in name and name not in TRANSFORMS:
        raise RecipeError(f"{where}.transform: '{name}'", "", nearest(name, list(TRANSFORMS)))
    build = resolve(name) if ":" in name else TRANSFORMS[name]
    transform: Transform = construct(build, options, f"{where}.transform")
    return transform

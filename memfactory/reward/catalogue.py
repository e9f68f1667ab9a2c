"""Finding rewards: by the name a recipe gives, and all there are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from memfactory.errors import MemFactoryError, RecipeError, RecipeErrors, attempt
from memfactory.plugins import load_file, resolve, shipped
from memfactory.recipe import RewardSection, nearest
from memfactory.reward.dimension import DEADLINE, Missing, RewardDimension, Role
from memfactory.reward.table import Column, Floats
from memfactory.reward.transform import Transform, build_transform
from memfactory.reward.trl import from_trl, is_trl_function


@dataclass(frozen=True)
class WeightedDimension:
    """A dimension as the recipe uses it: under its name there, with weight, threshold, stage and transform."""

    name: str
    dimension: RewardDimension
    weight: float = 1.0
    threshold: float = 0.5
    stage: str = ""
    transform: Transform | None = None

    @property
    def column(self) -> Column:
        """What the aggregator may know about it."""
        own = self.dimension
        low, high = self.transform.bounds(own.low, own.high) if self.transform else (own.low, own.high)
        return Column(self.name, own.role, self.weight, low, high, own.missing, self.threshold, own.noise, self.stage)

    def transformed(self, values: Floats) -> Floats:
        """Scores under the transform, if there is one. NaN stays NaN."""
        return values if self.transform is None else self.transform(values, self.dimension.low, self.dimension.high)


def folders() -> list[Path]:
    """Where reward files are looked for: the user's `rewards/` first, then the shipped ones."""
    return [Path.cwd() / "rewards", shipped("rewards")]


def load_dimension(name: str) -> RewardDimension:
    """The dimension called `name` in a recipe. A plain function ``episode -> value`` becomes one with range [0, 1], a
    TRL reward function one with an open range.

    Raises:
        RecipeError: it cannot be found; the message says where it was looked for and what is near.
    """
    found = resolve(name) if ":" in name else find(name)
    if isinstance(found, RewardDimension):
        return found
    if not callable(found):
        raise RecipeError(f"reward '{name}'", f"it is a {type(found).__name__}, not a function", "name a function")
    short = name.rpartition(":")[2].rpartition(".")[2]
    return from_trl(found, short) if is_trl_function(found) else RewardDimension(short, found)


def find(name: str) -> Any:
    """The object called ``file.name`` in the folders, a reward or anything else that lies beside rewards.

    Raises:
        RecipeError: see :func:`load_dimension`.
    """
    file, _, attribute = name.rpartition(".")
    roots = list(dict.fromkeys(folders()))
    for root in roots:
        path = root / f"{file.replace('.', '/')}.py"
        if file and path.is_file():
            module = load_file(path)
            if hasattr(module, attribute):
                return getattr(module, attribute)
            own = [key for key, value in vars(module).items() if isinstance(value, RewardDimension)]
            raise RecipeError(f"reward '{name}'", f"{path} has no '{attribute}'", nearest(attribute, own))
    known = [entry.name for entry in available()]
    looked = " and ".join(str(root) for root in roots)
    inside = [other for other in known if other.rpartition(".")[0] == name]
    if inside:
        raise RecipeError(f"reward '{name}'", "that is a file", f"name a function in it: {', '.join(inside)}")
    raise RecipeError(f"reward '{name}'", f"there is no such file in {looked}", nearest(name, known))


@dataclass(frozen=True)
class Entry:
    """A reward that exists."""

    name: str
    path: Path
    dimension: RewardDimension


def available() -> Iterator[Entry]:
    """Every decorated reward in the folders; where the user's file shadows a shipped one, the user's alone.

    A file that cannot be imported is left out here; naming it says why.
    """
    seen: set[str] = set()
    for root in dict.fromkeys(folders()):
        for path in sorted(root.rglob("*.py")) if root.is_dir() else []:
            file = ".".join(path.relative_to(root).with_suffix("").parts)
            if file in seen or path.name.startswith("_"):
                continue
            seen.add(file)
            try:
                module = load_file(path)
            except RecipeError:
                continue
            for key, value in vars(module).items():
                if isinstance(value, RewardDimension) and not key.startswith("_"):
                    yield Entry(f"{file}.{key}", path, value)


def build_dimensions(sections: Iterable[RewardSection]) -> list[WeightedDimension]:
    """The recipe's `rewards:`, resolved.

    Raises:
        RecipeErrors: names, options or roles are wrong, or two entries have the same name; all together.
    """
    errors: list[MemFactoryError] = []
    attempts = [attempt(partial(build_dimension, section), errors) for section in sections]
    made = [weighted for weighted in attempts if weighted is not None]
    names = [weighted.name for weighted in made]
    for name in sorted({name for name in names if names.count(name) > 1}):
        fix = "give it one entry with one weight, or a `label:` of its own to each"
        errors.append(RecipeError(f"rewards: '{name}' stands there twice", "", fix))
    if errors:
        raise RecipeErrors("rewards", errors)
    return made


def build_dimension(section: RewardSection) -> WeightedDimension:
    """One entry of the recipe's `rewards:`.

    Raises:
        RecipeError: see :func:`build_dimensions`.
    """
    name = section.label or section.name
    where = f"rewards.{name}"
    dimension = load_dimension(section.name).bind(section.options)
    changes: dict[str, Any] = {
        "role": Role(section.role) if section.role else None,
        "missing": Missing(section.missing) if section.missing else None,
        "low": section.low,
        "high": section.high,
    }
    dimension = replace(dimension, **{key: value for key, value in changes.items() if value is not None})
    if section.deadline is not None:
        dimension = replace(dimension, deadline=section.deadline or None)
    elif "judge" in dimension.wants and dimension.deadline == DEADLINE:
        dimension = replace(dimension, deadline=None)  # the judge has one of its own, which begins when its turn comes
    if not dimension.low < dimension.high:
        raise RecipeError(f"{where}: low {dimension.low:g} is not below high {dimension.high:g}")
    if dimension.role is Role.SHAPING and not dimension.per_turn:
        raise RecipeError(
            f"{where}: a potential needs scope turn",
            f"its scope is {dimension.scope}, and over an episode a potential's differences cancel out",
            "declare @reward(scope='turn', role='shaping') on a function of (episode, turn)",
        )
    transform = build_transform(section.transform, where) if section.transform is not None else None
    weighted = WeightedDimension(name, dimension, section.weight, section.threshold, section.stage or "", transform)
    _ = weighted.column  # a transform refuses a range here, not in the middle of a run
    return weighted

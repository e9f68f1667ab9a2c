"""Files that are called by name: those of the working folder first, then the shipped ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Named:
    """One file that a name means."""

    name: str
    """Path below its folder without its ending, e.g. ``memagent/quickstart``."""
    path: Path
    owner: str
    """`yours` or `shipped`."""


def roots(folder: str) -> dict[str, Path]:
    """Where files of `folder` (``recipes``, ``launch``) lie, by owner: yours first, because names are taken there
    first."""
    from memfactory.plugins import shipped  # here: it imports pydantic, which `--help` can do without

    return {"yours": Path.cwd() / folder, "shipped": shipped(folder)}


def named(folder: str, pattern: str) -> Iterator[Named]:
    """Every file of `folder` that fits the glob `pattern`; of two with one name the first is the one that counts."""
    seen: set[str] = set()
    for owner, root in roots(folder).items():
        for path in sorted(root.glob(pattern)) if root.is_dir() else []:
            name = path.relative_to(root).with_suffix("").as_posix()
            if name not in seen:
                seen.add(name)
                yield Named(name, path, owner)

"""What `memfactory eval` measured, by the names that a run's summary uses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def evaluated(recipe: str, run: Path, folder: Path, *overrides: str) -> dict[str, float]:
    """The metrics of the model of `run` under `overrides`, evaluated into `folder` unless that was done before."""
    told = folder / "evaluation.json"
    if not told.is_file():
        words = ("eval", recipe, *overrides, "--checkpoint", str(run), "--no-base", "--output", str(folder))
        subprocess.run([sys.executable, "-m", "memfactory.cli.main", *words], check=True)
    found: dict[str, float] = {}
    for row in json.loads(told.read_text())["rows"]:
        found |= {f"{row['mode']}_{name}": value for name, value in row["dimensions"].items()}
        found[f"{row['mode']}_em"] = row["mean"]
    return found

"""What a run says about itself in `summary.json`: what ran, on what, in which time."""

from __future__ import annotations

import platform
import resource
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch

from memfactory.train.prepare import Prepared
from memfactory.train.trainer import EpisodeGRPOTrainer

if TYPE_CHECKING:
    from memfactory.train.async_trainer import AsyncEpisodeTrainer


@dataclass
class Clock:
    """Wall and CPU seconds of this process since it was made."""

    wall: float
    cpu: float

    @classmethod
    def start(cls) -> Clock:
        return cls(time.perf_counter(), time.process_time())

    def read(self) -> dict[str, float]:
        return {
            "wall_seconds": time.perf_counter() - self.wall,
            "cpu_seconds": time.process_time() - self.cpu,
        }


def facts(prepared: Prepared, trainer: EpisodeGRPOTrainer | AsyncEpisodeTrainer) -> dict[str, Any]:
    """What is known before the first step."""
    recipe = prepared.recipe
    plain = trainer.accelerator.unwrap_model(trainer.model)
    return {
        "name": recipe.name,
        "seed": recipe.seed,
        "recipe_hash": recipe.hash(),
        "versions": versions(),
        "device": str(trainer.args.device),
        "processes": trainer.accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in plain.parameters()),
        "trainable_parameters": sum(p.numel() for p in plain.parameters() if p.requires_grad),
    }


def versions() -> dict[str, str]:
    """Versions of what decides a run's result."""
    found = {"python": platform.python_version()}
    for package in ("memfactory", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def peak_memory() -> int:
    """Largest resident set of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

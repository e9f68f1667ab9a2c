"""MemFactory: train language models to manage memory.

The names here are the public ones; reward, agent and environment files need no others.
"""

from memfactory.episode import (
    Answer,
    Episode,
    Evidence,
    Operation,
    Probe,
    Retrieved,
    Score,
    StopReason,
    Task,
    Turn,
)
from memfactory.errors import DataError, MemFactoryError, ModelOutputError, RecipeError
from memfactory.reward.dimension import reward

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "DataError",
    "Episode",
    "Evidence",
    "MemFactoryError",
    "ModelOutputError",
    "Operation",
    "Probe",
    "RecipeError",
    "Retrieved",
    "Score",
    "StopReason",
    "Task",
    "Turn",
    "reward",
]

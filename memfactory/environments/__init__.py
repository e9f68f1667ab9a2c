"""Environments: where tasks come from."""

from memfactory.environments.base import Environment, Split
from memfactory.environments.overlap import check_disjoint
from memfactory.environments.registry import build_environment

__all__ = ["Environment", "Split", "build_environment", "check_disjoint"]

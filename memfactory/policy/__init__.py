"""Policies: the only doors to models. Import the backend you need; this package imports none."""

from memfactory.policy.base import Policy, Sampling

__all__ = ["Policy", "Sampling"]

"""Rewards: dimensions, their aggregation, and credit from episodes to turns."""

from memfactory.reward.comparison import comparison
from memfactory.reward.dimension import RewardDimension, reward

__all__ = ["RewardDimension", "comparison", "reward"]

"""Rewards: dimensions, their aggregation, and credit from episodes to turns."""

from memfactory.reward.dimension import RewardDimension, reward

__all__ = ["RewardDimension", "reward"]

"""Rewards: plain functions of one answered prompt. Copy one to write your own."""

from rewards.base import Item, Reward, RewardError, evaluate, items_of, resolve
from rewards.mixture import combine

__all__ = ["Item", "Reward", "RewardError", "combine", "evaluate", "items_of", "resolve"]

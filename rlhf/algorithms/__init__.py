"""Advantages and losses: pure functions in a table, each checked against a slow oracle."""

from rlhf.algorithms.advantages import group_normalised
from rlhf.algorithms.logprobs import processed_logprobs
from rlhf.algorithms.losses import LOSSES, PolicyLoss, Tokens, defaults

__all__ = ["LOSSES", "PolicyLoss", "Tokens", "defaults", "group_normalised", "processed_logprobs"]

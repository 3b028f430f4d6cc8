"""What a loop holds of its actors: roles of `rlhf.roles`, with a deadline for every remote call.

A handle owns the liveness of its actors: a rollout or reward worker that dies or hangs is replaced here.
"""

from actors.handles.calls import ActorTimeoutError, TrainerLostError, reason, within
from actors.handles.engines import CALLS, EngineHandle, Loads
from actors.handles.rewards import RewardsHandle, ScalarHandle
from actors.handles.trainer import TrainerHandle

__all__ = [
    "CALLS",
    "ActorTimeoutError",
    "EngineHandle",
    "Loads",
    "RewardsHandle",
    "ScalarHandle",
    "TrainerHandle",
    "TrainerLostError",
    "reason",
    "within",
]

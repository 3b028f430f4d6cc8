"""Remote calls with deadlines, and what it means that one was not answered."""

from __future__ import annotations

import asyncio
from typing import Any

from ray.exceptions import RayActorError

from rlhf.roles import ActorLostError


class ActorTimeoutError(TimeoutError):
    """A remote call missed its deadline; names the actor, the call and the recipe key of the deadline."""


class TrainerLostError(ActorLostError):
    """The trainer died while a worker took weights from it: nothing is wrong with the worker."""


# a worker of which one of these was heard is of no use any more: its process, its engine or its answer is gone
LOST = (RayActorError, ActorLostError, ActorTimeoutError)


def reason(error: BaseException) -> str:
    """Why an actor died, in a line: Ray tells in its first that it died, and in its last why."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


async def within(seconds: float, deadline: str, what: str, reference: Any) -> Any:
    """Await a remote call for at most `seconds`; `deadline` is its key in the recipe's [deadlines]."""
    try:
        return await asyncio.wait_for(answered(reference), seconds)
    except TimeoutError as error:
        raise ActorTimeoutError(
            f"{what} did not answer within {seconds:g} s; raise deadlines.{deadline} if it is only slow"
        ) from error


async def answered(reference: Any) -> Any:
    """Of a remote call, as a coroutine."""
    return await reference

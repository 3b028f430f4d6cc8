"""Rows kept by rejection sampling."""

from __future__ import annotations

from rlhf.recipe import Synthesize
from rlhf.synthesis import _accepted
from rlhf.types import Group, Prompt, Rollout, Score

STAGE = Synthesize.model_validate(
    {"kind": "synthesize", "name": "s", "method": "rejection", "data": {"q": 1.0}, "prompts": 1}
)


def turns(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": f"{role} {place}"} for place, role in enumerate(roles)]


def kept(*roles: str) -> list[dict[str, str]]:
    said = Rollout((5,), (0.0,), (0,), "new", "stop")
    group = Group(Prompt("k", "s", "?", (1,)), (1,), (said,))
    (row,) = _accepted(STAGE, {"messages": turns(*roles), "answer": "8"}, group, [Score("scored", 1.0)], None)
    assert row["messages"][-1] == {"role": "assistant", "content": "new"}
    return list(row["messages"][:-1])


def test_the_conversation_that_was_asked_is_kept_whole() -> None:
    assert kept("user") == turns("user")
    assert kept("user", "assistant") == turns("user")  # the row's own answer was not shown
    assert kept("system", "user", "assistant", "user") == turns("system", "user", "assistant", "user")

"""What is measured of a judge's habits, by hand-made judges that have them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from rewards.bias import Pair, agreement, compared, padded, position_bias, relative_score, verbosity_bias
from rlhf.types import Group, Media, Prompt, Rollout, Score

PICTURE = Media(b"png", (1, 1))
QUESTION = Prompt("s/0", "s", "what {first} is it?", (1,), (PICTURE,))
PAIRS = [Pair(QUESTION, "good " * number, "good second: 1 {second}") for number in (1, 2, 3)]


def judge(rates: Callable[[str, str, int], tuple[Any, Any]]) -> Callable[[Sequence[Prompt]], Any]:
    """A judge that rates (first, second, number of the call)."""

    async def ask(prompts: Sequence[Prompt]) -> list[Rollout | Score]:
        replies = list[Rollout | Score]()
        for number, prompt in enumerate(prompts):
            assert prompt.media == (PICTURE,)
            first, second = (prompt.question.partition(f"{word} reply:\n")[2] for word in ("First", "Second"))
            first, second = (text.split("\n")[1] for text in (first, second))
            one, two = rates(first, second, number)
            if one is None:
                replies.append(Score("timed_out", note="late"))
            else:
                replies.append(Rollout((), (), (), f"I like it.\nFirst: {one}, second: **{two}**.", "stop"))
        return replies

    return ask


def run(rates: Callable[[str, str, int], tuple[Any, Any]]) -> Any:
    return asyncio.run(compared(PAIRS, judge(rates)))


def test_a_fair_judge_has_no_bias_and_the_relative_score_is_that_of_hand() -> None:
    """By the count of "good": candidates have 1, 2 and 3, references 1 each."""
    found = run(lambda first, second, number: (first.count("good"), second.count("good")))
    assert position_bias(found) == 0.0
    assert relative_score(found) == pytest.approx(100 * (1 + 2 + 3) / 3)
    assert found[2].candidate == (3.0, 3.0)
    assert found[0].reasons[0].startswith("I like it.")


def test_a_judge_of_places_is_found_out() -> None:
    assert position_bias(run(lambda first, second, number: (8, 6))) == 1.0
    assert relative_score(run(lambda first, second, number: (8, 6))) == pytest.approx(100.0)
    # a draw in one order and a winner in the other is decided by the order too
    assert position_bias(run(lambda first, second, number: (5, 5) if number < 3 else (6, 5))) == pytest.approx(2 / 3)


def test_without_a_verdict_in_both_orders_a_pair_counts_nowhere() -> None:
    found = run(lambda first, second, number: (None, None) if number == 0 else (10, 10))
    assert found[0].candidate == (None, 10.0)
    assert found[0].reasons[0] == "late"
    assert (position_bias(found), relative_score(found)) == (0.0, 100.0)
    for wrong in ("11", "0", "7.5", "-3"):
        with pytest.raises(ValueError, match="no pair has a verdict in both orders"):
            position_bias(run(lambda first, second, number, wrong=wrong: (wrong, 5)))


def group(*texts: str) -> Group:
    return Group(QUESTION, (1,), tuple(Rollout((1,), (0.0,), (0,), text, "stop") for text in texts))


def test_a_judge_of_length_is_found_out() -> None:
    async def lengths(groups: Sequence[Group]) -> list[list[Score]]:
        return [
            [Score("scored", min(1.0, len(r.text) / 1000)) if r.text else Score("failed") for r in one.rollouts]
            for one in groups
        ]

    async def words(groups: Sequence[Group]) -> list[list[Score]]:
        return [[Score("scored", float("8" in r.text)) for r in one.rollouts] for one in groups]

    asked = [group("<think>8.</think>8", "3"), group("x" * 1000, "")]
    found = asyncio.run(verbosity_bias(asked, lengths, times=4))
    grown = [len(padded(text, 4)) - len(text) for text in ("<think>8.</think>8", "3")]
    assert found.judged == 3  # the empty one failed
    assert found.change == pytest.approx(sum(grown) / 1000 / 3)
    assert found.changed == pytest.approx(2 / 3)
    fair = asyncio.run(verbosity_bias(asked, words))
    assert (fair.change, fair.changed, fair.judged) == (0.0, 0.0, 4)


def test_padding_stays_within_the_chain() -> None:
    text = padded("<think>3.</think>\\boxed{3}", 2)
    assert text.startswith("<think>3. Let us go")
    assert text.endswith("nothing out.</think>\\boxed{3}")
    assert padded("3", 1).endswith(" 3")


def test_agreement_of_two_judges_by_hand() -> None:
    yes, no, unsaid = Score("scored", 1.0), Score("scored", 0.25), Score("failed")
    # of four that both scored they agree on three: 0.75, by chance 0.5 · 0.75 + 0.5 · 0.25 = 0.5
    assert agreement([yes, yes, no, no, unsaid, yes], [yes, yes, no, yes, yes, unsaid]) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="scored by both"):
        agreement([yes], [unsaid])

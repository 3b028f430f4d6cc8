"""A judge behind an endpoint, asked outside any job: what it says of replies, and what moves it that should not."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

from rewards.base import Item, RewardError
from rewards.bias import Pair, compared, position_bias, relative_score, verbosity_bias
from rewards.endpoint import Endpoint, EndpointError
from rewards.judge import Question
from rewards.templates import TemplateError
from rlhf.data.rows import DataError
from rlhf.recipe import JudgeTable, RecipeError, load_judge
from rlhf.scoring import Judge
from rlhf.types import Group, Rollout, Score

MOVED = 64  # items whose verdicts are asked again, changed
NAMED = re.compile(r"(.+\.toml):judges\.([\w.-]+)")


def table_of(name: str) -> JudgeTable | None:
    """The table that "FILE.toml:judges.NAME" names, None for a name of another form. Raises RewardError for one that
    cannot be asked here: no such file or table, a wrong key, or a judge that is a stage's model."""
    found = NAMED.fullmatch(name)
    if found is None:
        return None
    path, own = Path(found[1]), found[2]
    try:
        table = load_judge(path, own)
        Question.of(table)
    except RecipeError as error:
        raise RewardError(str(error)) from error
    except TemplateError as error:
        raise RewardError(f"{path}: judges.{own}.template: {error}") from error
    if table.endpoint is None:
        raise RewardError(
            f"{path}: judges.{own} is a stage's model, which needs engines: measure it by a stage with "
            '`evaluate = "judge"`'
        )
    return table


class Consultation:
    """The judge of a table with an endpoint, while the context lasts. Of its `budget` all calls are, so few items are
    asked one by one to be `timed`."""

    timed: ClassVar[int] = 16

    def __init__(self, table: JudgeTable) -> None:
        self._table, self._question = table, Question.of(table)
        self.at_once = 4 * table.concurrency

    def __enter__(self) -> Consultation:
        self._runner, self._opened = asyncio.Runner(), AsyncExitStack()
        self._runner.__enter__()
        try:
            endpoint = Endpoint(self._table, self._question.grammar)
            self._runner.run(self._opened.enter_async_context(endpoint))
        except EndpointError as error:
            self._runner.close()
            raise RewardError(str(error)) from error
        self._judge = Judge(endpoint, None, self._table, self._question)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.run(self._opened.aclose())
        self._runner.close()

    def begin(self, items: Sequence[Item]) -> None:
        """Nothing: a call that only warms up would be paid for."""

    def score(self, items: Sequence[Item]) -> list[Score]:
        """One verdict each. Raises RewardError where the endpoint answers nobody, or a row lacks what is shown."""
        return [row[0] for row in self._run(self._judge.score(_groups(items)))]

    def biases(self, items: Sequence[Item]) -> list[str]:
        """What empty words in the first MOVED replies change, and where rows have a `rejected` reply beside theirs, how
        often the order decides which of the two is better."""
        items = items[:MOVED]
        lines = list[str]()
        try:
            found = self._run(verbosity_bias(_groups(items), self._judge.score))
            lines.append(
                f"verbosity: five empty sentences change {found.changed:.0%} of {found.judged} scores, by "
                f"{found.change:+.3f} on average"
            )
        except ValueError as error:
            lines.append(f"verbosity: {error}")
        try:
            pairs = [
                Pair(item.prompt, item.completion, words)
                for item in items
                if (words := _words(item.columns.get("rejected"))) is not None
            ]
            if pairs:
                whole = self._run(compared(pairs, self._judge.replies))
                count = sum(one.whole for one in whole)
                lines.append(
                    f"position: the order decides {position_bias(whole):.0%} of {count} pairs; completions get "
                    f"{relative_score(whole):.0f} % of what the rejected replies beside them get"
                )
        except ValueError as error:
            lines.append(f"position: {error}")
        return lines

    def _run(self, asked: Any) -> Any:
        try:
            return self._runner.run(asked)
        except (EndpointError, ValueError) as error:
            raise RewardError(str(error)) from error


def _groups(items: Sequence[Item]) -> list[Group]:
    return [
        Group(item.prompt, (), (Rollout((), (), (), item.completion, "stop" if item.finished else "length"),))
        for item in items
    ]


def _words(reply: object) -> str | None:
    """Of a reply as rows have it, a text or messages."""
    if isinstance(reply, Sequence) and not isinstance(reply, str) and reply and isinstance(reply[-1], Mapping):
        reply = reply[-1].get("content")
    if reply is not None and not isinstance(reply, str):
        raise DataError(f"a `rejected` that is neither a text nor messages: {reply!r:.80}")
    return reply

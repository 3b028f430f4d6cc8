"""The recipe: all its tables together. Every default lives in their modules and nowhere else."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rlhf.recipe.cluster import ClusterTable
from rlhf.recipe.rewards import JudgeTable, Judging
from rlhf.recipe.settings import Chat, Deadlines, Evaluation, Model, Resources, Source, Tracking
from rlhf.recipe.stages import Merge, Rl, Stage, Synthesize, makes_model
from rlhf.recipe.table import Name, Positive, Table


class Recipe(Table):
    """A curriculum: the model, its data, the stages in order, and what they may use."""

    name: Name
    description: str = ""
    seed: int = 0
    budget_minutes: Positive | None = None
    model: Model
    chat: Chat = Chat()
    data: dict[Name, Source] = {}
    resources: Resources = Resources()
    deadlines: Deadlines = Deadlines()
    evaluation: Evaluation = Evaluation()
    judging: Judging = Judging()
    judges: dict[Name, JudgeTable] = {}
    tracking: Tracking = Tracking()
    cluster: ClusterTable = ClusterTable()
    stages: Annotated[list[Stage], Field(min_length=1)]

    def before(self, stage: Stage) -> list[Stage]:
        """The stages that come before this one."""
        return self.stages[: next(i for i, other in enumerate(self.stages) if other is stage)]

    def parent_of(self, stage: Stage) -> str | None:
        """Name of the stage whose model `stage` continues; None for [model]. A judge is nobody's default parent."""
        if stage.start is not None:
            return stage.start
        if isinstance(stage, Merge):
            return next(iter(stage.of))
        made = [other for other in self.before(stage) if makes_model(other) and other.evaluate != "judge"]
        return made[-1].name if made else None

    def judge(self, name: str) -> JudgeTable:
        """The judge of that name: its table, or a stage's model with the settings of [judging]."""
        if name in self.judges:
            return self.judges[name]
        return JudgeTable(artifact=name, cache=False, **self.judging.model_dump())

    def measured(self, stage: Stage) -> JudgeTable:
        """How the judge that `stage` makes or measures is asked: the first of [judges] with its model, or [judging]."""
        model = stage.name if makes_model(stage) else self.parent_of(stage)
        found = next((table for table in self.judges.values() if table.artifact == model), None)
        return found or self.judge(stage.name)

    def judge_models(self, stage: Stage) -> tuple[str, ...]:
        """The stages whose models judge the rollouts of `stage`, in order, each once: judges may share one."""
        return tuple(dict.fromkeys(made for name in stage.judges if (made := self.judge(name).artifact) is not None))

    def longest_replies(self, stage: Stage) -> dict[str, int]:
        """How many tokens replies may take in a sequence of the stage's engines, by the recipe's keys for them."""
        replies = {"max_tokens": stage.max_tokens} if isinstance(stage, Rl | Synthesize) else {}
        if stage.evaluate == "modes":
            replies["evaluation.max_tokens"] = self.evaluation.max_tokens
        if stage.evaluate == "judge":
            replies["judging.max_tokens"] = self.judging.max_tokens
        for name in stage.judges:  # a judge reads the policy's reply in its prompt
            judge, table = self.judge(name), f"judges.{name}" if name in self.judges else "judging"
            if judge.artifact is not None:
                replies[f"max_tokens + {table}.max_tokens"] = replies["max_tokens"] + judge.max_tokens
        return replies

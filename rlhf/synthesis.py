"""Data made with a model: the difficulty filter before an RL stage, rejection sampling after it (SAIL-VL2 §5), and of a
policy's own chains pairs of a right and a wrong one for its reward model, and critiques for its judge to learn from."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from rewards import judge as judging
from rlhf.data.formatting import as_prompts
from rlhf.data.judging import parse_verdict
from rlhf.data.rows import Row
from rlhf.evaluation import record
from rlhf.recipe import Synthesize
from rlhf.roles import Engine
from rlhf.scoring import Judge, verified
from rlhf.stage import Context, derive
from rlhf.types import Group, Prompt, Sampling, Score

CHUNK = 128  # prompts a call: small enough to show progress
AHEAD = 2  # calls in the engine while one is scored and judged


async def run(
    stage: Synthesize, context: Context, engine: Engine, judge: Judge | None
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The rows kept, in the form the next stage reads, and what was counted on the way."""
    stream, rewards = context.stream(stage), context.actors.rewards
    drawn = stream.take(stage.prompts)
    prompts = as_prompts(drawn, context.tokenizer, stage.think, context.recipe.chat)
    # rows keep where they came from, by which rewards of a later stage may be chosen
    asked = [({"source": source} | row, prompt) for (source, _, row), prompt in zip(drawn, prompts, strict=True)]
    sampling = Sampling(
        stage.samples, stage.temperature, stage.max_tokens, derive(context.recipe.seed, stage.name, "sampling")
    )
    kept: list[dict[str, Any]] = []
    answers: list[list[Score]] = []
    verdicts: list[Score] = []
    chunks = [asked[start : start + CHUNK] for start in range(0, len(asked), CHUNK)]
    async with aclosing(_sampled(engine, chunks, sampling)) as parts:
        async for step, chunk, sampled in parts:
            scored = await verified(stage.answer, sampled, rewards)
            judged = await judge.score(sampled, scored) if judge is not None else []  # only right answers can be kept
            sound = [[judge is not None and judge.settings.accepts(said.value) for said in row] for row in judged]
            said = await verified(stage.critic, sampled, rewards) if stage.critic is not None else []
            for g, (row, _) in enumerate(chunk):
                if stage.method == "difficulty":
                    kept += _by_difficulty(stage, row, scored[g])
                elif stage.method == "rejection":
                    kept += _accepted(stage, row, sampled[g], scored[g], sound[g] if judged else None)
                elif stage.method == "pairs":
                    kept += _paired(stage, row, sampled[g], scored[g])
                else:
                    kept += _criticised(stage, row, sampled[g], said[g], context.tokenizer)
            answers += scored
            verdicts += [verdict for row in judged for verdict in row]
            context.log.log(step, {"prompts": float(len(answers)), "kept": float(len(kept))}, {})
            if step == 0:
                shown = zip(sampled, scored, judged or [[]] * len(sampled), strict=True)
                records = [
                    record(g, 0, {"answer": s[0]} | ({"judge": j[0]} if j else {}), step, "judge") for g, s, j in shown
                ]
                context.log.rollouts(step, records[: context.recipe.tracking.rollout_samples])
    metrics = _counts(stage, asked, answers) | {"synthesis.kept": float(len(kept))}
    silent = [verdict for verdict in verdicts if verdict.outcome != "scored"]
    if judge is not None:
        metrics["synthesis.unjudged"] = len(silent) / max(len(verdicts), 1)
    if len(kept) < stage.min_rows:
        raise ValueError(
            f"stage {stage.name!r} kept {len(kept)} of {len(asked)} prompts, fewer than min_rows = {stage.min_rows}: "
            "ask more prompts, or start from a model whose answers vary more" + _silence(silent, len(verdicts))
        )
    return kept, metrics


def _silence(silent: Sequence[Score], asked: int) -> str:
    """What to say of a judge that gave some no verdict."""
    told = f". The judge gave {len(silent)} of {asked} replies no verdict; the last: "
    return told + silent[-1].note if silent else ""


async def _sampled(
    engine: Engine, chunks: Sequence[Sequence[tuple[Row, Prompt]]], sampling: Sampling
) -> AsyncGenerator[tuple[int, Sequence[tuple[Row, Prompt]], list[Group]]]:
    """(number, chunk, its groups) in order, with calls for the next chunks already in the engine."""
    calls: deque[asyncio.Task[list[Group]]] = deque()
    waiting = iter(chunks)
    try:
        for step, chunk in enumerate(chunks):
            for ahead in itertools.islice(waiting, 1 + AHEAD - len(calls)):
                calls.append(asyncio.create_task(engine.generate([prompt for _, prompt in ahead], sampling)))
            yield step, chunk, await calls.popleft()
    finally:
        for call in calls:
            call.cancel()


def _by_difficulty(stage: Synthesize, row: dict[str, Any], scores: list[Score]) -> list[dict[str, Any]]:
    right = sum(score.value == 1.0 for score in scores)
    rules = stage.drop.get(str(row.get(stage.category)), stage.drop.get("*", []))
    dropped = ("none_right" in rules and right == 0) or ("all_right" in rules and right == len(scores))
    if dropped:
        return []
    label = {} if stage.think else {"complexity": "easy" if right == len(scores) else "hard"}
    return [label | row | {"right": right, "asked": len(scores)}]


def _accepted(
    stage: Synthesize, row: dict[str, Any], group: Group, answers: list[Score], sound: list[bool] | None
) -> list[dict[str, Any]]:
    good = [
        rollout
        for i, rollout in enumerate(group.rollouts)
        if answers[i].value == 1.0 and rollout.finish == "stop" and (sound is None or sound[i])
    ]
    unique = list({rollout.text: rollout for rollout in good}.values())[: stage.per_prompt]
    return [_answered(row, rollout.text) for rollout in unique]


def _answered(row: dict[str, Any], reply: str) -> dict[str, Any]:
    """The row with a reply as it was asked: earlier turns stay, a last one of the assistant's was not shown."""
    messages = row["messages"]
    question = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    return row | {"messages": [*question, {"role": "assistant", "content": reply}], "think": True}


def _paired(stage: Synthesize, row: dict[str, Any], group: Group, answers: list[Score]) -> list[dict[str, Any]]:
    """No reply is in two pairs; one that was cut off is in none."""
    rated = zip(group.rollouts, answers, strict=True)
    whole = {one.text: score.value == 1.0 for one, score in rated if one.finish == "stop"}
    right, wrong = ([text for text, good in whole.items() if good is wanted] for wanted in (True, False))
    pairs = list(zip(right, wrong, strict=False))[: stage.per_prompt]
    return [_answered(row, chosen) | {"rejected": rejected, "corruption": "own"} for chosen, rejected in pairs]


def _criticised(
    stage: Synthesize, row: dict[str, Any], group: Group, critiques: list[Score], tokenizer: Any
) -> list[dict[str, Any]]:
    """Rows as a judge learns from them: the judge's question, and the critique, which ends in its verdict."""
    rows = {}
    for asked, critique in zip(judging.ask(group, tokenizer), critiques, strict=True):
        sound = critique.value == 1.0
        if parse_verdict(critique.note) is not sound:
            raise ValueError(
                f"stage {stage.name!r}: {stage.critic} gave {group.prompt.key} the value {critique.value}, but its "
                f"note, which is what the judge learns to say, ends otherwise: {critique.note!r}"
            )
        if asked is not None:  # without a chain there is nothing to judge
            shown = [{"type": medium.kind} for medium in asked.media]
            question = {"role": "user", "content": [*shown, {"type": "text", "text": asked.question}]}
            reply = {"role": "assistant", "content": [{"type": "text", "text": critique.note}]}
            columns = {"answer": "yes" if sound else "no", "sound": sound, "corruption": "none" if sound else "own"}
            rows[asked.question] = row | {"messages": [question, reply], "think": False} | columns
    return list(rows.values())[: stage.per_prompt]


def _counts(stage: Synthesize, asked: list[tuple[dict[str, Any], Any]], answers: list[list[Score]]) -> dict[str, float]:
    rights = [sum(score.value == 1.0 for score in row) for row in answers]
    total = max(len(rights), 1)
    return {
        "synthesis.prompts": float(len(asked)),
        "synthesis.accuracy": sum(rights) / max(total * stage.samples, 1),
        "synthesis.none_right": sum(right == 0 for right in rights) / total,
        "synthesis.all_right": sum(right == stage.samples for right in rights) / total,
    }

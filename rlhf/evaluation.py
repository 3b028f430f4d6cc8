"""What a model can do: accuracy with and without thinking on the same held-out questions, a choice among candidates,
and the quality of a judge and of a reward model.

Accuracy is avg@k: the mean over k samples at a temperature; pass@k and greedy stand beside it. Intervals are 95 %
bootstrap intervals over questions; a difference to an earlier stage is paired on the questions.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rewards.bias import kappa
from rewards.format import thinks
from rewards.grammar import LEVELS
from rewards.judge import Question, certainty, verdict
from rlhf.data.formatting import CHOSEN, REJECTED, as_prompt, reply_ids
from rlhf.data.rows import DataError, Rows
from rlhf.preference import sigmoid
from rlhf.recipe import Evaluation, JudgeTable, Judging
from rlhf.reward_model import Pair
from rlhf.roles import Engine
from rlhf.scoring import verified
from rlhf.stage import Context, derive
from rlhf.tracking import record_image
from rlhf.types import Fit, Group, Probe, Prompt, Rollout, Sample, Sampling, Score

PLAIN = 2000  # characters of a column that is kept beside a rollout
BINS = 10  # of equal width, of how sure a judge or a reward model is

Answers = Mapping[str, Mapping[str, float]]  # mode → question key → share of right samples


@dataclass(frozen=True)
class Report:
    """metrics: flat names to numbers; correct: mode → question key → share of right samples; examples for people."""

    metrics: dict[str, float]
    correct: dict[str, dict[str, float]] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)


async def both_modes(context: Context, engine: Engine, earlier: Answers | None = None) -> Report:
    """Ask [evaluation].data in the modes of [evaluation]; the answers of an `earlier` stage add paired differences."""
    settings = context.recipe.evaluation
    assert settings.data is not None
    metrics: dict[str, float] = {}
    correct: dict[str, dict[str, float]] = {}
    examples: list[dict[str, Any]] = []
    modes = tuple(dict.fromkeys(settings.modes))
    # all at once: the engine is never left with the few longest answers of one mode
    asked = (held_out(context, settings.data, settings.prompts, think=mode == "think") for mode in modes)
    reports = await asyncio.gather(*(_mode(context, engine, prompts, settings) for prompts in asked))
    for mode, (found, shares, shown) in zip(modes, reports, strict=True):
        metrics |= {f"eval.{mode}.{name}": value for name, value in found.items()}
        correct[mode] = shares
        examples += shown
        before = (earlier or {}).get(mode, {})
        if before.keys() == shares.keys():
            gains = np.array([shares[key] - before[key] for key in shares])
            low, high = bootstrap(gains, settings.bootstrap)
            metrics |= {
                f"eval.{mode}.gain": float(gains.mean()),
                f"eval.{mode}.gain.low": low,
                f"eval.{mode}.gain.high": high,
            }
    return Report(metrics, correct, examples)


async def temperatures(context: Context, engine: Engine, values: Sequence[float]) -> dict[str, float]:
    """avg@k with thinking at several temperatures: {"eval.think.accuracy@0.3": …}, and the best of them."""
    settings = context.recipe.evaluation
    assert settings.data is not None
    prompts = held_out(context, settings.data, settings.prompts, think=True)
    found = {}
    for value in values:
        metrics, _, _ = await _mode(context, engine, prompts, settings.model_copy(update={"temperature": value}))
        found[f"eval.think.accuracy@{value:g}"] = metrics["accuracy"]
    return found | {"eval.think.accuracy.best": max(found.values())}


async def extra_questions(context: Context, engine: Engine, source: str) -> dict[str, float]:
    """Greedy accuracy on questions of another source, asked directly: {"eval.extra.accuracy": …}."""
    settings = context.recipe.evaluation
    prompts = held_out(context, source, settings.prompts, think=False)
    groups = await engine.generate(prompts, Sampling(temperature=0.0, max_tokens=settings.max_tokens))
    answers = await verified(settings.answer, groups, context.actors.rewards)
    return {"eval.extra.accuracy": float(np.mean([_value(row[0]) for row in answers]))}


async def ranked(context: Context, engine: Engine, source: str) -> dict[str, float]:
    """Questions with a closed set of answers: of a row's column `candidates` the one whose words are likeliest after
    the question, by their summed log-probs (InstructBLIP 2305.06500, section 2.5), against column `answer`; and
    eval.rank.chance, what guessing would give."""
    rows, chat, tokenizer = context.rows(source), context.recipe.chat, context.tokenizer
    probes, places, right = list[Probe](), list[tuple[int, int]](), list[int]()
    for index in range(min(len(rows), context.recipe.evaluation.prompts)):
        row = rows[index]
        candidates, answer = row.get("candidates"), row.get("answer")
        if not isinstance(candidates, list) or not all(isinstance(one, str) for one in candidates):
            raise DataError(f"{rows.origin}, row {index}: no list of words in column 'candidates' to choose among")
        if answer not in candidates:
            raise DataError(f"{rows.origin}, row {index}: the answer {answer!r} is none of its candidates {candidates}")
        prompt = as_prompt(row, source, index, tokenizer, False, chat)
        right.append(candidates.index(answer))
        replies = [reply_ids(tokenizer, one, f"{rows.origin}, row {index}") for one in candidates]
        longest, limit = max(map(len, replies)), context.recipe.resources.max_model_len
        asked = len(context.processor.expand(list(prompt.token_ids), [item.size for item in prompt.media]))
        if asked + longest >= limit:
            raise DataError(
                f"{rows.origin}, row {index}: a question of {asked} tokens and a candidate of {longest} are more than "
                f"resources.max_model_len = {limit} holds; raise it, or leave the row out"
            )
        places += [(index, len(reply)) for reply in replies]
        probes += [Probe(prompt.token_ids + reply, prompt.media) for reply in replies]
    scores = defaultdict[int, list[float]](list)
    for (index, length), logprobs in zip(places, await engine.likelihoods(probes), strict=True):
        scores[index].append(sum(logprobs[-length:]))
    chosen = [int(np.argmax(scores[index])) for index in range(len(right))]
    return {
        "eval.rank.accuracy": float(np.mean([one == other for one, other in zip(chosen, right, strict=True)])),
        "eval.rank.chance": float(np.mean([1 / len(scores[index]) for index in range(len(right))])),
        "eval.rank.rows": float(len(right)),
    }


def fitted(found: Mapping[str, Fit], kinds: Mapping[str, str]) -> dict[str, float]:
    """Of how well a policy fits rows, by key: eval.loss, the mean over their learned tokens in nats; eval.exact, the
    share of replies that greedy decoding gives word for word; and eval.exact.KIND of each of the `kinds` of rows."""
    tokens = sum(fit.tokens for fit in found.values())
    shares = defaultdict[str, list[bool]](list)
    for key, fit in found.items():
        shares[kinds[key]].append(fit.exact)
    exact = {f"eval.exact.{kind}": float(np.mean(each)) for kind, each in sorted(shares.items()) if kind}
    return {
        "eval.loss": sum(fit.nll for fit in found.values()) / max(tokens, 1),
        "eval.tokens": float(tokens),
        "eval.exact": float(np.mean([fit.exact for fit in found.values()])),
        **exact,
    }


def preferred(
    samples: Sequence[Sample], said: Mapping[str, float], kinds: Mapping[str, str], resamples: int
) -> dict[str, float]:
    """How well a reward model tells the chosen reply of held-out pairs: reward_model.accuracy with its 95 % interval,
    the share it prefers, also by the `kinds` of rejected replies, which are by the chosen samples' keys; .margin, by
    how much on average; .loss without margins and center; .confidence, the mean of σ(|Δ|), beside which accuracy shows
    too much of it or too little; .calibration, how far both lie apart on average over BINS of confidence (expected
    calibration error, arXiv:1706.04599); and the mean rewards of both kinds."""
    keys = [sample.key for sample in samples if sample.key.endswith(CHOSEN)]
    pairs = [Pair(said[key], said[key.removesuffix(CHOSEN) + REJECTED]) for key in keys]
    right = np.array([float(pair.preferred > 0) for pair in pairs])
    sure = np.array([sigmoid(abs(pair.preferred)) for pair in pairs])
    low, high = bootstrap(right, resamples)
    by_kind = defaultdict[str, list[float]](list)
    for key, one in zip(keys, right, strict=True):
        by_kind[kinds[key]].append(float(one))
    return {
        "reward_model.accuracy": float(right.mean()),
        "reward_model.accuracy.low": low,
        "reward_model.accuracy.high": high,
        "reward_model.margin": float(np.mean([pair.preferred for pair in pairs])),
        "reward_model.loss": float(np.mean([pair.loss(0.0) for pair in pairs])),
        "reward_model.confidence": float(sure.mean()),
        "reward_model.calibration": calibration_error(sure, right, bins_of(sure, 0.5)),
        "reward_model.chosen": float(np.mean([pair.chosen for pair in pairs])),
        "reward_model.rejected": float(np.mean([pair.rejected for pair in pairs])),
        "reward_model.rows": float(len(pairs)),
        **{f"reward_model.accuracy.{kind}": float(np.mean(row)) for kind, row in sorted(by_kind.items()) if kind},
    }


async def judge_quality(context: Context, engine: Engine, source: str, table: JudgeTable) -> Report:
    """Precision, recall, κ, the specificity for each kind of corruption and the calibration, on rows with columns
    `sound` and `corruption`. "Positive" is a verdict that the judge's `table` accepts. Where rows have a column `score`
    and the judge gives one, also judge.score_error, by how many levels it is off on average."""
    prompts = held_out(context, source, len(context.rows(source)), think=False)
    grammar = Question.of(table).grammar
    groups = await engine.generate(prompts, Sampling(temperature=0.0, max_tokens=table.max_tokens))
    replies = [group.rollouts[0] for group in groups]
    given = [verdict(reply, table.confidence, grammar) for reply in replies]
    said = [
        dataclasses.replace(score, value=float(table.accepts(score.value))) if score.outcome == "scored" else score
        for score in given
    ]
    truth = [bool(group.prompt.columns["sound"]) for group in groups]
    metrics = agreement(said, truth, "judge")
    metrics |= calibration(replies, [verdict(reply, grammar=grammar) for reply in replies], truth, table)
    levels = [group.prompt.columns.get("score") for group in groups]
    if table.grammar == "score" and None not in levels:
        off = [
            abs(1 + (LEVELS - 1) * one.value - float(level or 0))
            for one, level in zip(given, levels, strict=True)
            if one.value is not None
        ]
        metrics |= {"judge.score_error": float(np.mean(off))} if off else {}
    by_kind: dict[str, list[Score]] = defaultdict(list)
    for group, score in zip(groups, said, strict=True):
        by_kind[str(group.prompt.columns["corruption"])].append(score)
    for kind, found in sorted(by_kind.items()):
        if kind != "none":
            answered = [score.value for score in found if score.outcome == "scored"]
            metrics[f"judge.specificity.{kind}"] = sum(value == 0.0 for value in answered) / max(len(answered), 1)
    examples = [
        record(group, 0, {"judge": score}, 0, "judge")
        for group, score in list(zip(groups, said, strict=True))[: context.recipe.tracking.rollout_samples]
    ]
    return Report(metrics, {}, examples)


def require_verdicts(rows: Rows, source: str) -> None:
    """Raise DataError unless a judge's answers on these rows can be told right from wrong."""
    missing = [name for name in ("sound", "corruption") if len(rows) and name not in rows[0]]
    if missing:
        raise DataError(
            f"{rows.origin}: rows of {source!r} have no {' and '.join(map(repr, missing))}, so a judge cannot be "
            'measured on them; give each row sound = true or false, and corruption = "none" or a kind'
        )


def agreement(said: Sequence[Score], truth: Sequence[bool], prefix: str) -> dict[str, float]:
    """Precision, recall, Cohen's κ of verdicts against the truth, and the share of replies that did not parse: these
    are in neither precision nor κ, but a sound row without a verdict is one not found."""
    pairs = [(score.value == 1.0, true) for score, true in zip(said, truth, strict=True) if score.outcome == "scored"]
    count = max(len(pairs), 1)
    both = sum(verdict_ and true for verdict_, true in pairs)
    positive = sum(verdict_ for verdict_, _ in pairs)
    existing = sum(truth[: len(said)])
    agreed = sum(verdict_ == true for verdict_, true in pairs) / count
    return {
        f"{prefix}.precision": both / max(positive, 1),
        f"{prefix}.recall": both / max(existing, 1),
        f"{prefix}.kappa": kappa(*zip(*pairs, strict=True)) if pairs else 0.0,
        f"{prefix}.accuracy": agreed,
        f"{prefix}.failed": 1 - len(pairs) / max(len(said), 1),
        f"{prefix}.rows": float(len(said)),
    }


def calibration(
    replies: Sequence[Rollout], said: Sequence[Score], truth: Sequence[bool], judging: Judging
) -> dict[str, float]:
    """How often a judge's words are right, by how sure it was of them (the probability of its least likely token), in
    ten bins of equal width: judge.calibration.0.9.accuracy and .share of the replies, of 0.9 to 1, say; and
    judge.calibration.error, by which the two differ on average. Of replies that parse, before any `confidence`."""
    heard = [
        (certainty(reply), judging.accepts(score.value) == true)
        for reply, score, true in zip(replies, said, truth, strict=True)
        if score.outcome == "scored"
    ]
    if not heard:
        return {}
    sure, right = (np.array(each, dtype=float) for each in zip(*heard, strict=True))
    bins = bins_of(sure, 0.0)
    found = {"judge.calibration.error": calibration_error(sure, right, bins)}
    for place in np.unique(bins):
        name = f"judge.calibration.{place / BINS:.1f}"
        found |= {
            f"{name}.accuracy": float(right[bins == place].mean()),
            f"{name}.share": float((bins == place).mean()),
        }
    return found


def bins_of(sure: np.ndarray, low: float) -> np.ndarray:
    """For each probability [N] between `low` and 1, in which of BINS bins it is."""
    return np.minimum((sure - low) / (1 - low) * BINS, BINS - 1).astype(int)


def calibration_error(sure: np.ndarray, right: np.ndarray, bins: np.ndarray) -> float:
    """By how much how sure one is [N] and how often one is right [N] lie apart, on average over bins (expected
    calibration error, arXiv:1706.04599)."""
    apart = [abs(float((right - sure)[bins == each].sum())) for each in np.unique(bins)]
    return sum(apart) / len(sure)


def held_out(context: Context, source: str, limit: int, think: bool) -> list[Prompt]:
    """The first `limit` rows of a source as prompts: the same questions for every stage."""
    rows = context.rows(source)
    return [
        as_prompt(rows[index], source, index, context.tokenizer, think, context.recipe.chat)
        for index in range(min(limit, len(rows)))
    ]


def apart(prompts: Sequence[Prompt], by: str, measures: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The mean of each measure [N, k] over the prompts with each value of the column `by`: {"accuracy.easy": …}."""
    places = defaultdict[str, list[int]](list)
    for place, prompt in enumerate(prompts):
        places[str(prompt.columns.get(by))].append(place)
    return {
        f"{name}.{value}": float(values[rows].mean())
        for value, rows in sorted(places.items())
        for name, values in measures.items()
    }


def bootstrap(values: np.ndarray, resamples: int, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of values [N]; seeded, so a report can be repeated."""
    draws = np.random.default_rng(0).integers(0, len(values), (resamples, len(values)))
    low, high = np.quantile(values[draws].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def record(
    group: Group, rollout: int, parts: Mapping[str, Score], step: int, judge: str | None = None
) -> dict[str, Any]:
    """One rollout as the report shows it, image included. `judge` names the part that is a judge's verdict."""
    prompt, sampled = group.prompt, group.rollouts[rollout]
    score = group.scores[rollout] if group.scores else None
    outcomes = [part.outcome for part in parts.values() if part.outcome != "scored"]
    columns = prompt.columns
    values = dict(score.parts) if score else {name: part.value for name, part in parts.items()}
    return {
        "step": step,
        "key": prompt.key,
        "category": columns.get("category"),
        "question": prompt.question,
        "think": prompt.think,
        "image": record_image(prompt.media[0].data, prompt.media[0].size) if prompt.media else None,
        "completion": sampled.text,
        "tokens": len(sampled.token_ids),
        "finish": sampled.finish,
        "answer": columns.get("answer"),
        "columns": {name: value for name, value in columns.items() if _is_plain(value)},
        "parts": values,
        "outcome": score.outcome if score else (outcomes[0] if outcomes else "scored"),
        "value": score.value if score else None,
        "note": score.note if score else " ".join(part.note for part in parts.values() if part.note),
        "verdict": values.get(judge) if judge else None,
    }


def _is_plain(value: Any) -> bool:
    """Whether JSON holds it as it is, in few words."""
    try:
        return len(json.dumps(value, allow_nan=False)) <= PLAIN
    except (TypeError, ValueError):
        return False


async def _mode(
    context: Context, engine: Engine, prompts: Sequence[Prompt], settings: Evaluation
) -> tuple[dict[str, float], dict[str, float], list[dict[str, Any]]]:
    seed = derive(context.recipe.seed, "evaluation", settings.temperature)
    sampling = Sampling(settings.samples, settings.temperature, settings.max_tokens, seed)
    sampled, greedy = await asyncio.gather(
        engine.generate(prompts, sampling),
        engine.generate(prompts, dataclasses.replace(sampling, num=1, temperature=0.0)),
    )
    rewards = context.actors.rewards
    answers = await verified(settings.answer, sampled, rewards)
    greedy_answers = await verified(settings.answer, greedy, rewards)
    formats = await verified(settings.format, sampled, rewards)
    right = np.array([[_value(score) for score in row] for row in answers])  # [N, k]
    thinking = np.array([[thinks(rollout.text) for rollout in group.rollouts] for group in sampled])
    lengths = np.array([[len(rollout.token_ids) for rollout in group.rollouts] for group in sampled])
    low, high = bootstrap(right.mean(1), settings.bootstrap)
    metrics = {
        "accuracy": float(right.mean()),
        "accuracy.low": low,
        "accuracy.high": high,
        f"pass@{settings.samples}": float(right.max(1).mean()),
        "greedy": float(np.mean([_value(row[0]) for row in greedy_answers])),
        "format_rate": float(np.mean([_value(score) for row in formats for score in row])),
        "think_rate": float(thinking.mean()),
        "tokens": float(lengths.mean()),
        "truncated": float(np.mean([r.finish == "length" for group in sampled for r in group.rollouts])),
    }
    by_value = apart(prompts, settings.by, {"accuracy": right, "think_rate": thinking, "tokens": lengths})
    if taken := sorted(by_value.keys() & metrics.keys()):
        raise DataError(
            f"evaluation.by = {settings.by!r}: the column's value {taken[0].partition('.')[2]!r} would be the name of "
            f"another metric, {taken[0]}; name it otherwise in the rows"
        )
    metrics |= by_value
    parts = {"answer": greedy_answers, "format": await verified(settings.format, greedy, rewards)}
    if settings.soundness is not None and prompts and prompts[0].think:
        sound = await verified(settings.soundness, sampled, rewards)
        verdicts = np.array([[_value(score) for score in row] for row in sound])
        metrics["soundness"] = float(verdicts.mean())
        metrics["right_but_unsound"] = float((right * (1 - verdicts)).sum() / max(right.sum(), 1))
        parts["sound"] = await verified(settings.soundness, greedy, rewards)
    shown = [
        record(group, 0, {name: scores[g][0] for name, scores in parts.items()}, 0)
        for g, group in enumerate(greedy[: context.recipe.tracking.rollout_samples])
    ]
    return metrics, dict(zip((p.key for p in prompts), right.mean(1).tolist(), strict=True)), shown


def _value(score: Score) -> float:
    assert score.value is not None  # `verified` saw to that
    return score.value

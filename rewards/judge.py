"""A model as verifier: what the judge is asked about a completion, and what its reply is worth."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from rewards.base import Item, items_of
from rlhf.data.formatting import as_prompt
from rlhf.data.judging import judge_question, parse_verdict
from rlhf.recipe import Chat
from rlhf.types import Group, Prompt, Rollout, Score

CHAIN = re.compile(r"<think>(.*?)</think>", re.DOTALL)


def ask(
    items: Group | Sequence[Item], tokenizer: PreTrainedTokenizerBase, wanted: Sequence[bool] | None = None
) -> list[Prompt | None]:
    """The judge's prompt for each completion, in order: the same media, the judge's own template, no thinking.

    None where it is not `wanted`, or there is no chain to judge: `not_asked()` says unsound without asking.
    Keys are "<prompt key>/judge/<place>". Special tokens spelled inside the completion are taken out, so that no
    policy can end its judge's turn or show it a picture.
    """
    items = items_of(items) if isinstance(items, Group) else items
    chosen = [True] * len(items) if wanted is None else wanted
    return [_prompt(item, place, tokenizer) if chosen[place] else None for place, item in enumerate(items)]


def not_asked() -> Score:
    """The verdict on a completion that need not be judged."""
    return Score("scored", 0.0, note="not judged: no chain of thought, or not the right answer")


def verdict(reply: Rollout, confidence: float = 0.0) -> Score:
    """1.0 for yes, 0.0 for no; a reply without either, or cut off before its end, is a failure, never a 0.

    A yes is a no where the judge gave some token on its way a probability under `confidence`: a judge that hesitates
    mostly does so where it reads into a reply what should stand there. (A generative verifier's probability of yes is
    its score, arXiv:2408.15240; one that works out its verdict spends its doubt before it.)
    """
    if reply.finish != "stop":
        return Score("failed", note=f"the judge had not finished after {len(reply.token_ids)} tokens: {reply.text!r}")
    said = parse_verdict(reply.text)
    if said is None:
        return Score("failed", note=f"the judge said neither yes nor no: {reply.text!r}")
    if said and confidence > 0.0 and (least := math.exp(min(reply.logprobs))) < confidence:
        return Score("scored", 0.0, note=f"the judge said {reply.text!r}, but with a token of probability {least:.2f}")
    return Score("scored", 1.0 if said else 0.0, note=f"the judge said {reply.text!r}")


def _prompt(item: Item, place: int, tokenizer: PreTrainedTokenizerBase) -> Prompt | None:
    chain = CHAIN.search(item.completion)
    if chain is None or not chain[1].strip():
        return None
    text = judge_question(item.prompt.question, _harmless(item.completion, tokenizer))
    parts = [*({"type": "image"} for _ in item.prompt.media), {"type": "text", "text": text}]
    row = {
        **item.prompt.columns,
        "messages": [{"role": "user", "content": parts}],
        "images": list(item.prompt.media),
    }
    prompt = as_prompt(row, item.prompt.source, place, tokenizer, False, Chat())
    return Prompt(
        key=f"{item.prompt.key}/judge/{place}",
        source=item.prompt.source,
        question=text,
        token_ids=prompt.token_ids,
        media=prompt.media,
        columns=prompt.columns,
    )


def _harmless(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    marks = sorted((str(token) for token in tokenizer.get_added_vocab()), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, marks)) or r"(?!)")
    # taking one out may join two halves to another
    while (clean := pattern.sub(" ", text)) != text:
        text = clean
    return text

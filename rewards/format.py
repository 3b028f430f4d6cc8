"""Does the completion have the form it was asked for?"""

from __future__ import annotations

import re

from rewards.answer import last_boxed
from rewards.base import Item
from rlhf.types import Score

TAG = re.compile(r"</?think>")
EMPTY = re.compile(r"<think>\s*</think>")
NO_TAG = r"(?:(?!</?(?:judge|think)>).)*"
JUDGED = re.compile(
    rf"<judge>(?P<judge>{NO_TAG})</judge>\s*<think>(?P<think>{NO_TAG})</think>(?P<answer>{NO_TAG})", re.DOTALL
)
MALFORMED = Score("scored", 0.0, note="not <judge>…</judge><think>…</think> and an answer, once each")


def think(item: Item) -> Score:
    r"""1.0 for the asked form, else 0.0. Thinking: one <think>…</think> with words in it opens the completion, one
    boxed answer ends it. Not thinking: no think tag, and a boxed answer at the end."""
    fault = _fault(item.completion.strip(), item.prompt.think)
    return Score("scored", 0.0 if fault else 1.0, note=fault)


def judge_think(item: Item) -> Score:
    r"""1.0 for SAIL-RL's form (arXiv:2511.02280), else 0.0: <judge>…</judge><think>…</think> and an answer that ends in
    a box. The judgement has words; the chain may be empty, where the model answers at once."""
    parts = JUDGED.fullmatch(item.completion.strip())
    if parts is None:
        return MALFORMED
    if not parts["judge"].strip():
        return Score("scored", 0.0, note="an empty judgement")
    fault = _answer_fault(parts["answer"].strip())
    return Score("scored", 0.0 if fault else 1.0, note=fault)


def has_think_block(text: str) -> bool:
    """Whether the text opens or closes a think block, complete or not."""
    return TAG.search(text) is not None


def thinks(text: str) -> bool:
    """Whether the text thinks: a think block, complete or not, that is not empty."""
    return has_think_block(EMPTY.sub("", text))


def _fault(text: str, thinking: bool) -> str:
    if not thinking:
        return "a think tag, though not asked to think" if has_think_block(text) else _answer_fault(text)
    if TAG.findall(text) != ["<think>", "</think>"]:
        return "not exactly one <think>…</think>"
    before, chain, after = TAG.split(text)
    if before.strip():
        return "words before <think>"
    if not chain.strip():
        return "an empty chain"
    return _answer_fault(after.strip())


def _answer_fault(text: str) -> str:
    found = last_boxed(text)
    if found is None or not found[0]:
        return "no boxed answer"
    return "words after the boxed answer" if text[found[1] :].strip("$. \n") else ""

"""Was it right to think, and was the thinking right? The judging and the thinking reward of SAIL-RL (arXiv:2511.02280).

What counts is what the completion does, <judge>…</judge><think>…</think> with or without words in the chain, whatever
its judgement says. Rows have a column `complexity`: "hard" is what is worth thinking about, "easy" the rest. With the
reward of the answer the two are made for a product, since a right answer does not make up for a wrong choice:

    [stages.rewards.dual]
    product = ["judgement", "thought", "answer"]
    weight = 0.9
"""

from __future__ import annotations

from dataclasses import replace

from rewards.base import Item, evaluate, resolve
from rewards.format import JUDGED, MALFORMED
from rlhf.types import Score


def judgement(item: Item, always: bool = False) -> Score:
    """1.0 where a hard question is thought about and an easy one is not, else 0.0; with `always`, where any is thought
    about. Raises KeyError for a row without `complexity`, ValueError for one that is neither "easy" nor "hard"."""
    complexity, parts = _complexity(item), JUDGED.fullmatch(item.completion.strip())
    if parts is None:
        return MALFORMED
    thinks = bool(parts["think"].strip())
    if thinks == (always or complexity == "hard"):
        return Score("scored", 1.0)
    return Score("scored", 0.0, note=f"{'a chain' if thinks else 'no chain'}, and it is {complexity}")


def thought(item: Item, soundness: str = "rewards.soundness:digits") -> Score:
    """Of an empty chain 1.0 where the question is easy, else 0.0: not to think can be right. Of any other what the
    reward function `soundness` says of "<think>…</think>answer", the judgement being cut off. Raises as `judgement`."""
    complexity, parts = _complexity(item), JUDGED.fullmatch(item.completion.strip())
    if parts is None:
        return MALFORMED
    if not parts["think"].strip():
        return Score("scored", 0.0, note="no chain, and it is hard") if complexity == "hard" else Score("scored", 1.0)
    chain = replace(item, completion=f"<think>{parts['think']}</think>{parts['answer']}")
    return evaluate(resolve(soundness), [chain])[0]


def _complexity(item: Item) -> str:
    complexity = item.columns["complexity"]
    if complexity not in ("easy", "hard"):
        raise ValueError(f'{item.prompt.key} has complexity = {complexity!r}; a row\'s is "easy" or "hard"')
    return str(complexity)

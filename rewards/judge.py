"""A model as verifier: what the judge is asked about a completion, and what its reply is worth."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from rewards.base import Item, items_of
from rewards.grammar import Grammar
from rewards.templates import BUILT_IN, Template, template_of
from rlhf.data.formatting import as_prompt
from rlhf.recipe import Chat, JudgeTable
from rlhf.types import Group, Prompt, Rollout, Score

CHAIN = re.compile(r"<think>(.*?)</think>", re.DOTALL)
JUDGEMENT = re.compile(r"<judge>(.*?)</judge>", re.DOTALL)
ANSWER = re.compile(r".*</think>(.*)", re.DOTALL)
# what servers read as the marks of a turn or a picture, whichever model they serve
FOREIGN = re.compile(
    r"<\|[^<>\n]{0,40}\|>|<[|｜]?(?:start|end)_of_\w+[|｜]?>|</?s>|\[/?INST\]|<</?SYS>>|<image>|<video>"
)

TRAINED = Grammar(anywhere=True)


@dataclass(frozen=True)
class Question:
    """What a judge is asked and how it answers. missing: the value of a reply that lacks what the template shows;
    enforced: an engine that can lets it say nothing but the grammar."""

    template: Template = BUILT_IN["sound"]
    grammar: Grammar = TRAINED
    missing: float = 0.0
    enforced: bool = False

    @staticmethod
    def of(table: JudgeTable) -> Question:
        """As the recipe says. Raises TemplateError."""
        template = template_of(table.template)
        if table.image is not None:
            template = replace(template, image=table.image)
        trained = not template.fenced and table.artifact is not None
        grammar = Grammar(table.grammar, tuple(table.fields), anywhere=trained)
        return Question(template, grammar, table.missing, table.constrain == "structured_outputs")

    def not_asked(self) -> Score:
        """The verdict on a completion that lacks what would be judged."""
        lacking = "chain of thought" if "judgement" not in self.template.inputs else "judgement or chain"
        return self.grammar.flat(self.missing, f"not judged: no {lacking}")

    def not_right(self) -> Score:
        """The verdict on a completion whose answer is not right, where nobody is asked about such."""
        return self.grammar.flat(0.0, "not judged: not the right answer")


SOUND = Question()


def ask(
    items: Group | Sequence[Item],
    tokenizer: PreTrainedTokenizerBase,
    wanted: Sequence[bool] | None = None,
    question: Question = SOUND,
) -> list[Prompt | None]:
    """The judge's prompt for each completion, in order: the same media, the judge's own template, no thinking.

    None where it is not `wanted`, or lacks what the template shows, a chain to judge. Keys are "<prompt key>/judge/
    <place>". Special tokens spelled inside the completion are taken out, so that no policy can end its judge's turn or
    show it a picture. Raises ValueError for a row without the `answer` that the template shows.
    """
    found = texts(items, question, tokenizer.get_added_vocab(), wanted)
    return [None if prompt is None else rendered(prompt, place, tokenizer) for place, prompt in enumerate(found)]


def texts(
    items: Group | Sequence[Item],
    question: Question,
    marks: Iterable[str],
    wanted: Sequence[bool] | None = None,
    foreign: bool = False,
) -> list[Prompt | None]:
    """As `ask`, in words, without ids: for a judge that is asked in words. `marks`, special tokens, are taken out of
    completions, and where the judge's own are not known, being `foreign`, whatever looks like one."""
    items = items_of(items) if isinstance(items, Group) else items
    pattern = re.compile("|".join(map(re.escape, sorted(map(str, marks), key=len, reverse=True))) or r"(?!)")
    found = list[Prompt | None]()
    for place, item in enumerate(items):
        values = _values(item, question) if wanted is None or wanted[place] else None
        if values is None:
            found.append(None)
            continue
        harmless = {name: _harmless(text, pattern, foreign) for name, text in values.items()}
        told = {"question": item.question, "format": question.grammar.words}
        text = question.template.render(harmless | told | _reference(item, question))
        key, media = f"{item.prompt.key}/judge/{place}", item.prompt.media if question.template.image else ()
        found.append(Prompt(key, item.prompt.source, text, (), media, False, item.columns))
    return found


def rendered(prompt: Prompt, place: int, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """A question in words with its ids; `place` is for messages."""
    parts = [*({"type": "image"} for _ in prompt.media), {"type": "text", "text": prompt.question}]
    row = {
        **prompt.columns,
        "messages": [{"role": "user", "content": parts}],
        "images": list(prompt.media),
    }
    made = as_prompt(row, prompt.source, place, tokenizer, False, Chat())
    return replace(prompt, token_ids=made.token_ids, media=made.media, columns=made.columns)


def verdict(reply: Rollout, confidence: float = 0.0, grammar: Grammar = SOUND.grammar) -> Score:
    """What the grammar reads of it; a reply without a verdict, or cut off before its end, is a failure, never a 0.

    A yes is a no where the judge gave some token on its way a probability under `confidence`: a judge that hesitates
    mostly does so where it reads into a reply what should stand there. (A generative verifier's probability of yes is
    its score, arXiv:2408.15240; one that works out its verdict spends its doubt before it.)
    """
    if reply.finish != "stop":
        return Score("failed", note=f"the judge had not finished after {len(reply.token_ids)} tokens: {reply.text!r}")
    said = grammar.read(reply.text)
    if said.value == 1.0 and confidence > 0.0 and (least := certainty(reply)) < confidence:
        return Score("scored", 0.0, note=f"the judge said {reply.text!r}, but with a token of probability {least:.2f}")
    return said


def certainty(reply: Rollout) -> float:
    """The probability of its least likely token."""
    return math.exp(min(reply.logprobs))


def _values(item: Item, question: Question) -> dict[str, str] | None:
    """What the policy wrote, by the template's inputs; None where it lacks some."""
    said, wanted = item.completion, (*question.template.inputs, *question.template.needs)
    chain, judgement, answer = CHAIN.search(said), JUDGEMENT.search(said), ANSWER.fullmatch(said)
    found = {
        "completion": said,
        "chain": chain[1] if chain is not None else "",
        "judgement": judgement[1] if judgement is not None else "",
        "answer": answer[1] if answer is not None else said,
    }
    values = {name: found[name] for name in wanted if name in found}
    lacks = any(not values[name].strip() for name in ("chain", "judgement") if name in values)
    return None if lacks else values


def _reference(item: Item, question: Question) -> dict[str, str]:
    if "reference" not in question.template.inputs:
        return {}
    if item.columns.get("answer") is None:
        raise ValueError(
            f"{item.prompt.key}: no column 'answer', which {question.template.name!r} shows the judge as {{reference}}"
        )
    return {"reference": str(item.columns["answer"])}


def _harmless(text: str, marks: re.Pattern[str], foreign: bool) -> str:
    # taking one out may join two halves to another
    while (clean := marks.sub(" ", text)) != text or (foreign and (clean := FOREIGN.sub(" ", text)) != text):
        text = clean
    return text

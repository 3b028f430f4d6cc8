"""A core of rows that speak of many wanted things (SVIT 2307.04087), and captions of which no noun phrase has many
(LLaVA 2304.08485)."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from rlhf.data.rows import Rows
from rlhf.data.selectors import SELECTORS, text
from rlhf.slots import at_least

WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
# what ends a noun phrase in a caption: articles, prepositions, conjunctions, pronouns, common verbs
BETWEEN = re.compile(
    "an?|the|this|that|these|those|some|any|his|her|its|their|my|our|your|and|or|but|with|without|of|in|on|at|by|to|from|"
    "for|near|over|under|behind|beside|between|into|onto|up|down|out|as|is|are|was|were|be|being|been|has|have|had|it|he|"
    "she|they|we|you|i|who|which|while|there"
)


@SELECTORS.register
@dataclass(frozen=True)
class Concepts:
    """The `rows` that hold most of the wanted keywords. `keywords`: for each concept its words or phrases; those that
    fewer than `least` rows hold do not count. Of equals the first."""

    type: ClassVar[str] = "concepts"
    rows: int
    keywords: Mapping[str, list[str]]
    least: int = 1

    def __post_init__(self) -> None:
        at_least("select.concepts", self, 1, ("rows", "least"))
        lists = self.keywords.values() if isinstance(self.keywords, Mapping) else [None]
        if not any(lists) or not all(isinstance(words, list | tuple) for words in lists):
            raise ValueError("select.concepts keywords must be a table: for each concept a list of words")

    def choose(self, rows: Rows, chance: random.Random) -> list[int]:  # noqa: ARG002 - nothing is left to chance
        wanted = {
            word.lower(): re.compile(rf"\b{re.escape(word.lower())}\b")
            for each in self.keywords.values()
            for word in each
        }
        held = []
        for index in range(len(rows)):
            said = text(rows.bare(index)).lower()
            held.append({word for word, pattern in wanted.items() if pattern.search(said)})
        known = Counter(word for words in held for word in words)
        scores = [sum(known[word] >= self.least for word in words) for words in held]
        best = sorted(range(len(rows)), key=lambda index: (-scores[index], index))
        return sorted(best[: self.rows])


@SELECTORS.register
@dataclass(frozen=True)
class NounPhrases:
    """Captions so that each noun phrase that at least `least` of them hold is there, the rarest first, by at most `cap`
    of them each, at random. `column`: where a row keeps its phrases, a list; else runs of words between articles,
    prepositions and the like."""

    type: ClassVar[str] = "noun_phrases"
    cap: int = 100
    least: int = 3
    column: str | None = None

    def __post_init__(self) -> None:
        at_least("select.noun_phrases", self, 1, ("cap", "least"))

    def choose(self, rows: Rows, chance: random.Random) -> list[int]:
        holding: defaultdict[str, list[int]] = defaultdict(list)
        for index in range(len(rows)):
            row = rows.bare(index)
            said = phrases(text(row, "assistant")) if self.column is None else set(row.get(self.column) or ())
            for phrase in said:
                holding[phrase].append(index)
        kept: set[int] = set()
        for phrase in sorted(holding, key=lambda phrase: (len(holding[phrase]), phrase)):
            captions = holding[phrase]
            if len(captions) >= self.least:
                kept.update(captions if len(captions) <= self.cap else chance.sample(captions, self.cap))
        return sorted(kept)


def phrases(caption: str) -> set[str]:
    """Runs of words between those that end a noun phrase."""
    found, run = set[str](), list[str]()
    for piece in re.split(r"[^\w\s'’-]", caption.lower()):
        for word in [*WORD.findall(piece), ""]:
            if word and not BETWEEN.fullmatch(word):
                run.append(word)
            elif run:
                found.add(" ".join(run))
                run = []
    return found

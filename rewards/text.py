"""Words: equal answers, read text, chosen options, languages, repetition, JSON."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jsonschema
import regex
from rapidfuzz.distance import Levenshtein

from rewards.answer import final_answer
from rewards.base import Item
from rlhf.types import Score

LONGEST = 20_000  # characters that are looked at
CHINESE_MARKS = str.maketrans("，。；：！？（）【】、“”‘’", ",.;:!?()[],\"\"''")
SCRIPTS = {
    "en": "Latin",
    "zh": "Han",
    "ja": "Hiragana, Katakana, Han",
    "ko": "Hangul",
    "ru": "Cyrillic",
    "ar": "Arabic",
    "hi": "Devanagari",
    "th": "Thai",
    "he": "Hebrew",
    "el": "Greek",
}
LETTERS = {
    name: regex.compile("|".join(rf"\p{{Script={script}}}" for script in scripts.split(", ")))
    for name, scripts in SCRIPTS.items()
}
LETTER, KANA = regex.compile(r"\p{L}"), regex.compile(r"\p{Script=Hiragana}|\p{Script=Katakana}")
# is in no language: a boxed answer, commands of LaTeX, tags, and letters that stand alone, as variables do
NO_WORDS = re.compile(r"\\boxed\s*\{[^{}]{0,40}\}|\\[A-Za-z]{1,20}|</?[a-z]{1,20}>|(?<![^\W\d_])[A-Za-z](?![^\W\d_])")


def equal(item: Item, ordered: bool = True) -> Score:
    """1.0 where the final answer is the row's `answer` (or one of a list of them), else 0.0: without case, spacing,
    marks, width of letters (English and Chinese) and leading articles. Lists, parted by commas, semicolons or 、, are
    compared element by element; ordered = false: in any order."""
    truth = item.columns["answer"]
    said = final_answer(item.completion)[:LONGEST]
    right = any(_alike(said, str(one), ordered) for one in (truth if isinstance(truth, list) else [truth]))
    return Score("scored", float(right), note=f"{said!r:.80}, right is {truth!r}")


def choice(item: Item) -> Score:
    """1.0 where the final answer chooses the row's `answer`, a letter ("B", "(b)", "B. a cat", "选B"), else 0.0. With
    a column `choices` (a list, A the first) the words of the choice are as good as its letter. Two choices are none."""
    said, truth = final_answer(item.completion).strip(), str(item.columns["answer"])
    choices = [normal(str(one)) for one in item.columns.get("choices") or ()]
    letters = "".join(chr(ord("A") + place) for place in range(len(choices))) or "ABCDEFGHIJ"
    truth = letters[choices.index(normal(truth))] if normal(truth) in choices else truth.strip(" ().[]:").upper()
    if len(truth) != 1 or truth not in letters:
        return Score("failed", note=f"the row's answer {truth!r} is none of the choices {letters}")
    if normal(said) in choices:
        found = {letters[choices.index(normal(said))]}
    else:
        marked = re.match(rf"[\s(\[（]*([{letters}{letters.lower()}])\s*(?:[)\].:：）,，]|$)", said)
        # "I" and "A dog" are words
        loose = re.findall(rf"(?<![A-Za-z])(?!I\b|A\s+(?!or\b|and\b)[a-z])([{letters}])(?![A-Za-z'’])", said[:LONGEST])
        found = {marked[1].upper()} if marked and len({*loose}) < 2 else {*loose}
    right = found == {truth}
    return Score("scored", float(right), note=f"chose {', '.join(sorted(found)) or 'nothing'}, right is {truth}")


def anls(item: Item, threshold: float = 0.5) -> Score:
    """ANLS (arXiv:1905.13648): 1 − the edit distance over the longer length, without case and with single spaces, of
    the best of the row's `answer` (a text or a list of them); 0 where that is below the threshold."""
    truth = item.columns["answer"]
    said = " ".join(final_answer(item.completion)[:LONGEST].casefold().split())
    likeness = max(
        Levenshtein.normalized_similarity(said, " ".join(str(one).casefold().split()))
        for one in (truth if isinstance(truth, list) else [truth])
    )
    return Score("scored", likeness if likeness >= threshold else 0.0, note=f"{said!r:.80}, likeness {likeness:.3f}")


def language(item: Item, wanted: str | None = None, share: float = 0.9) -> Score:
    """1.0 where at least this share of the completion's letters are of one script: of `wanted` (SCRIPTS), else of that
    which most of the question's letters have; else 0.0. A short boxed answer, LaTeX's commands, tags and single letters
    are left out; without other letters a completion is in any language, and so is the answer to such a question.
    Japanese has kana: Chinese characters alone are Chinese."""
    asked = wanted or _language(_words(item.question))
    if asked is None:
        return Score("scored", 1.0, note="the question has no letters")
    if asked not in LETTERS:
        raise ValueError(f"language {asked!r} is none of {', '.join(LETTERS)}")
    text = _words(item.completion)
    total = len(LETTER.findall(text))
    part = len(LETTERS[asked].findall(text)) / total if total else 1.0
    if asked == "ja" and total and _language(text) == "zh":
        part = 0.0
    return Score("scored", float(part >= share), note=f"{part:.2f} of its letters are {asked}")


def _words(text: str) -> str:
    return NO_WORDS.sub(" ", text[:LONGEST])


def _language(text: str) -> str | None:
    """That of most letters; None where there are none."""
    found = {name: len(pattern.findall(text)) for name, pattern in LETTERS.items()}
    if 20 * len(KANA.findall(text)) < found["ja"]:  # a kana or two are quoted
        del found["ja"]
    best = max(found, key=lambda name: found[name])
    return best if found[best] else None


def repetition(item: Item, words: int = 4) -> Score:
    """The share of the completion's runs of so many words (characters where it is Chinese) that are not repetitions:
    1.0 where every one is there once, near 0 for one that goes round in circles."""
    text = item.completion[:LONGEST]
    parts = re.findall(r"[\u3400-\u9fff]|[^\s\u3400-\u9fff]+", text.casefold())
    runs = Counter(tuple(parts[place : place + words]) for place in range(len(parts) - words + 1))
    total = sum(runs.values())
    return Score("scored", len(runs) / total if total else 1.0, note=f"{len(runs)} of {total} runs are new")


def schema(item: Item, of: Mapping[str, Any] | None = None) -> Score:
    """1.0 where the final answer is JSON (a ```json block, or all after the chain) and fits the JSON schema `of`,
    or that of the row's column `schema`; else 0.0, with the fault as note."""
    wanted = of if of is not None else item.columns["schema"]
    wanted = json.loads(wanted) if isinstance(wanted, str) else wanted
    after = item.completion.rpartition("</think>")[2].strip()[:LONGEST]
    block = re.search(r"```(?:json)?\s*(.*?)```", after, re.DOTALL)
    # what is JSON as it stands may hold "the answer is" in a text of its own
    text = block[1] if block else after if after.startswith(("{", "[")) else final_answer(item.completion)[:LONGEST]
    try:
        said = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or a number of too many digits
        return Score("scored", 0.0, note=f"not JSON: {error}")
    fault = next(jsonschema.validators.validator_for(wanted)(wanted).iter_errors(said), None)
    return Score("scored", 0.0 if fault else 1.0, note=f"{fault.json_path}: {fault.message}" if fault else "")


def normal(text: str) -> str:
    """Without case, spacing, marks at the ends, width of letters and a leading article."""
    text = unicodedata.normalize("NFKC", text).translate(CHINESE_MARKS).casefold()
    text = re.sub(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}", r"\1", text).strip(" .,;:!?\"'$\t\n")
    text = re.sub(r"^(?:the|an|a)\s+", "", text)
    return " ".join(text.split())


def _alike(said: str, truth: str, ordered: bool) -> bool:
    one, other = ([normal(part) for part in re.split(r"[,;，；、]", text)] for text in (said, truth))
    one, other = ([part for part in parts if part] for parts in (one, other))
    return one == other if ordered else Counter(one) == Counter(other)

"""What a judge is asked and how its reply is read: shared by the judge's training rows and its use as a reward."""

from __future__ import annotations

import re

TAGS = re.compile(r"</?think>")
VERDICT = re.compile(r"\b(yes|no)\b", re.IGNORECASE)
SOUND = "question: {question} reply: {completion} sound?"
RATED = "caption: {completion} score?"


def judge_question(question: str, chain_text: str) -> str:
    """The words put to the judge beside the image: is every step of this reply right, and does its answer follow?
    `chain_text` is the whole completion; think tags are taken out, white space is squeezed."""
    return SOUND.format(question=question, completion=squeezed(chain_text))


def squeezed(text: str) -> str:
    """On one line, without think tags."""
    return " ".join(TAGS.sub(" ", text).split())


def rate_question(caption: str) -> str:
    """The words put to a judge that rates a caption beside its image from 1 to 5."""
    return RATED.format(completion=caption)


def parse_verdict(reply: str) -> bool | None:
    """The last yes or no of the judge's reply; None when there is neither."""
    words = VERDICT.findall(reply)
    return words[-1].lower() == "yes" if words else None

"""Pictures with words that belong to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from rlhf.data.formatters import FORMATTERS, Find, column, one_of_many, pictures, turn, without, wordings
from rlhf.data.rows import DataError, Row


@FORMATTERS.register
@dataclass(frozen=True)
class Caption:
    """Column `caption` is the answer to a picture shown with one of `prompts` ("": the picture alone, as LLaVA's first
    stage has it)."""

    type: ClassVar[str] = "caption"
    prompts: tuple[str, ...] = ("",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", wordings("caption prompts", self.prompts))

    def form(self, row: Row, find: Find) -> Row:  # noqa: ARG002
        shown, caption = pictures(row), column(row, "caption", str)
        asked = turn("user", one_of_many(self.prompts, row), len(shown))
        return without(row) | {"images": shown, "messages": [asked, turn("assistant", caption)]}


@FORMATTERS.register
@dataclass(frozen=True)
class OcrList:
    """Column `words`, in reading order, is the answer to one of `prompts` (LLaVAR 2306.17107)."""

    type: ClassVar[str] = "ocr_list"
    prompts: tuple[str, ...] = ("Identify any text visible in the image provided.", "List the text in the picture.")
    joint: str = " "

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", wordings("ocr_list prompts", self.prompts))

    def form(self, row: Row, find: Find) -> Row:  # noqa: ARG002
        words, shown = column(row, "words", list), pictures(row)
        if not words or not all(isinstance(word, str) for word in words):
            raise DataError(f"column 'words' must be a list of words that are seen, and is {words!r}")
        asked = turn("user", one_of_many(self.prompts, row), len(shown))
        return without(row) | {"images": shown, "messages": [asked, turn("assistant", self.joint.join(words))]}


@FORMATTERS.register
@dataclass(frozen=True)
class SignalTokens:
    """Column `caption` is asked for in words, and the answer is a signal's `tokens` (NExT-GPT 2309.05519, section 4.2:
    captions alone, no pictures)."""

    type: ClassVar[str] = "signals"
    tokens: tuple[str, ...]
    prompt: str = "Draw: {caption}"

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", wordings("signals tokens", self.tokens))

    def form(self, row: Row, find: Find) -> Row:  # noqa: ARG002
        caption: Any = column(row, "caption", str)
        asked = turn("user", self.prompt.replace("{caption}", caption))
        messages = [asked, turn("assistant", "".join(self.tokens))]
        return without(row) | {"images": [], "messages": messages, "signal": caption}

"""Conversations of several pictures, and how answers are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from rlhf.data.formatters import FORMATTERS, Find, column, pictures, turn, without
from rlhf.data.rows import DataError, Row
from rlhf.slots import at_least


@FORMATTERS.register
@dataclass(frozen=True)
class Interleaved:
    """A page: columns `texts` and `images`, lists of one length in the page's order, each place either words or a
    picture (null in the other). A picture is shown, and the words after it are a reply, all of which are learned with
    chat.supervise = "all"; words before the first picture are shown with it. At most `most` pictures (Flamingo
    2204.14198: 5); a page ends before one that is too many, and before pictures without words after them."""

    type: ClassVar[str] = "interleaved"
    most: int = 5

    def __post_init__(self) -> None:
        at_least("format.interleaved", self, 1, ("most",))

    def form(self, row: Row, find: Find) -> Row:  # noqa: ARG002
        texts, images = column(row, "texts", list), column(row, "images", list)
        if len(texts) != len(images):
            raise DataError(f"columns 'texts' and 'images' have {len(texts)} and {len(images)} places; make them equal")
        messages, kept, shown, words = list[Row](), list[Any](), list[Row](), list[str]()
        for text, image in zip(texts, images, strict=True):
            if image is None:
                if kept and str(text or "").strip():
                    words.append(str(text))
                elif str(text or "").strip():
                    shown.append({"type": "text", "text": str(text)})
                continue
            if words:
                messages += [{"role": "user", "content": shown}, turn("assistant", " ".join(words).strip())]
                shown, words = [], []
            if len(kept) == self.most:
                break
            kept.append(image)
            shown.append({"type": "image"})
        if words:
            messages += [{"role": "user", "content": shown}, turn("assistant", " ".join(words).strip())]
            shown = []
        if not messages:
            raise DataError("no words follow a picture, so there is nothing to learn; leave the row out")
        unsaid = sum(part["type"] == "image" for part in shown)
        return without(row, "texts") | {"images": kept[: len(kept) - unsaid], "messages": messages}


@FORMATTERS.register
@dataclass(frozen=True)
class InContext:
    """Columns `instruction`, `answer` and `related`, the ids of rows that come before it as examples, each with its own
    pictures (MIMIC-IT 2306.05425). With chat.supervise = "all" their answers are learned too, as in Otter."""

    type: ClassVar[str] = "in_context"
    most: int = 8

    def __post_init__(self) -> None:
        at_least("format.in_context", self, 1, ("most",))

    def form(self, row: Row, find: Find) -> Row:
        related = column(row, "related", list, [])[: self.most]
        messages, shown = list[Row](), list[Any]()
        for one in (*map(find, map(str, related)), row):
            images = pictures(one)
            messages.append(turn("user", column(one, "instruction", str), len(images)))
            messages.append(turn("assistant", column(one, "answer", str)))
            shown += images
        # `answer` stays: rewards and evaluation look for it
        return without(row, "instruction", "related") | {"images": shown, "messages": messages}


@FORMATTERS.register
@dataclass(frozen=True)
class ResponseFormat:
    """To the last question is added how it is to be answered, by the value of column `by` (LLaVA-1.5 2310.03744)."""

    type: ClassVar[str] = "response_format"
    by: str = "kind"
    prompts: Mapping[str, str] = field(
        default_factory=lambda: {
            "short": "Answer the question using a single word or phrase.",
            "choice": "Answer with the option's letter from the given choices directly.",
        }
    )

    def form(self, row: Row, find: Find) -> Row:  # noqa: ARG002
        added = self.prompts.get(str(row.get(self.by)))
        messages = column(row, "messages", list)
        last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
        if added is None or last is None:
            return row
        content = messages[last]["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
        asked = {**messages[last], "content": [*parts, {"type": "text", "text": f"\n{added}"}]}
        return row | {"messages": [*messages[:last], asked, *messages[last + 1 :]]}


@FORMATTERS.register
@dataclass(frozen=True)
class Frames:
    """A video: of column `frames` at most `most`, evenly spaced, before `instruction`; `answer` is learned (LLaMA-VID
    2311.17043: one a second, two tokens each)."""

    type: ClassVar[str] = "frames"
    most: int = 64

    def __post_init__(self) -> None:
        at_least("format.frames", self, 1, ("most",))

    def form(self, row: Row, find: Find) -> Row:  # noqa: ARG002
        frames = column(row, "frames", list)
        if not frames:
            raise DataError("column 'frames' is empty; leave the row out")
        count = min(self.most, len(frames))
        kept = [frames[int((place + 0.5) * len(frames) / count)] for place in range(count)]
        messages = [turn("user", column(row, "instruction", str), count), turn("assistant", column(row, "answer", str))]
        return without(row, "frames", "instruction") | {"images": kept, "messages": messages}

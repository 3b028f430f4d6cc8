"""From a row to what a model sees: a Prompt to be answered, a Sample to be learned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from rlhf.data.rows import DataError, Row
from rlhf.recipe import Chat
from rlhf.types import Media, Prompt, Sample

CHOSEN, REJECTED = "/chosen", "/rejected"  # how the keys of a pair's samples end


class Processor(Protocol):
    """What formatting asks of the bridge's processor (or of any Hugging Face one wrapped alike)."""

    tokenizer: PreTrainedTokenizerBase
    image_token_id: int

    def expand(self, token_ids: list[int], sizes: list[tuple[int, int]]) -> list[int]:
        """token_ids with each placeholder repeated as its image (width, height) needs."""
        ...


def as_prompt(
    row: Mapping[str, Any], source: str, index: int, tokenizer: PreTrainedTokenizerBase, think: bool, chat: Chat
) -> Prompt:
    """The row as a question: a trailing assistant message is left out, the thinking suffix added to the last user
    text when `think`, and the generation prompt appended. Ids are un-expanded.

    Raises DataError naming source and row for a row without a user message, or whose image marks and images differ.
    """
    where = f"source {source!r}, row {index}"
    messages = _asked(row["messages"])
    media = tuple(row.get("images") or ())
    messages = _with_images(messages, media, where)
    question = _question(messages, where)
    media = _with_questions(messages, media, tokenizer)
    if think:
        messages = _with_suffix(messages, chat.think_suffix)
    text = _render(tokenizer, messages, generate=True)
    ids = _ids(tokenizer, text)
    _check_placeholders(tokenizer, ids, media, where)
    columns = {name: value for name, value in row.items() if name not in {"messages", "images"}}
    key = f"{source}/{index}" + ("#think" if think else "")
    return Prompt(key, source, question, ids, media, think, columns)


def as_prompts(
    drawn: Iterable[tuple[str, int, Row]], tokenizer: PreTrainedTokenizerBase, think: bool, chat: Chat
) -> list[Prompt]:
    """Rows as drawn from a stream (source, index, row) as questions. One that is drawn twice gets a key of its own, or
    the engine, which seeds by key, would answer it twice alike."""
    prompts, times = list[Prompt](), Counter[str]()
    for source, index, row in drawn:
        prompt = as_prompt(row, source, index, tokenizer, think, chat)
        again = times[prompt.key]
        times[prompt.key] += 1
        prompts.append(replace(prompt, key=f"{prompt.key}~{again}") if again else prompt)
    return prompts


def as_sample(
    row: Mapping[str, Any], source: str, index: int, processor: Processor, think: bool | None, chat: Chat
) -> Sample:
    """The row as a question and the answer to learn: the last assistant message, end token included; or, where `chat`
    says so, every assistant message, what stands between them being read and not learned.

    think None takes the row's boolean column `think` (False where there is none); column `signal` is what the answer's
    signal tokens are to say. Prompts and answers are tokenised apart and joined as ids, as in generation. Raises
    DataError as `as_prompt`, and when no answer ends the row.
    """
    messages = row["messages"]
    where = f"source {source!r}, row {index}"
    if not messages or messages[-1]["role"] != "assistant":
        raise DataError(f"{where}: no assistant message at the end, so there is nothing to learn; add the answer")
    with_think = bool(row.get("think") or False) if think is None else think
    prompt = as_prompt(row, source, index, processor.tokenizer, with_think, chat)
    replies = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if chat.supervise == "last" or len(replies) == 1:
        pieces = [prompt.token_ids]
        replies = replies[-1:]
    else:
        pieces = _pieces(row, replies, processor.tokenizer, with_think, chat, where)
    ids, skipped, sizes = tuple[int, ...](), list[tuple[int, int]](), [item.size for item in prompt.media]
    for piece, place in zip(pieces, replies, strict=True):
        shown = len(sizes) if len(pieces) == 1 else piece.count(processor.image_token_id)
        read = tuple(processor.expand(list(piece), sizes[:shown]))
        del sizes[:shown]
        skipped.append((len(ids), len(ids) + len(read)))
        ids += read + reply_ids(processor.tokenizer, _text(messages[place]), where)
    signal = str(row.get("signal") or "")
    return Sample(prompt.key, ids, skipped[0][1], prompt.media, skipped=tuple(skipped[1:]), signal=signal)


def _pieces(
    row: Mapping[str, Any],
    replies: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    think: bool,
    chat: Chat,
    where: str,
) -> list[tuple[int, ...]]:
    """Ids of what stands before each reply, after the one before it."""
    messages, end = _with_images(row["messages"], tuple(row.get("images") or ()), where), str(tokenizer.eos_token)
    if think:
        messages = [*_with_suffix(messages[:-1], chat.think_suffix), messages[-1]]
    pieces, before = list[tuple[int, ...]](), ""
    for place in replies:
        text = _render(tokenizer, messages[:place], generate=True)
        if not text.startswith(before):
            raise DataError(
                f"{where}: the tokenizer's chat template writes earlier turns otherwise once there are later ones, so "
                'only the last reply can be learned as it was generated; set chat.supervise = "last"'
            )
        pieces.append(_ids(tokenizer, text[len(before) :]))
        told = _render(tokenizer, messages[: place + 1], generate=False)
        before = told[: told.rindex(end) + len(end)] if end in told else told
    return pieces


def as_pair(row: Mapping[str, Any], source: str, index: int, processor: Processor, chat: Chat) -> list[Sample]:
    """The row's question with the chosen reply, its last message, and with the one in its column `rejected`: a text, or
    messages that end in it. Raises DataError as `as_sample`, and where a reply is missing or both are the same."""
    where, rejected = f"source {source!r}, row {index}", row.get("rejected")
    last = rejected[-1] if isinstance(rejected, list) and rejected else {"role": "assistant", "content": rejected}
    if not isinstance(last, dict) or last.get("role") != "assistant" or not isinstance(last.get("content"), str | list):
        raise DataError(
            f"{where}: no `rejected` reply; a row of preferences has messages that end in the chosen reply, and the "
            "other one as text in `rejected` (or `prompt`, `chosen` and `rejected` as lists of messages)"
        )
    if isinstance(rejected, list) and rejected[:-1] and _plain(rejected[:-1]) != _plain(row["messages"][:-1]):
        raise DataError(
            f"{where}: the chosen and the rejected reply answer different conversations; both must begin alike"
        )
    chosen = as_sample(row, source, index, processor, None, chat.model_copy(update={"supervise": "last"}))
    other = reply_ids(processor.tokenizer, _text(last), where)
    asked = chosen.token_ids[: chosen.prompt_length]
    if asked + other == chosen.token_ids:
        raise DataError(f"{where}: the chosen and the rejected reply are the same; remove the row")
    return [
        replace(chosen, key=chosen.key + CHOSEN),
        replace(chosen, key=chosen.key + REJECTED, token_ids=asked + other),
    ]


def _plain(messages: list[Row]) -> list[tuple[str, str]]:
    return [(message["role"], _text(message)) for message in messages]


def _asked(messages: list[Row]) -> list[Row]:
    if messages and messages[-1]["role"] == "assistant":
        return messages[:-1]
    return messages


def _with_images(messages: list[Row], media: tuple[Media, ...], where: str) -> list[Row]:
    marks = sum(part["type"] == "image" for m in messages if not isinstance(m["content"], str) for part in m["content"])
    if marks == len(media):
        return messages
    if marks:
        raise DataError(f"{where}: {marks} image marks in the messages, but {len(media)} images; make them equal")
    # the ecosystem's short form: images given, no marks; they stand before the first user text
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise DataError(f"{where}: images, but no user message that could show them")
    pictures = [{"type": "image"} for _ in media]
    shown = {"role": "user", "content": [*pictures, *_parts(messages[first]["content"])]}
    return [*messages[:first], shown, *messages[first + 1 :]]


def _with_questions(
    messages: list[Row], media: tuple[Media, ...], tokenizer: PreTrainedTokenizerBase
) -> tuple[Media, ...]:
    """The media, each with the words of the message that shows it."""
    shown = [_text(m) for m in messages for part in _parts(m["content"]) if part["type"] == "image"]
    return tuple(replace(item, question=_ids(tokenizer, text.strip())) for item, text in zip(media, shown, strict=True))


def _question(messages: list[Row], where: str) -> str:
    if not messages or messages[-1]["role"] != "user":
        raise DataError(f"{where}: the question must end in a user message")
    return _text(messages[-1])


def _with_suffix(messages: list[Row], suffix: str) -> list[Row]:
    parts = _parts(messages[-1]["content"])
    last = max((i for i, part in enumerate(parts) if part["type"] == "text"), default=None)
    if last is None:
        parts = [*parts, {"type": "text", "text": suffix}]
    else:
        parts[last] = {"type": "text", "text": f"{parts[last]['text']} {suffix}"}
    return [*messages[:-1], {"role": "user", "content": parts}]


def _parts(content: Any) -> list[Row]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _text(message: Row) -> str:
    return "".join(part["text"] for part in _parts(message["content"]) if part["type"] == "text")


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Row], generate: bool) -> str:
    # text-only templates of other models know strings only
    plain = [
        {**m, "content": _text(m)} if all(p["type"] == "text" for p in _parts(m["content"])) else m for m in messages
    ]
    return str(tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=generate))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def reply_ids(tokenizer: PreTrainedTokenizerBase, answer: str, where: str) -> tuple[int, ...]:
    """An answer's ids, end token included. Raises DataError where the tokenizer has none, or the answer spells it."""
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError(f"{where}: the tokenizer has no end token (eos_token); set one, it ends every answer")
    ids = _ids(tokenizer, answer)
    if end in ids:
        raise DataError(f"{where}: the answer spells the end token {tokenizer.eos_token!r}; remove it, it is added")
    return (*ids, int(end))


def _check_placeholders(
    tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...], media: tuple[Media, ...], where: str
) -> None:
    placeholder = getattr(tokenizer, "image_token_id", None)
    if placeholder is not None and ids.count(placeholder) != len(media):
        raise DataError(
            f"{where}: {ids.count(placeholder)} image placeholders after rendering, but {len(media)} images; "
            f"the text may spell {tokenizer.convert_ids_to_tokens(placeholder)!r} itself: remove it"
        )

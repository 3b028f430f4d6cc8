"""A small byte-level BPE tokenizer, trained on the recipe's own text, or one that was published."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf.data.rows import ROLES
from rlhf.recipe import Chat

PAD, EOS, IMAGE, THINK, END_THINK = "<pad>", "<eos>", "<image>", "<think>", "</think>"
SPECIAL = (PAD, EOS, IMAGE, THINK, END_THINK, *(f"<{role}>" for role in ROLES))

# No white space of its own: every token of the template costs positions in every row.
TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<' + message['role'] + '>' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '<image>' -}}{%- else -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- if message['role'] == 'assistant' -%}{{- '<eos>' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<assistant>' -}}{%- endif -%}"
)


# Of a template that knows text alone: before it, messages whose content is in parts get it as one string.
FLAT = (
    "{%- set flat = namespace(messages=[]) -%}"
    "{%- for message in messages -%}{%- set body = namespace(text='') -%}"
    "{%- if message['content'] is string -%}{%- set body.text = message['content'] -%}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- set body.text = body.text + ('<image>' if part['type'] == 'image' else part['text']) -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- set flat.messages = flat.messages + [dict(message, content=body.text)] -%}{%- endfor -%}"
    "{%- set messages = flat.messages -%}"
)


def adopt_tokenizer(folder: Path, marks: Sequence[str] = ()) -> PreTrainedTokenizerBase:
    """A published language model's tokenizer, taught what it lacks of <pad>, <image>, <think>, </think> and `marks`.
    Its chat template is kept, with pictures as <image> in the text; one without a template gets that of
    `train_tokenizer`. Raises ValueError for a tokenizer without an end token."""
    tokenizer = AutoTokenizer.from_pretrained(str(folder), extra_special_tokens={"image_token": IMAGE})
    if tokenizer.eos_token is None:
        raise ValueError(f"model.tokenizer.path: the tokenizer in {folder} has no eos_token, which ends every answer")
    wanted = [THINK, END_THINK, *dict.fromkeys(marks)]
    if tokenizer.chat_template is None:
        wanted += [f"<{role}>" for role in ROLES]
    known = tokenizer.get_vocab()
    special: dict[str, Any] = {"additional_special_tokens": [mark for mark in wanted if mark not in known]}
    if tokenizer.pad_token is None:
        special["pad_token"] = PAD
    tokenizer.add_special_tokens(special, replace_extra_special_tokens=False)
    ours, own = TEMPLATE.replace(EOS, str(tokenizer.eos_token)), tokenizer.chat_template
    tokenizer.chat_template = ours if own is None else FLAT + own
    return tokenizer


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, chat: Chat, marks: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Learn byte-level BPE merges from `texts` (and from the thinking suffix, as if every second text had it).

    No token holds more than one digit; a space may lead one. Special tokens: <pad>, <eos> (ends the assistant's
    turn: the stop token), <image>, <think>, </think>, a mark for each role, and `marks`. The chat template travels with
    the tokenizer. The result has at most `vocab_size` tokens. Raises ValueError if that is less than bytes and special
    tokens need.
    """
    special = [*SPECIAL, *(mark for mark in dict.fromkeys(marks) if mark not in SPECIAL)]
    least = 256 + len(special)
    if vocab_size < least:
        raise ValueError(
            f"model.tokenizer.vocab_size = {vocab_size}: 256 bytes and {len(special)} marks need at least {least}"
        )
    texts = list(texts)
    bodies = [*texts, *[chat.think_suffix] * (len(texts) // 2)]
    apart = re.compile("|".join(re.escape(token) for token in special))
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{N}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # marks are cut out first: they are tokens of their own and must not teach merges
    core.train_from_iterator((piece for body in bodies for piece in apart.split(body)), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        additional_special_tokens=[token for token in special if token not in (PAD, EOS, IMAGE)],
        extra_special_tokens={"image_token": IMAGE},
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer

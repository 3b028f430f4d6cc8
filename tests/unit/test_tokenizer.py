"""Tokenizers of bridges: taught marks, or taken from a published language model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import rlhf.bridge
from rlhf.data.tokenizer import adopt_tokenizer, train_tokenizer
from rlhf.models import build_model, marks_of
from rlhf.recipe import Chat, RecipeError, validate
from tests.unit.systems import CLIP, SINGLE
from tests.unit.test_bridge_build import DENSE

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
SHOWN = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many?"}]},
    {"role": "assistant", "content": "two"},
]


def published(folder: Path, template: str | None = TEMPLATE, end: str | None = "<end>") -> Path:
    """A language model's tokenizer, which knows nothing of pictures."""
    vocabulary = {token: i for i, token in enumerate(["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def test_a_published_tokenizer_keeps_its_words_and_its_template(tmp_path: Path) -> None:
    before = AutoTokenizer.from_pretrained(published(tmp_path / "lm"))
    adopt_tokenizer(tmp_path / "lm", ["<box>"]).save_pretrained(tmp_path / "bridge")
    found = AutoTokenizer.from_pretrained(tmp_path / "bridge")
    text = "how many? <end>"
    assert found.encode(text) == before.encode(text)
    for mark in ("<image>", "<think>", "</think>", "<box>", "<pad>"):
        assert len(found.encode(mark, add_special_tokens=False)) == 1, mark
    assert found.image_token_id == found.convert_tokens_to_ids("<image>")
    spelt = found.apply_chat_template(SHOWN, tokenize=False, add_generation_prompt=True)
    assert spelt == "[user]<image>how many?<end>[assistant]two<end>[assistant]"


def test_one_without_a_template_gets_ours(tmp_path: Path) -> None:
    found = adopt_tokenizer(published(tmp_path, template=None))
    assert found.apply_chat_template(SHOWN, tokenize=False) == "<user><image>how many?<assistant>two<end>"
    assert len(found.encode("<assistant>", add_special_tokens=False)) == 1


def test_one_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no eos_token"):
        adopt_tokenizer(published(tmp_path, end=None))


def recipe(tmp_path: Path, **decoder: int) -> dict[str, object]:
    bridge = {"vision": CLIP, "tiler": SINGLE, "decoder": DENSE | decoder}
    stage = {"name": "s", "kind": "sft", "data": {"a": 1.0}, "steps": 1, "batch_size": 1}
    model = {"bridge": bridge, "tokenizer": {"path": str(tmp_path / "lm")}}
    return {"name": "r", "model": model, "data": {"a": {"path": "rows.jsonl"}}, "stages": [stage]}


@torch.no_grad()
def test_a_published_decoder_brings_its_words(tmp_path: Path) -> None:
    """The rows of its embedding stand for the same text; there is room for the marks after them."""
    published(tmp_path / "lm")
    sizes = {key: value for key, value in DENSE.items() if key != "type"}
    decoder = Qwen3ForCausalLM(Qwen3Config(**sizes, vocab_size=280)).eval()
    decoder.save_pretrained(tmp_path / "weights")
    build_model(validate(recipe(tmp_path, vocab_size=280), "test"), {}, tmp_path / "model")
    model, processor = rlhf.bridge.load(tmp_path / "model")
    made, _, _ = rlhf.bridge.rebuild(model, processor, {}, {"decoder": tmp_path / "weights"}, 0)
    ids = processor.tokenizer("how many?", return_tensors="pt").input_ids
    torch.testing.assert_close(made(ids).logits, decoder(ids).logits, atol=1e-6, rtol=0)


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"decoder.vocab_size is that of the language model; give it"):
        validate(recipe(tmp_path), "test")
    both = recipe(tmp_path, vocab_size=280)
    both["model"]["tokenizer"]["vocab_size"] = 300  # type: ignore[index]
    with pytest.raises(RecipeError, match="`vocab_size` is of a tokenizer to train"):
        validate(both, "test")
    published(tmp_path / "lm")
    with pytest.raises(ValueError, match=r"decoder.vocab_size 258 is below the tokenizer's"):
        build_model(validate(recipe(tmp_path, vocab_size=258), "test"), {}, tmp_path / "model")


def test_marks_of_a_recipe_are_tokens(tmp_path: Path) -> None:
    bridge = {"vision": CLIP, "tiler": SINGLE, "connector": {"type": "mlp", "kind": "linear"}, "decoder": DENSE}
    table = {
        "name": "marks",
        "model": {"bridge": bridge, "tokenizer": {"vocab_size": 300, "marks": ["<judge>", "</judge>"]}},
        "stages": [{"name": "measured", "kind": "evaluate"}],
    }
    build_model(validate(table, "test"), {}, tmp_path)
    found = AutoTokenizer.from_pretrained(tmp_path)
    assert [len(found.encode(mark, add_special_tokens=False)) for mark in ("<judge>", "</judge>")] == [1, 1]
    assert found.decode(found.encode("<judge>a</judge>", add_special_tokens=False)) == "<judge>a</judge>"


def test_marks_of_a_packer_are_tokens_of_a_trained_one() -> None:
    marks = list(
        marks_of({"packer": {"type": "segments", "wrap": ["<img>", "</img>"], "between": ",", "row_end": "\n"}})
    )
    assert marks == ["<img>", "</img>"]
    tokenizer = train_tokenizer(["one, two <img>"] * 3, 300, Chat(), marks)
    assert [len(tokenizer.encode(mark, add_special_tokens=False)) for mark in (*marks, ",", "\n")] == [1, 1, 1, 1]

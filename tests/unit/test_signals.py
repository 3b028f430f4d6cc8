"""NExT-GPT's head: signals in an answer become the condition of an image generator. T14 of the bridges."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from actors.signals import Target
from rlhf.architecture import from_bridge, from_folder
from rlhf.batching import BridgeVisual, collate
from rlhf.bridge import load, rebuild
from rlhf.bridge.heads import HEADS
from rlhf.data.digits import build
from rlhf.data.formatting import as_sample
from rlhf.data.rows import DataError
from rlhf.data.tokenizer import TEMPLATE
from rlhf.packing import attend_by_row
from rlhf.recipe import Chat
from rlhf.types import Sample
from tests.unit.systems import CLIP, SINGLE
from tests.unit.test_bridge_build import DENSE, tiny
from tests.unit.test_packing import media

TOKENS = ["[IMG0]", "[IMG1]"]
HEAD = {"type": "signals", "width": 12, "heads": 2, "layers": 2, "feed": 20, "length": 5, "out": 8}
BRIDGE = {
    "vision": CLIP,
    "encoder": {"type": "tower", "feature": "cls"},
    "tiler": SINGLE,
    "connector": {"type": "mlp", "kind": "linear"},
    "packer": {"type": "segments"},
    "decoder": DENSE,
    "head": HEAD | {"tokens": TOKENS},
}


def bridge():
    model, processor = tiny(marks=TOKENS, **BRIDGE)
    return model, processor, [processor.tokenizer.convert_tokens_to_ids(token) for token in TOKENS]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_the_head_is_torchs_transformer():
    torch.manual_seed(0)
    head = HEADS.make(HEAD | {"tokens": [4, 5]}).build(8, 16, 300).eval()
    theirs = nn.Transformer(12, 2, 2, 2, 20, dropout=0.0, batch_first=True, norm_first=True).eval()
    own = head.state_dict()
    theirs.load_state_dict({name: own[name] for name in theirs.state_dict()})
    states = torch.randn(3, 2, 16)
    asked = head.queries[None].repeat(3, 1, 1)
    expected = theirs(states @ head.entry.weight.T + head.entry.bias, asked) @ head.exit.weight.T + head.exit.bias
    found = head(states)
    assert found.shape == (3, 5, 8)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert (head(states.flip(1)) - found).abs().max() < 1e-4  # no positions: a set of states
    assert (head(states.flip(0)) - found).abs().max() > 1e-3


def test_the_plan_counts_it_and_a_folder_keeps_it(tmp_path):
    model, processor, tokens = bridge()
    count = sum(parameter.numel() for parameter in model.parameters())
    assert from_bridge(BRIDGE, model.config.text_config.vocab_size).parameters == count
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, _ = load(tmp_path)
    assert loaded.config.head == model.config.head
    assert loaded.config.head["tokens"] == tokens
    assert from_folder(tmp_path).tables["head"]["length"] == 5
    without, _, counts = rebuild(
        *tiny(**{k: v for k, v in BRIDGE.items() if k != "head"}), {"tiler": {"fit": "pad"}}, {}, 0
    )
    assert without.config.head is None
    assert counts["fresh"] == 0


def aligned(model, processor):
    return Target(model.config.head, processor.tokenizer, torch.device("cpu"))


def samples(tokens, shown=()):
    """Two rows with a signal, one of them after a picture, one without, and one that does not count."""
    drawn = (7, 8, *tokens)
    return [
        Sample("a", (20, 21, *drawn, 1), 2, signal="one two"),
        Sample("b", (30, 31, 32, 33, 1), 2),
        Sample("c", (2, 40, *tokens, 1), 2, (media(0, 40, 24),), signal="three"),
        Sample("d", (50, 51, *tokens, 1), 2, weight=0.0, signal="four"),
    ]


@pytest.mark.parametrize("packs", [False, True])
def test_signals_are_read_where_they_are_spelt(packs):
    model, processor, tokens = bridge()
    target = aligned(model, processor)
    rows = samples(tokens)
    tensors = collate(rows, BridgeVisual(processor, packs))
    places, captions = target.places(rows, tensors)
    assert captions == ["one two", "three"]
    given = tensors.given_ids()
    assert given[places].tolist() == [list(tokens)] * 2
    if packs:
        attend_by_row(model.model.language_model)
    with torch.no_grad():
        out = model(**tensors.model_inputs(), use_cache=False, signal_places=places)
        hidden = model.model(**tensors.model_inputs(), use_cache=False).last_hidden_state.flatten(0, 1)
        expected = model.model.head(hidden[places] + model.get_input_embeddings()(given[places]))
    torch.testing.assert_close(out.signals, expected, atol=1e-6, rtol=0)
    none = [rows[1]]
    places, captions = target.places(none, collate(none, BridgeVisual(processor, packs)))
    assert (places.tolist(), captions) == ([[0, 0]], [])
    wrong = [Sample("b", (30, 31, 32, 1), 2, signal="x")]
    tensors = collate(wrong, BridgeVisual(processor, packs))
    with pytest.raises(ValueError, match=r"sample b is to signal 'x', but its answer does not spell"):
        target.places(wrong, tensors)


def test_the_loss_is_a_distance_and_0_where_they_agree():
    model, processor, _ = bridge()
    target = aligned(model, processor)
    wanted = target(["one two", "three"])
    assert wanted.shape == (2, 5, 8)
    assert float(target.missed(wanted, ["one two", "three"])) == 0
    said = torch.randn(2, 5, 8, requires_grad=True)
    by_hand = sum(((said[i, t] - wanted[i, t]) ** 2).sum().sqrt() for i in range(2) for t in range(5)) / 5
    torch.testing.assert_close(target.missed(said, ["one two", "three"]), by_hand)
    target.missed(said, ["one two", "three"]).backward()
    assert said.grad.norm(dim=-1).sub(1 / 5).abs().max() < 1e-6  # of a norm, not of its square
    assert float(target.missed(said.detach(), []).detach()) == 0
    assert not any(parameter.requires_grad for parameter in target._encoder.parameters())


def test_a_published_encoder_must_fit(tmp_path):
    model, processor, _ = bridge()
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=300, max_position_embeddings=5)).save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    table = model.config.head | {"encoder": str(tmp_path)}
    assert Target(table, None, torch.device("cpu"))(["one"]).shape == (1, 5, 8)
    with pytest.raises(ValueError, match="embeds 5 tokens in 8 dimensions; set length and out so"):
        Target(table | {"length": 6}, None, torch.device("cpu"))


def test_rows_of_digits_to_draw():
    _, processor, tokens = bridge()
    processor.tokenizer.chat_template = TEMPLATE
    made = build("signals", 4, "train", 0, {"signals": TOKENS})
    sample = as_sample(made[0], "s", 0, processor, None, Chat())
    assert sample.signal == made[0]["signal"]
    assert list(sample.token_ids[sample.prompt_length : -1]) == list(tokens)
    with pytest.raises(DataError, match="needs the option signals"):
        build("signals", 1, "train", 0, {})
    assert SimpleNamespace(**made[0]).messages[0]["content"][0]["text"] == f"draw {made[0]['signal']}."

"""T5 in one sequence, against transformers' T5 in two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import T5ForConditionalGeneration

from rlhf.architecture import from_bridge, from_folder
from rlhf.batching import BridgeVisual, collate
from rlhf.bridge import load
from rlhf.bridge.builder import processor_of
from rlhf.bridge.positions import position_rows
from rlhf.data.tokenizer import TEMPLATE
from rlhf.plan.verdicts import implementations
from rlhf.types import Sample
from tests.unit.systems import ALL, CLIP, QFORMER, SINGLE
from tests.unit.test_bridge_build import tiny

T5 = {"type": "t5", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
T5 |= {"head_dim": 8, "buckets": 8, "distance": 12, "tie_word_embeddings": False}
BRIDGE = {"vision": CLIP, "encoder": ALL, "tiler": SINGLE, "connector": QFORMER, "decoder": T5}
CLOSE = {"atol": 1e-5, "rtol": 0}


def bridge(**changes):
    model, processor = tiny(**{**BRIDGE, "decoder": T5 | changes}, marks=["<assistant>"])
    with torch.no_grad():  # the usual initialisation leaves biases of positions too small to be heard
        for name, parameter in model.named_parameters():
            if "relative_attention_bias" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(3))
    return model.eval(), processor


def theirs_of(model):
    """transformers' own, with the same weights."""
    inner = model.model.language_model
    theirs = T5ForConditionalGeneration(inner.config.of_t5()).eval()
    for name in ("encoder", "decoder"):
        getattr(theirs, name).load_state_dict(getattr(inner, name).state_dict(), strict=False)
    with torch.no_grad():
        for table in (theirs.shared, theirs.encoder.embed_tokens, theirs.decoder.embed_tokens):
            table.weight.copy_(inner.embed_tokens.weight)
    theirs.lm_head = model.lm_head  # they tie it to the table, whatever the config says
    return theirs


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"gated": False}, {"decoder_layers": 1}, {"tie_word_embeddings": True}])
def test_logits_are_t5s(changes):
    """Rows of unlike prompts and replies, padded; the reference gets each prompt and each reply by itself."""
    model, _ = bridge(**changes)
    theirs, mark = theirs_of(model), model.config.reply_token_id
    rows = [
        ([10, 11, 12, mark], [20, 21, 22, 1]),
        ([13, mark], [23, 1]),
        ([14, 15, 16, 17, 18, 19, mark], [24, 25, 26]),
    ]
    width = max(len(asked) + len(said) for asked, said in rows)
    ids = torch.tensor([[*asked, *said] + [0] * (width - len(asked) - len(said)) for asked, said in rows])
    seen = torch.tensor([[1] * (len(a) + len(s)) + [0] * (width - len(a) - len(s)) for a, s in rows])
    found = model(input_ids=ids, attention_mask=seen, use_cache=False).logits
    for row, (asked, said) in zip(found, rows, strict=True):
        expected = theirs(
            input_ids=torch.tensor([asked]), decoder_input_ids=torch.tensor([[0, *said[:-1]]]), use_cache=False
        ).logits[0]
        torch.testing.assert_close(row[len(asked) - 1 : len(asked) + len(said) - 1], expected, **CLOSE)
        assert row[: len(asked) - 1].abs().max() == 0  # nothing foretells a prompt
    moved = ids.clone()
    moved[0, 0] += 1
    other = model(input_ids=moved, attention_mask=seen, use_cache=False).logits
    assert (other[0, 3:7] - found[0, 3:7]).abs().max() > 1e-4  # the control: the prompt is read
    assert (other[1:] - found[1:]).abs().max() == 0


@torch.no_grad()
def test_a_reply_is_read_from_left_to_right_and_the_prompt_from_both_sides():
    model, _ = bridge()
    mark = model.config.reply_token_id
    ids = torch.tensor([[10, 11, 12, mark, 20, 21, 22]])
    found = model(input_ids=ids, use_cache=False).logits
    later = ids.clone()
    later[0, 5] = 30
    assert (model(input_ids=later, use_cache=False).logits[0, :5] - found[0, :5]).abs().max() == 0
    assert (model(input_ids=later, use_cache=False).logits[0, 5] - found[0, 5]).abs().max() > 1e-4


@torch.no_grad()
def test_pictures_go_through_the_encoder():
    model, processor = bridge()
    mark, image = model.config.reply_token_id, processor.image_token_id
    ids = torch.tensor([processor.expand([10, image, 11, mark, 20, 21], [(16, 16)])])
    shown = [torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    one, other = (model(input_ids=ids, pixel_values=pixels, use_cache=False).logits for pixels in shown)
    assert (one[0, -3:] - other[0, -3:]).abs().max() > 1e-5
    inner, theirs = model.model, theirs_of(model)
    embeds = inner._scatter(ids, inner.get_input_embeddings()(ids), pixel_values=shown[0])
    length = ids.shape[1] - 2
    expected = theirs(
        inputs_embeds=embeds[:, :length], decoder_input_ids=torch.tensor([[0, 20, 21]]), use_cache=False
    ).logits
    torch.testing.assert_close(one[:, length - 1 :], expected, **CLOSE)


def test_where_a_prompt_ends():
    model, processor = bridge()
    geometry, mark, image = model.config.geometry, model.config.reply_token_id, processor.image_token_id
    rows = torch.tensor([[10, 11, mark, 12, mark], [10, image, 11, 12, 13], [10, 11, 12, 13, 14]])
    positions = position_rows(rows, geometry)
    assert (positions[1] - positions[0]).tolist() == [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]
    assert positions[0].tolist() == [list(range(5))] * 3


def test_gradients_reach_both_stacks_and_a_folder_keeps_everything(tmp_path: Path):
    model, processor = bridge()
    mark = model.config.reply_token_id
    tensors = collate(
        [Sample("a", (10, 11, mark, 20, 21, 1), 3), Sample("b", (10, mark, 30, 1), 2)], BridgeVisual(processor)
    )
    out = model.train()(**tensors.model_inputs(), use_cache=False)
    out.logits.log_softmax(-1)[0, 2:5].sum().backward()
    inner = model.model.language_model
    for stack in (inner.encoder, inner.decoder):
        assert all(parameter.grad is not None for parameter in stack.parameters())
        assert sum(float(parameter.grad.abs().sum()) > 0 for parameter in stack.parameters()) > 5
    count = sum(parameter.numel() for parameter in model.parameters())
    described = from_bridge({**BRIDGE}, model.config.text_config.vocab_size)
    assert described.parameters == count
    assert described.served == "huggingface"
    assert implementations("auto", described) == ("huggingface",)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, again = load(tmp_path)
    assert from_folder(tmp_path).served == "huggingface"
    assert again.geometry == processor.geometry
    assert loaded.config.reply_token_id == mark
    ids = torch.tensor([[10, 11, mark, 20]])
    with torch.no_grad():
        found = [each.eval()(input_ids=ids, use_cache=False).logits for each in (model, loaded)]
    assert (found[0] - found[1]).abs().max() == 0


def test_what_it_cannot_do_is_told():
    model, processor = bridge()
    processor.tokenizer.chat_template = TEMPLATE.replace("<assistant>", "assistant:")
    with pytest.raises(ValueError, match="chat template does not end prompts with it, but with"):
        processor_of(model.config, processor.tokenizer)
    processor.tokenizer.chat_template = TEMPLATE
    assert processor_of(model.config, processor.tokenizer).geometry == processor.geometry
    with pytest.raises(ValueError, match="needs position rows, which say where the prompt ends"):
        model.model.language_model(input_ids=torch.tensor([[1, 2]]))

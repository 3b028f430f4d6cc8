"""Rows laid end to end compute what each computes alone: values and gradients, dense and mixture of experts."""

from __future__ import annotations

import io
import random
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from rlhf.agreement import probe_model
from rlhf.algorithms.logprobs import processed_logprobs
from rlhf.batching import RUN_COST, BridgeVisual, Packing, Tensors, collate, make_batch
from rlhf.packing import attend_by_row, by_row
from rlhf.types import Media, Probe, Sample
from tests.unit.test_bridge_build import MOE, picture, tiny


def media(number: int, width: int, height: int) -> Media:
    buffer = io.BytesIO()
    picture(number, width, height).save(buffer, "PNG")
    return Media(buffer.getvalue(), (width, height))


def rows(processor) -> list[Sample]:
    """Text alone, one picture, several, of uneven length and number of tiles."""
    pick = random.Random(0)
    image = processor.image_token_id
    words = [i for i in range(5, len(processor.tokenizer)) if i != image]
    shown = [(), (media(0, 40, 24),), (media(1, 16, 16), media(2, 15, 60)), (), (media(3, 60, 15),)]
    samples = []
    for index, pictures in enumerate(shown):
        asked = [image] * len(pictures) + [pick.choice(words) for _ in range(pick.randrange(2, 5))]
        prompt = processor.expand(asked, [one.size for one in pictures])
        reply = [pick.choice(words) for _ in range(pick.randrange(1, 9))]
        samples.append(Sample(f"row/{index}", (*prompt, *reply), len(prompt), pictures))
    for index, shared in ((2, 3), (0, 2), (2, 1)):  # more replies to the same prompts, not next to each other
        first = samples[index]
        reply = [pick.choice(words) for _ in range(shared)]
        samples.append(
            replace(first, key=f"again/{index}", token_ids=(*first.token_ids[: first.prompt_length], *reply))
        )
    return samples


def logprobs(model, tensors: Tensors) -> torch.Tensor:
    """Of completion tokens, in the order of the rows."""
    kept, predicting = tensors.predictions()
    logits = model(**tensors.model_inputs(), use_cache=False, logits_to_keep=kept).logits.flatten(0, 1)[predicting]
    return processed_logprobs(logits, tensors.input_ids[:, 1:][tensors.completion], 1.0, ())[0]


@pytest.mark.parametrize("cost", [0, RUN_COST])
@pytest.mark.parametrize("decoder", [{}, {"decoder": MOE}])
def test_packed_rows_equal_the_rows_alone_and_padded(decoder, cost, monkeypatch):
    """In many runs of like length, and in one."""
    monkeypatch.setattr("rlhf.batching.RUN_COST", cost)
    model, processor = tiny(**decoder)
    samples = rows(processor)
    alone = torch.cat([logprobs(model, collate([sample], BridgeVisual(processor))) for sample in samples])
    alone.sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    padded = logprobs(model, collate(samples, BridgeVisual(processor)))
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=0)
    attend_by_row(model.model.language_model)
    tensors = collate(samples, BridgeVisual(processor, packs=True))
    assert tensors.packing is not None
    assert (len(tensors.packing.runs) > 1) == (cost == 0)
    packed = logprobs(model, tensors)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)
    packed.sum().backward()
    for name, parameter in model.named_parameters():
        scale = max(1.0, float(gradients[name].abs().max()))
        torch.testing.assert_close(parameter.grad / scale, gradients[name] / scale, atol=1e-5, rtol=0, msg=name)


def test_a_row_sees_itself_alone():
    model, processor = tiny()
    attend_by_row(model.model.language_model)
    visual = BridgeVisual(processor, packs=True)
    samples = rows(processor)
    words = samples[0].token_ids
    changed = [replace(samples[0], token_ids=(*words[:1], words[2], words[1], *words[3:])), *samples[1:]]
    assert changed != samples
    with torch.no_grad():
        before, after = (logprobs(model, collate(one, visual)) for one in (samples, changed))
    mine = samples[0].num_completion
    assert (before[:mine] - after[:mine]).abs().max() > 1e-3
    torch.testing.assert_close(before[mine:], after[mine:], atol=1e-6, rtol=0)


@pytest.mark.parametrize("runs", [((3, 5),), ((1, 3), (2, 5)), ((1, 3), (1, 5), (1, 4))])
def test_attention_against_row_after_row(runs):
    """Rows of 3, 5 and 4 tokens; the third begins with the first two tokens of the second."""
    torch.manual_seed(0)
    rows = [[0, 1, 2], [3, 4, 5, 6, 7], [3, 4, 8, 9]]
    places = torch.tensor([row + [0] * (5 - len(row)) for row in rows])
    owned = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 0]]).bool()
    query, key, value = (torch.randn(1, heads, 10, 8) for heads in (4, 2, 2))
    packing = Packing(places, owned, runs)
    found, _ = by_row(torch.nn.Identity(), query, key, value, None, 0.3, **packing.apart())
    for row in rows:
        parts = (part[:, :, row].repeat_interleave(4 // part.shape[1], dim=1) for part in (query, key, value))
        alone = scaled_dot_product_attention(*parts, is_causal=True, scale=0.3)
        torch.testing.assert_close(found[:, row], alone.transpose(1, 2))


def test_a_shared_prompt_and_its_pictures_are_computed_once():
    processor = tiny()[1]
    samples = rows(processor)
    inputs = collate(samples, BridgeVisual(processor, packs=True)).model_inputs()
    prompts = {sample.token_ids[: sample.prompt_length]: sample for sample in samples}
    assert len(prompts) == 5
    expected = sum(map(len, prompts)) + sum(sample.num_completion for sample in samples)
    assert inputs["input_ids"].shape == (1, expected)
    shown = [item for sample in prompts.values() for item in sample.media]
    assert len(inputs["pixel_values"]) == sum(processor.layout(item.size).num_tiles for item in shown)
    assert make_batch(samples, 1, expected, packed=True).micro_batches[0][1:] == ()


def test_probes_of_one_picture_are_scored_as_apart():
    model, processor = tiny(decoder=MOE)
    shown = (media(0, 40, 24),)
    probes = [Probe((processor.image_token_id, *ids), shown) for ids in ((7, 8, 9), (7, 9, 8, 6), (5, 6))]
    padded = probe_model(model, processor, BridgeVisual(processor), probes)
    attend_by_row(model.model.language_model)
    packed = probe_model(model, processor, BridgeVisual(processor, packs=True), probes)
    assert packed.expanded_ids == padded.expanded_ids
    assert packed.experts_reached == padded.experts_reached
    for ours, theirs in zip(packed.logprobs + packed.margins, padded.logprobs + padded.margins, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_what_is_not_packed_is_refused():
    model, processor = tiny()
    attend_by_row(model.model.language_model)
    with pytest.raises(ValueError, match="takes packed rows: give row_places"):
        model(**collate(rows(processor), BridgeVisual(processor)).model_inputs(), use_cache=False)
    model.model.language_model.config.sliding_window = 4
    linear = tiny()[0].model.language_model
    linear.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match="has linear_attention: its rows cannot be packed"):
        attend_by_row(linear)
    with pytest.raises(ValueError, match=r"has a sliding window: .*set resources\.packing = false"):
        attend_by_row(model.model.language_model)


def test_an_empty_micro_batch_packs_too():
    found = collate((), BridgeVisual(tiny()[1], packs=True))
    kept, predicting = found.predictions()
    assert kept.tolist() == [0]
    assert predicting.tolist() == []
    assert found.model_inputs()["input_ids"].shape == (1, 2)

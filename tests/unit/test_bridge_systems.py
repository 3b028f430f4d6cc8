"""Every bridge: as many features as placeholders, whatever the picture; rows alone as together; the plan's counts."""

import random
import re
from dataclasses import replace

import pytest
import torch

import rlhf.bridge
from rlhf.architecture import from_bridge, from_folder
from rlhf.batching import BridgeVisual, Cached, collate
from rlhf.data.formatting import as_prompt
from rlhf.data.tokenizer import TEMPLATE
from rlhf.recipe import Chat
from rlhf.types import Media, Sample
from tests.unit.systems import READER, SYSTEMS, awake, spec
from tests.unit.test_bridge_build import picture, tiny
from tests.unit.test_packing import media

EXTREME = [(1, 1), (1, 4000), (4000, 1), (4000, 4000), (4000, 3), (2, 3999), (336, 336), (31, 17)]


def asked(inputs):
    """What becomes of the pictures, of a processor's call."""
    return {name: inputs[name] for name in ("pixel_values", "picture_sizes", "questions") if name in inputs}


def sizes(count, seed, most=4000):
    """Random pictures' sizes, small ones as often as large ones."""
    chance = random.Random(seed)
    return [tuple(int(2 ** chance.uniform(0, most.bit_length())) % most + 1 for _ in range(2)) for _ in range(count)]


@pytest.mark.parametrize("name", SYSTEMS)
def test_no_picture_becomes_more_than_the_plan_says(name):
    _, processor = tiny(**spec(name))
    contract = processor.geometry
    planned = from_bridge(spec(name), 300).image_tokens
    for size in EXTREME + sizes(500, 0):
        pattern = contract.pattern(contract.layout(*size))
        assert 1 <= len(pattern) <= planned, size
        assert max(pattern, key=pattern.count) == contract.image_token_id, size
        assert processor.tokenizer.encode(processor.pattern_text(size)) == pattern, size


@pytest.mark.parametrize("name", SYSTEMS)
def test_features_equal_placeholders_for_real_pixels(name):
    """0 to 5 pictures a row, of 1 x 1 to 4000 x 4000 pixels; the forward itself counts, and refuses one too few."""
    model, processor = tiny(**spec(name))
    shown = EXTREME[:5] + sizes(20, 1, 300)
    chance = random.Random(2)
    rows, left = [], [picture(i, *size) for i, size in enumerate(shown)]
    while left:
        number = chance.randint(0, 5)
        rows.append(left[:number])
        left = left[number:]
    assert max(map(len, rows)) > 2
    texts = ["a" + "<image>b" * len(row) for row in rows]
    inputs = processor(text=texts, images=rows, padding=True, return_tensors="pt")
    with torch.no_grad():
        found = model.get_image_features(**asked(inputs)).pooler_output
        count = sum(map(len, found)) if isinstance(found, list) else found.flatten(0, 1).shape[0]
        assert count == int((inputs["input_ids"] == processor.image_token_id).sum())
        together = model(**inputs).logits
        assert together.isfinite().all()
        for row in (index for index, images in enumerate(rows) if images):
            alone = processor(text=[texts[row]], images=[rows[row]], return_tensors="pt")
            logits = model(**alone).logits[0]
            torch.testing.assert_close(together[row, -len(logits) :], logits, atol=1e-4, rtol=0)
    short = {**inputs, "input_ids": inputs["input_ids"].clone()}
    short["input_ids"][short["input_ids"] == processor.image_token_id] = processor.tokenizer.eos_token_id
    with pytest.raises(ValueError, match=f"{count} image features for 0 image placeholders"):
        model(**short)


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_plan_counts_the_parameters_and_each_learns(name):
    model, processor = tiny(**spec(name))
    assert from_bridge(spec(name), model.config.text_config.vocab_size).parameters == sum(
        parameter.numel() for parameter in model.parameters()
    )
    awake(model)
    shown = {"images": [[picture(0, 40, 24)]], "question": "what is it?"}
    inputs = processor(text=["<image>two"], **shown, return_tensors="pt")
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_text_only_step_touches_all_parameters_at_zero_weight(name):
    model, processor = tiny(**spec(name))
    inputs = processor(text=["none here"], return_tensors="pt")
    quiet = model(**inputs, labels=inputs["input_ids"]).loss
    loss = model.train()(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert loss.item() == quiet.item()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_folder_and_a_batch_are_what_was_built(name, tmp_path):
    model, processor = tiny(**spec(name))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, opened = rlhf.bridge.load(tmp_path)
    shown: list[Media] = [media(0, 40, 24), media(1, 9, 50)]
    ids = opened.expand([opened.image_token_id, 9, opened.image_token_id, 8, 7], [one.size for one in shown])
    tensors = collate([Sample("a", tuple(ids), len(ids) - 1, tuple(shown))], BridgeVisual(opened))
    images = [one.open() for one in shown]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids]), **processor.image_inputs(images)).logits
        assert torch.equal(loaded(**tensors.model_inputs()).logits, expected)


@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_uhd", "otterhd"])
def test_several_samples_of_a_row_see_that_rows_pictures(name):
    model, processor = tiny(**spec(name))
    rows = [[picture(0, 40, 24), picture(1, 9, 50)], [], [picture(2, 33, 33)]]
    texts = ["two <image> and <image>!", "none here", "<image> one"]
    inputs = processor(text=texts, images=rows, padding=True, return_tensors="pt")
    ids, more = model._expand_inputs_for_generation(expand_size=2, **inputs)
    with torch.no_grad():
        logits, twice = model(**inputs).logits, model(input_ids=ids, **more).logits
    torch.testing.assert_close(twice[0::2], logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(twice[1::2], logits, atol=1e-5, rtol=0)


def test_sizes_that_are_missing_or_wrong_are_named():
    model, processor = tiny(**spec("llava_next"))
    inputs = processor(text=["<image>"], images=[[picture(0, 40, 24)]], return_tensors="pt")
    with pytest.raises(ValueError, match=r"give picture_sizes, .* there are none"):
        model(**{name: value for name, value in inputs.items() if name != "picture_sizes"})
    less = {name: inputs[name][:-1] for name in ("pixel_values", "picture_sizes")}
    with pytest.raises(ValueError, match="the last picture lacks 1 of its"):
        model(**{**inputs, **less})


@pytest.mark.parametrize("name", ["instructblip", "llama_vid"])
def test_what_is_asked_changes_what_a_reading_connector_says(name):
    model, processor = tiny(**spec(name))
    image = picture(0, 40, 24)

    def features(question):
        inputs = processor(text=["<image>"], images=[[image]], question=question, return_tensors="pt")
        with torch.no_grad():
            return model.get_image_features(**asked(inputs)).pooler_output[0]

    one, other = features("how many?"), features("what colour?")
    changed = (one - other).abs().amax(dim=1) > 1e-4
    assert torch.equal(one, features("how many?"))
    # LLaMA-VID: the context token alone, content stays
    assert changed.tolist() == ([True] + [False] * 4 if name == "llama_vid" else [True] * 6)
    blind, plain = tiny(**spec("blip2"))  # the control
    inputs = plain(text=["<image>"], images=[[image]], question="how many?", return_tensors="pt")
    assert "questions" not in inputs
    assert blind.get_image_features(**asked(inputs)).pooler_output.shape == (1, 6, 32)


def test_a_row_brings_its_question_to_the_connector():
    _, processor = tiny(**spec("instructblip"))
    processor.tokenizer.chat_template = TEMPLATE

    def user(text):
        return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}

    rows = [user("how many?"), {"role": "assistant", "content": "two"}, user("and here?")]
    shown = (media(0, 40, 24), media(1, 9, 50))
    prompt = as_prompt({"messages": rows, "images": shown}, "toy", 0, processor.tokenizer, True, Chat())
    spelt = [processor.tokenizer.decode(item.question) for item in prompt.media]
    assert spelt == ["how many?", "and here?"]  # each picture its own turn's, without the thinking suffix
    given = collate([Sample("a", (9, 8), 1, prompt.media)], Cached(BridgeVisual(processor))).media["questions"]
    assert processor.tokenizer.decode([token for token in given[1].tolist() if token >= 0]) == "and here?"
    other = replace(prompt.media[0], question=prompt.media[1].question)
    assert other.digest(reads=True) != prompt.media[0].digest(reads=True)
    assert other.digest(reads=False) == prompt.media[0].digest(reads=False)


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("llava_next", {"tiler": {"fit": "stretch"}}, 'packer.feature_map cuts padding away: take tiler.fit = "pad"'),
        ("llava_next", {"connector": READER}, "those of connector.cross_attention or of this encoder lie in no rows"),
        ("llava_next", {"encoder": {"feature": "all"}}, "or of this encoder lie in no rows"),
        ("sail_vl2", {"encoder": {"layer": [-2, -1]}}, "connector.mlp joins neighbouring patches"),
        ("otterhd", {"encoder": {"type": "tower"}}, "encoder.tower needs a vision transformer"),
        ("llava", {"encoder": {"type": "patches"}}, "encoder.patches has no vision transformer"),
        ("otterhd", {"encoder": {"mean": [0.5]}}, "encoder.patches mean needs three numbers"),
        ("llava", {"encoder": {"windows": 4}}, "this tiler makes none"),
        ("monkey", {"encoder": {"windows": 3}}, "cut into up to 4 tiles, but encoder.windows = 3"),
        ("llava_uhd", {"tiler": {"tile": [16, 16]}}, "tiler.slices tile must be a whole number"),
        (
            "llava_uhd",
            {"connector": {"type": "mlp", "kind": "pixel_shuffle_mlp"}},
            "does not divide by connector.mlp factor",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_the_plan(name, changes, says):
    given = spec(name)
    for slot, keys in changes.items():
        other = keys.get("type", given[slot]["type"]) != given[slot]["type"]
        given[slot] = keys if other else given[slot] | keys
    with pytest.raises(ValueError, match=re.escape(says)):
        from_bridge(given, 300)


def test_a_saved_bridge_of_patches_is_counted(tmp_path):
    model, _ = tiny(**spec("otterhd"))
    model.config.save_pretrained(tmp_path)
    found = from_folder(tmp_path)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())

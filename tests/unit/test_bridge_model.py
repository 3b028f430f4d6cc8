"""The model as Hugging Face sees it: rows, folders, generation, gradients, experts."""

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

import rlhf.bridge
from rlhf.architecture import from_bridge
from rlhf.bridge.initialisation import reset
from tests.unit.test_bridge_build import DENSE, MOE, SINGLE, SPEC, VISION, picture, tiny

TEXTS = ["two <image> and <image>!", "none here", "<image> one"]
IMAGES = [[picture(0, 40, 24), picture(1, 16, 16)], [], [picture(2, 15, 60)]]


def batch(processor, texts=TEXTS, images=IMAGES):
    return processor(text=texts, images=images, padding=True, return_tensors="pt")


@pytest.mark.parametrize("decoder", [{}, {"decoder": MOE}])
def test_a_mixed_batch_equals_its_rows(decoder):
    model, processor = tiny(**decoder)
    with torch.no_grad():
        together = model(**batch(processor)).logits
        for row, (text, images) in enumerate(zip(TEXTS, IMAGES, strict=True)):
            alone = model(**batch(processor, [text], [images])).logits[0]
            torch.testing.assert_close(together[row, -alone.shape[0] :], alone, atol=1e-5, rtol=0)


def test_pictures_and_their_order_are_heard():
    model, processor = tiny(tiler=SINGLE)
    a, b = picture(0), picture(1)
    with torch.no_grad():
        one = model(**batch(processor, ["<image><image>"], [[a, b]])).logits[0, -1]
        other = model(**batch(processor, ["<image><image>"], [[b, a]])).logits[0, -1]
    assert (one - other).abs().max() > 1e-3


def test_features_and_placeholders_must_agree():
    model, processor = tiny()
    inputs = batch(processor)  # tiles 2 + 1, 1 and 4 + 1, four tokens each
    with pytest.raises(ValueError, match="32 image features for 36 image placeholders"):
        model(**(dict(inputs) | {"pixel_values": inputs["pixel_values"][:-1]}))
    with pytest.raises(ValueError, match="0 image features for 36 image placeholders"):
        model(**(dict(inputs) | {"pixel_values": None}))


@pytest.mark.parametrize("vision", ["siglip", "aimv2"])
@pytest.mark.parametrize("decoder", ["qwen3", "qwen3_moe"])
def test_every_parameter_gets_a_gradient(vision, decoder):
    slots = {"decoder": MOE} if decoder == "qwen3_moe" else {}
    model, processor = tiny(vision=VISION | {"type": vision}, **slots)
    inputs = batch(processor)
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_a_text_only_step_runs_the_vision_pass_at_zero_weight():
    model, processor = tiny()
    inputs = batch(processor, TEXTS[1:2], [[]])
    assert "pixel_values" not in inputs
    quiet = model(**inputs, labels=inputs["input_ids"]).loss
    ran = []
    for part in (model.model.vision, model.model.connector, model.model.language_model):
        part.register_forward_hook(lambda module, *_: ran.append(type(module).__name__))
    loss = model.train()(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert ran == ["Tower", "Projector", "Qwen3Model"]
    assert loss.item() == quiet.item()
    for name, parameter in model.named_parameters():
        sees_pictures = ".vision." in name or ".connector." in name
        assert parameter.grad is not None, name
        assert (parameter.grad.abs().sum() == 0) == sees_pictures, name
    ran.clear()
    model.eval()(**inputs)  # the control: outside training the pass does not run
    assert ran == ["Qwen3Model"]


@pytest.mark.parametrize("decoder", [{}, {"decoder": MOE}])
def test_a_folder_holds_the_model_bit_for_bit(tmp_path, decoder):
    model, processor = tiny(**decoder)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, opened = rlhf.bridge.load(tmp_path)
    assert type(loaded) is type(model) is type(AutoModelForImageTextToText.from_pretrained(tmp_path))
    assert type(opened) is type(AutoProcessor.from_pretrained(tmp_path))
    assert opened.geometry == processor.geometry == loaded.config.geometry
    theirs = loaded.state_dict()
    assert theirs.keys() == model.state_dict().keys()
    assert all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())
    first, second = batch(processor), batch(opened)
    assert all(torch.equal(first[name], second[name]) for name in first)
    with torch.no_grad():
        assert torch.equal(model(**first).logits, loaded(**second).logits)
    with safe_open(tmp_path / "model.safetensors", "pt") as saved:
        names = set(saved.keys())
    assert ("model.language_model.layers.0.mlp.experts.3.up_proj.weight" in names) == bool(decoder)


def test_a_folder_whose_halves_disagree_is_refused(tmp_path):
    model, _ = tiny()
    model.save_pretrained(tmp_path)
    tiny(tiler=SINGLE)[1].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="describe different pictures"):
        rlhf.bridge.load(tmp_path)


def test_upcycling_changes_nothing_at_first():
    model, processor = tiny()
    sparse = rlhf.bridge.upcycle(model, num_experts=4, top_k=2, layers="all", seed=3)
    inputs = batch(processor)
    with torch.no_grad():
        dense_logits, logits = model(**inputs).logits, sparse(**inputs).logits
        assert (dense_logits - logits).abs().max() < 1e-5
        # The controls: other routers choose otherwise and still agree, other experts do not.
        routed = sparse(**inputs, output_router_logits=True).router_logits
        reset(sparse, ["*.mlp.gate.weight"], seed=9)
        assert (sparse(**inputs, output_router_logits=True).router_logits[0] - routed[0]).abs().max() > 1e-3
        assert (sparse(**inputs).logits - dense_logits).abs().max() < 1e-5
        reset(sparse, ["*.experts.down_proj"], seed=9)
        assert (sparse(**inputs).logits - dense_logits).abs().max() > 1e-2
    with pytest.raises(ValueError, match="only a dense qwen3"):
        rlhf.bridge.upcycle(sparse, 4, 2, "all", 0)


@pytest.mark.parametrize(
    ("layers", "sparse"),
    [("all", [0, 1, 2, 3]), ("every_second", [0, 2]), ("first_half", [0, 1]), ("second_half", [2, 3])],
)
def test_some_layers_only_become_mixtures(layers, sparse):
    model, processor = tiny(decoder=DENSE | {"num_hidden_layers": 4})
    mixed = rlhf.bridge.upcycle(model, num_experts=4, top_k=2, layers=layers, seed=3)
    found = [place for place, layer in enumerate(mixed.model.language_model.layers) if hasattr(layer.mlp, "experts")]
    assert found == sparse
    inputs = batch(processor)
    with torch.no_grad():
        assert (model(**inputs).logits - mixed(**inputs).logits).abs().max() < 1e-5
    planned = from_bridge(SPEC | {"decoder": DENSE | {"num_hidden_layers": 4}}, model.config.text_config.vocab_size)
    assert planned.upcycled(4, 2, layers).parameters == sum(parameter.numel() for parameter in mixed.parameters())


def test_the_moe_loss_holds_the_balancing_loss_when_router_logits_are_asked_for():
    model, processor = tiny(decoder=MOE)
    inputs = batch(processor)
    plain = model(**inputs, labels=inputs["input_ids"])
    full = model(**inputs, labels=inputs["input_ids"], output_router_logits=True)
    assert plain.router_logits is None
    assert plain.aux_loss is None
    assert [tuple(layer.shape) for layer in full.router_logits] == [(inputs["input_ids"].numel(), 4)] * 2
    weight = model.config.text_config.router_aux_loss_coef
    torch.testing.assert_close(full.loss, plain.loss + weight * full.aux_loss)


def test_generation_equals_greedy_choice_without_a_cache():
    model, processor = tiny()
    inputs = batch(processor)
    ids = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None, suppress_tokens=[2])
    assert ids.shape == (3, inputs["input_ids"].shape[1] + 5)
    with torch.no_grad():
        for row, (text, images) in enumerate(zip(TEXTS, IMAGES, strict=True)):
            alone = batch(processor, [text], [images])
            for step in range(5):
                logits = model(alone["input_ids"], pixel_values=alone.get("pixel_values")).logits
                logits[..., 2] = float("-inf")  # a policy may not write the placeholder itself
                alone["input_ids"] = torch.cat([alone["input_ids"], logits[:, -1:].argmax(-1)], dim=1)
                assert alone["input_ids"][0, -1] == ids[row, step - 5]


def test_several_samples_of_a_row_see_that_rows_pictures():
    model, processor = tiny()
    inputs = batch(processor)
    ids, more = model._expand_inputs_for_generation(expand_size=2, **inputs)
    with torch.no_grad():
        logits, twice = model(**inputs).logits, model(input_ids=ids, **more).logits
    torch.testing.assert_close(twice[0::2], logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(twice[1::2], logits, atol=1e-5, rtol=0)


def test_gradient_checkpointing_gives_the_same_gradients():
    model, processor = tiny()
    inputs = batch(processor)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train().zero_grad()
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert model.is_gradient_checkpointing
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4, msg=name)

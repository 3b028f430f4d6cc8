"""Another bridge from a trained one: what keeps its weights, what is resized, taken over or begun afresh."""

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rlhf.architecture import from_bridge, from_folder
from rlhf.bridge import rebuild, reset
from rlhf.foreign import open_model
from rlhf.models import bridges_of, marks_of
from rlhf.recipe import RecipeError, validate
from rlhf.remaking import require_rebuildable
from tests.unit.systems import CLIP, PENULTIMATE, SINGLE, spec
from tests.unit.test_bridge_build import DENSE, picture, tiny

EVERY = ["vision", "connector", "packer", "decoder"]


def shown(processor, text="<image>two?"):
    return processor(text=[text], images=[[picture(0, 40, 24)]], return_tensors="pt")


def trained(**given):
    """A bridge whose weights are not those of a fresh one."""
    model, processor = tiny(**given)
    generator = torch.Generator().manual_seed(9)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval(), processor


@pytest.mark.parametrize("kind", ["clip", "siglip", "aimv2"])
@torch.no_grad()
def test_larger_pictures_resize_the_positions(kind):
    """As if the smaller table were interpolated while the tower runs, which transformers can do for CLIP and SigLIP."""
    given = spec("llava15") | {"vision": CLIP | {"type": kind}, "encoder": {"type": "tower"}}
    model, processor = trained(**given)
    larger = {"tiler": {"size": 32}, "vision": {"image_size": 32}}
    made, processor, counts = rebuild(model, processor, larger, {}, 0)
    assert made.config.geometry.most_tokens == 64
    inputs = shown(processor)
    assert made(**inputs).logits.isfinite().all()
    table = next(p for n, p in model.named_parameters() if n.endswith("position_embedding.weight"))
    assert counts["resized"] == (64 + (kind == "clip")) * 16
    assert counts["fresh"] == counts["left"] == counts["taken"] == 0
    assert counts["kept"] == sum(p.numel() for p in model.parameters()) - table.numel()
    if kind != "aimv2":
        pixels = inputs["pixel_values"]
        interpolated = model.model.vision.tower(pixels, interpolate_pos_encoding=True).last_hidden_state
        found = made.model.vision.tower(pixels).last_hidden_state
        torch.testing.assert_close(found, interpolated, atol=1e-5, rtol=0)
    same = {n: p for n, p in model.named_parameters() if p is not table}
    assert all(torch.equal(made.get_parameter(name), value) for name, value in same.items())


@torch.no_grad()
def test_a_plain_decoder_gets_layers_for_pictures_and_knows_what_it_knew():
    model, processor = trained(**spec("learned edges"))
    inputs = shown(processor)
    before = model(**inputs).logits
    made, _, counts = rebuild(model, processor, {"decoder": {"type": "visual_expert"}}, {}, 0)
    torch.testing.assert_close(made(**inputs).logits, before, atol=1e-5, rtol=0)  # experts begin as copies
    assert counts["fresh"] > 0
    assert counts["left"] == 0
    made, _, _ = rebuild(model, processor, {"decoder": {"type": "modality_adapter"}}, {}, 0)
    torch.testing.assert_close(made(**inputs).logits, before, atol=1e-5, rtol=0)
    gated = {"type": "gated_cross_attention", "language_layers": 2, "language_head_dim": DENSE["head_dim"]}
    tables = {"decoder": gated, "packer": {"type": "segments", "positions": "none"}}
    made, _, _ = rebuild(model, processor, tables, {}, 0)
    text = torch.tensor([[7, 8, 9]])
    torch.testing.assert_close(made(text).logits, model(text).logits, atol=1e-5, rtol=0)
    # the control: the experts of a trained one are not copies any more
    experts, _, _ = rebuild(model, processor, {"decoder": {"type": "visual_expert"}}, {}, 0)
    experts.model.language_model.layers[0].vision_mlp.down_proj.weight += 0.3
    assert (experts(**inputs).logits - before).abs().max() > 1e-3
    again, _, counts = rebuild(experts, processor, {"tiler": {"fit": "pad"}}, {}, 0)
    assert torch.equal(again(**inputs).logits, experts(**inputs).logits)
    assert counts["fresh"] == 0


@torch.no_grad()
def test_windows_begin_as_the_tower_they_share():
    """Monkey begins from Qwen-VL."""
    model, processor = trained(**spec("qwen_vl"))
    tables = {
        "tiler": {"type": "grid", "tile": 16, "grids": [[2, 2]]},
        "encoder": {"windows": 4, "attention_rank": 2, "mlp_rank": 3},
    }
    made, _, counts = rebuild(model, processor, tables, {}, 0)
    pixels = torch.randn(4, 3, 16, 16)
    found = made.model.vision(pixels, torch.arange(4))
    torch.testing.assert_close(found, model.model.vision(pixels), atol=1e-6, rtol=0)
    assert counts["left"] == 0
    assert counts["fresh"] == sum(p.numel() for n, p in made.named_parameters() if ".window_" in n)


@torch.no_grad()
def test_another_connector_begins_afresh_and_says_so():
    model, processor = trained(**spec("llava15"))
    made, _, counts = rebuild(model, processor, {"connector": {"type": "perceiver", "latents": 4, "heads": 2}}, {}, 3)
    assert counts["fresh"] == sum(p.numel() for p in made.model.connector.parameters())
    assert counts["left"] == sum(p.numel() for p in model.model.connector.parameters())
    again, _, _ = rebuild(model, processor, {"connector": {"type": "perceiver", "latents": 4, "heads": 2}}, {}, 3)
    assert torch.equal(again.model.connector.latents, made.model.connector.latents)


@torch.no_grad()
def test_parts_of_another_bridge(tmp_path):
    model, processor = tiny(**spec("llava15"))
    other, others = trained(**spec("llava15"))
    other.save_pretrained(tmp_path)
    others.save_pretrained(tmp_path)
    for slot in ("vision", "connector", "decoder"):
        made, _, counts = rebuild(model, processor, {}, {slot: tmp_path}, 0)
        prefix = {"decoder": ("model.language_model.", "lm_head.")}.get(slot, (f"model.{slot}.",))
        for name, value in made.named_parameters():
            source = other if name.startswith(prefix) else model
            assert torch.equal(value, source.get_parameter(name)), name
        assert counts["taken"] == sum(p.numel() for n, p in other.named_parameters() if n.startswith(prefix))


@torch.no_grad()
def test_parts_of_transformers_own_models(tmp_path):
    model, processor = tiny(**spec("llava15"))
    sizes = {key: value for key, value in CLIP.items() if key != "type"}
    clip = CLIPVisionModel(CLIPVisionConfig(**sizes))
    both = CLIPModel(CLIPConfig(vision_config=sizes, text_config={"hidden_size": 16, "num_hidden_layers": 1}))
    larger = CLIPVisionModel(CLIPVisionConfig(**sizes | {"image_size": 32}))
    length = model.config.text_config.vocab_size
    decoder = Qwen3ForCausalLM(Qwen3Config(**{k: v for k, v in DENSE.items() if k != "type"}, vocab_size=length))
    for name, source in {"clip": clip, "both": both, "larger": larger, "decoder": decoder}.items():
        source.save_pretrained(tmp_path / name)
    pixels = torch.randn(1, 3, 16, 16)
    for name, source in (("clip", clip), ("both", both.vision_model)):
        made, _, _ = rebuild(model, processor, {}, {"vision": tmp_path / name}, 0)
        states = source.eval()(pixels, output_hidden_states=True).hidden_states
        torch.testing.assert_close(made.eval().model.vision(pixels), states[-2][:, 1:], atol=1e-6, rtol=0)
    made, _, _ = rebuild(model, processor, {}, {"vision": tmp_path / "larger"}, 0)
    assert made.model.vision.tower.embeddings.position_embedding.weight.shape == (17, 16)
    made, _, _ = rebuild(model, processor, {}, {"decoder": tmp_path / "decoder"}, 0)
    text = torch.tensor([[7, 8, 9]])
    torch.testing.assert_close(made.eval()(text).logits, decoder.eval()(text).logits, atol=1e-6, rtol=0)


def test_parts_that_do_not_fit_are_named(tmp_path):
    model, processor = tiny(**spec("llava15"))
    sizes = {key: value for key, value in DENSE.items() if key != "type"}
    Qwen3ForCausalLM(Qwen3Config(**sizes, vocab_size=300)).save_pretrained(tmp_path / "words")
    with pytest.raises(ValueError, match=r"embed_tokens.*\[300, 32\].*and its tokenizer"):
        rebuild(model, processor, {}, {"decoder": tmp_path / "words"}, 0)
    wide = {key: value for key, value in CLIP.items() if key != "type"} | {"hidden_size": 32}
    CLIPVisionModel(CLIPVisionConfig(**wide)).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match=r"parts.vision: .* here; give model.bridge the sizes of that vision"):
        rebuild(model, processor, {}, {"vision": tmp_path / "wide"}, 0)
    with pytest.raises(ValueError, match="holds no bridge, and a connector is a part of bridges only"):
        rebuild(model, processor, {}, {"connector": tmp_path / "wide"}, 0)
    with pytest.raises(ValueError, match="unknown vision key 'image_sizes'"):
        rebuild(model, processor, {"vision": {"image_sizes": 32}}, {}, 0)


@pytest.mark.parametrize(
    "over",
    [
        {"tiler": {"size": 32}, "vision": {"image_size": 32}},
        {"decoder": {"type": "visual_expert"}},
        {
            "decoder": {"type": "gated_cross_attention", "language_layers": 2, "language_head_dim": 16, "every": 2},
            "packer": {"type": "segments", "positions": "none"},
        },
        {"connector": {"type": "perceiver", "latents": 4, "heads": 2}},
        {"vision": {"type": "siglip"}},
        {"decoder": {"type": "gated_cross_attention"}, "packer": {"type": "segments", "positions": "none"}},
        {"encoder": PENULTIMATE | {"layer": -1}, "tiler": SINGLE | {"fit": "stretch"}},
    ],
)
def test_the_plan_knows_the_rebuilt_bridge(over, tmp_path):
    model, processor = tiny(**spec("llava15"))
    made, _, _ = rebuild(model, processor, over, {}, 0)
    count = sum(parameter.numel() for parameter in made.parameters())
    planned = from_bridge(spec("llava15"), model.config.text_config.vocab_size).rebuilt(over)
    assert planned.parameters == count
    assert planned.image_tokens == made.config.geometry.most_tokens
    made.save_pretrained(tmp_path)
    assert from_folder(tmp_path).parameters == count
    model.save_pretrained(tmp_path / "before")
    of_folder = from_folder(tmp_path / "before").rebuilt(over)
    assert of_folder.image_tokens == planned.image_tokens
    assert of_folder.parameters == count


@torch.no_grad()
@pytest.mark.parametrize(("name", "slot"), [("cogvlm", "decoder"), ("flamingo", "decoder"), ("lavin", "decoder")])
def test_a_published_decoder_under_layers_for_pictures(name, slot, tmp_path):
    """What it has none of begins as it does around a fresh decoder: experts as copies of the text's weights."""
    model, processor = trained(**spec(name))
    plain = model.config.text_config
    sizes = {key: value for key, value in DENSE.items() if key not in ("type", "head_dim", "num_hidden_layers")}
    layers, head = getattr(plain, "language_layers", plain.num_hidden_layers), getattr(plain, "language_head_dim", 16)
    config = Qwen3Config(**sizes, num_hidden_layers=layers, head_dim=head, vocab_size=plain.vocab_size)
    published = Qwen3ForCausalLM(config).eval()
    published.save_pretrained(tmp_path)
    made, _, counts = rebuild(model, processor, {}, {slot: tmp_path}, 0)
    text = torch.tensor([[7, 8, 9]])
    torch.testing.assert_close(made(text).logits, published(text).logits, atol=1e-5, rtol=0)
    assert counts["taken"] == sum(parameter.numel() for parameter in published.parameters())
    assert counts["fresh"] > 0
    if name == "cogvlm":
        layer = made.model.language_model.layers[0]
        assert torch.equal(layer.vision_mlp.up_proj.weight, layer.mlp.up_proj.weight)


@torch.no_grad()
def test_windows_take_a_trained_tower(tmp_path):
    """Monkey's recipe, begun from a trained Qwen-VL."""
    source, others = trained(**spec("qwen_vl"))
    source.save_pretrained(tmp_path)
    others.save_pretrained(tmp_path)
    model, processor = trained(**spec("monkey"))
    made, _, counts = rebuild(model, processor, {}, {"vision": tmp_path, "connector": tmp_path}, 0)
    pixels = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(
        made.model.vision(pixels, torch.arange(4)), source.model.vision(pixels), atol=1e-6, rtol=0
    )
    assert counts["fresh"] == sum(p.numel() for n, p in made.named_parameters() if ".window_" in n)


@torch.no_grad()
def test_trained_experts_stay_where_the_words_grow():
    model, processor = trained(**spec("cogvlm"))
    made, _, counts = rebuild(model, processor, {"decoder": {"vocab_size": 300}}, {}, 0)
    layer, before = (m.model.language_model.layers[0].vision_mlp.up_proj.weight for m in (made, model))
    assert torch.equal(layer, before)
    assert counts["fresh"] == 300 * 32


def test_resetting_experts_makes_them_this_decoders_text():
    model, _ = trained(**spec("cogvlm"))
    before = model.model.language_model.layers[0].mlp.up_proj.weight.clone()
    reset(model, ["language_model.*vision_*"], 0)
    layer = model.model.language_model.layers[0]
    assert torch.equal(layer.vision_mlp.up_proj.weight, before)
    assert torch.equal(layer.mlp.up_proj.weight, before)


@torch.no_grad()
def test_a_gated_decoder_has_the_layers_it_is_put_around():
    model, processor = trained(**spec("llava15"))
    tables = {"decoder": {"type": "gated_cross_attention"}, "packer": {"type": "segments", "positions": "none"}}
    made, _, _ = rebuild(model, processor, tables, {}, 0)
    assert (made.config.text_config.language_layers, made.config.text_config.language_head_dim) == (2, 16)
    text = torch.tensor([[7, 8, 9]])
    torch.testing.assert_close(made(text).logits, model(text).logits, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"num_hidden_layers follows from its own keys \(language_layers,"):
        tiny(**spec("flamingo") | {"decoder": spec("flamingo")["decoder"] | {"num_hidden_layers": 4}})


def test_other_frequencies_are_taken():
    model, processor = trained(**spec("llava15"))
    made, _, _ = rebuild(model, processor, {"decoder": {"rope_theta": 5e5}}, {}, 0)
    assert made.config.text_config.rope_parameters["rope_theta"] == 5e5


def test_patches_of_another_size():
    model, processor = trained(**spec("otterhd"))
    tables = {"vision": {"patch_size": 8}, "tiler": {"cell": 8, "max_size": [24, 40]}}
    made, _, counts = rebuild(model, processor, tables, {}, 0)
    assert made.config.geometry.tiler.cell == (8, 8)
    assert counts["fresh"] > 0


@torch.no_grad()
def test_adapters_are_merged_before_a_rebuild(tmp_path):
    from peft import LoraConfig, get_peft_model

    model, processor = trained(**spec("llava15"))
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapters")
    merged, opened, _ = open_model(str(tmp_path / "adapters"))
    inputs = shown(processor)
    made, _, counts = rebuild(merged, opened, {"tiler": {"fit": "stretch"}}, {}, 0)
    torch.testing.assert_close(made(**inputs).logits, adapted(**inputs).logits, atol=1e-4, rtol=0)
    assert counts["fresh"] == 0
    plain, processor = tiny(**spec("llava15"))
    taken, _, _ = rebuild(plain, processor, {}, {"decoder": tmp_path / "adapters"}, 0)
    weight = taken.model.language_model.layers[0].self_attn.q_proj.weight
    assert torch.equal(weight, merged.model.language_model.layers[0].self_attn.q_proj.weight)


def test_what_a_rebuild_cannot_have_is_told_before_the_first_stage(tmp_path):
    model, processor = tiny(**spec("llava15"))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    stages = [
        {"name": "first", "kind": "sft", "data": {"a": 1.0}, "steps": 1, "batch_size": 1},
        {"name": "again", "kind": "rebuild", "bridge": {"decoder": {"hiden_size": 3}}},
    ]
    recipe = {"name": "r", "model": {"bridge": spec("llava15")}, "data": {"a": {"path": "x"}}, "stages": stages}
    with pytest.raises(RecipeError, match=r"stages.again.bridge: unknown decoder key 'hiden_size'"):
        require_rebuildable(validate(recipe, "test"), tmp_path)
    stages[1]["bridge"] = {"vision": {"type": "siglip"}, "encoder": {"layer": -1, "adapter_rank": 2}}
    with pytest.raises(RecipeError, match=r"stages.again.bridge: encoder.tower adapter_rank: .* has no class token"):
        require_rebuildable(validate(recipe, "test"), tmp_path)
    stages[1]["bridge"] = {"packer": {"wrap": ["<left>", "<right>"]}}
    with pytest.raises(RecipeError, match=r"stages.again.bridge: the tokenizer has no token '<left>'"):
        require_rebuildable(validate(recipe, "test"), tmp_path)
    assert [mark for bridge in bridges_of(validate(recipe, "test")) for mark in marks_of(bridge)] == [
        "<left>",
        "<right>",
    ]
    stages[1] |= {"bridge": {"tiler": 48}, "sizes": {"tiler": {"size": 4}}}
    with pytest.raises(RecipeError, match=r"stages.again.bridge.tiler must be a table"):
        validate(recipe, "test")

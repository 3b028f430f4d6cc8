"""The bridge's components against transformers' modules, or against the formula, with weights copied over. Each test
also disables what it tests, and sees it."""

import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModel,
    Blip2Config,
    Blip2ForImageTextRetrieval,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    CLIPVisionConfig,
    FuyuConfig,
    FuyuForCausalLM,
    InstructBlipQFormerConfig,
    InstructBlipQFormerModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextModel,
)
from transformers.image_processing_utils import select_best_resolution
from transformers.models.evolla.modeling_evolla import EvollaFeedForward, EvollaSequenceCompressorAttention
from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil
from transformers.models.internvl.modeling_internvl import InternVLModel
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

from rlhf.bridge.alignment import align
from rlhf.bridge.connectors import CONNECTORS
from rlhf.bridge.layers.mlp import PixelShuffle
from rlhf.bridge.layers.qformer import QFormer
from rlhf.bridge.tilers.grid import most_effective
from rlhf.bridge.tilers.slices import shaped, slicing
from tests.unit.systems import CLIP, GRIDS, spec
from tests.unit.test_bridge_build import picture, tiny

WIDTH, TEXT = 16, 32
CANVASES = [[16 * rows, 16 * cols] for rows, cols in GRIDS]
EXACT = {"atol": 0, "rtol": 0}
CLOSE = {"atol": 1e-5, "rtol": 0}


def connector(**settings):
    torch.manual_seed(0)
    module = CONNECTORS.make(settings).build(WIDTH, TEXT, 50)
    for parameter in module.parameters():  # norms and biases that do something
        nn.init.normal_(parameter, std=0.3)
    return module.eval()


def copy(names, ours, theirs):
    """Weights of `ours` into `theirs`, a module or some of its state; `names` maps a piece of their names to one of
    ours."""
    own = ours.state_dict()
    with torch.no_grad():
        for name, value in (theirs if isinstance(theirs, dict) else theirs.state_dict()).items():
            for theirs_piece, ours_piece in names.items():
                name = name.replace(theirs_piece, ours_piece)
            value.copy_(own[name])


# T1


@torch.no_grad()
def test_the_perceiver_is_flamingos():
    ours = connector(type="perceiver", latents=5, depth=2, heads=2, head_dim=8, project=False)
    media, latents = torch.randn(3, 7, WIDTH), ours.latents.expand(3, -1, -1)
    mask = torch.ones(3, 7 + 5)
    for attend, feed in zip(ours.attention, ours.feed_forward, strict=True):
        theirs = EvollaSequenceCompressorAttention(WIDTH, 8, 2), EvollaFeedForward(WIDTH, 4)
        copy({}, attend, theirs[0])
        copy({}, feed, theirs[1])
        latents = latents + theirs[0](media, latents, mask)
        latents = latents + theirs[1](latents)
    found = ours(media, (1, 7))
    torch.testing.assert_close(found[..., :WIDTH], ours.norm(latents), **CLOSE)
    assert torch.equal(found[..., WIDTH:], torch.zeros(3, 5, TEXT - WIDTH))
    # the control: latents that do not read themselves, or the picture
    assert (ours(media.roll(1, 0), (1, 7)) - found).abs().max() > 1e-2
    ours.latents += 0.1 * torch.randn_like(ours.latents)
    assert (ours(media, (1, 7)) - found).abs().max() > 1e-2


def test_the_papers_perceiver_squares_its_relu():
    feed = connector(type="perceiver", latents=2, depth=1, activation="relu2").feed_forward[0]
    x = torch.randn(4, WIDTH)
    expected = (feed.norm(x) @ feed.fc1.weight.T).clamp(min=0).square() @ feed.fc2.weight.T
    torch.testing.assert_close(feed(x), expected)


# T3

NAMES = {
    "layernorm.": "norm.",
    "encoder.layer.": "layers.",
    "crossattention.attention.": "crossing.",
    "crossattention.output.dense": "crossing.out",
    "crossattention.output.LayerNorm": "crossing.norm",
    "attention.attention.": "attention.",
    "attention.output.dense": "attention.out",
    "attention.output.LayerNorm": "attention.norm",
    "intermediate_query.dense": "feed_query.up",
    "output_query.dense": "feed_query.down",
    "output_query.LayerNorm": "feed_query.norm",
    "intermediate.dense": "feed_text.up",
    "output.dense": "feed_text.down",
    "output.LayerNorm": "feed_text.norm",
}


UNREAD = ("encoder.layer.2.intermediate.", "encoder.layer.2.output.")


def qformers(text, queries=6):
    """Ours, and transformers' with its weights."""
    settings = CONNECTORS.make(
        {"type": "qformer", "queries": queries, "layers": 3, "width": 24, "heads": 4, "intermediate": 40}
    )
    torch.manual_seed(0)
    ours = QFormer(settings, WIDTH, 3 if text else 0).eval()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.3)
    theirs = Blip2QFormerModel(
        Blip2QFormerConfig(
            hidden_size=24,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=40,
            encoder_hidden_size=WIDTH,
            cross_attention_frequency=2,
            use_qformer_text_input=text,
            attn_implementation="eager",
        )
    ).eval()
    copy(NAMES, ours, theirs)
    return ours, theirs


@torch.no_grad()
@pytest.mark.parametrize("queries", [6, 64])
def test_the_q_former_is_blip2s(queries):
    ours, theirs = qformers(text=False, queries=queries)
    asked, source = torch.randn(2, queries, 24), torch.randn(2, 9, WIDTH)
    expected = theirs(query_embeds=asked, encoder_hidden_states=source).last_hidden_state
    torch.testing.assert_close(ours(asked, source, queries), expected, **CLOSE)
    assert [layer.crossing is not None for layer in ours.layers] == [True, False, True]
    assert (ours(asked, source.flip(0), queries) - expected).abs().max() > 1e-2


@torch.no_grad()
def test_a_q_former_with_text_and_masks_is_blip2s():
    """BLIP-2's image-grounded generation: queries see queries, text sees queries and the text before it."""
    ours, theirs = qformers(text=True)
    both, source = torch.randn(2, 6 + 5, 24), torch.randn(2, 9, WIDTH)
    mask = torch.ones(11, 11).tril().bool()
    mask[:6, :6] = True
    additive = torch.zeros(1, 1, 11, 11).masked_fill(~mask, torch.finfo(torch.float32).min)
    expected = theirs(
        query_embeds=both, query_length=6, encoder_hidden_states=source, attention_mask=additive
    ).last_hidden_state
    found = ours(both, source, 6, mask[None, None])
    torch.testing.assert_close(found, expected, **CLOSE)
    other = both.clone()
    other[:, -1] = torch.randn(24)
    changed = ours(other, source, 6, mask[None, None])
    assert torch.equal(changed[:, :-1], found[:, :-1])  # neither queries nor earlier text see the last token
    assert (ours(other, source, 6)[:, :-1] - ours(both, source, 6)[:, :-1]).abs().max() > 1e-3  # unmasked they do


@torch.no_grad()
def test_a_q_former_that_reads_is_instructblips():
    ours = connector(type="qformer", queries=6, layers=3, width=24, heads=4, intermediate=40, text_length=5)
    config = InstructBlipQFormerConfig(
        vocab_size=50,
        max_position_embeddings=5,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=40,
        encoder_hidden_size=WIDTH,
        cross_attention_frequency=2,
        attn_implementation="eager",
    )
    theirs = InstructBlipQFormerModel(config).eval()
    names = {
        "embeddings.word_embeddings": "words",
        "embeddings.position_embeddings": "places",
        "embeddings.layernorm": "qformer.norm",
        "encoder.layer.": "qformer.layers.",
    } | {theirs: own for theirs, own in NAMES.items() if theirs not in ("layernorm.", "encoder.layer.")}
    # what the last layer makes of text is read by nobody, and ours has no weights for it
    read = {name: value for name, value in theirs.state_dict().items() if not name.startswith(UNREAD)}
    copy(names, ours.reader, read)
    text = torch.tensor([[3, 4, 5, 6, 7], [9, 8, -1, -1, -1]])
    source = torch.randn(2, 9, WIDTH)
    expected = theirs(
        input_ids=text.clamp(min=0),
        attention_mask=torch.cat((torch.ones(2, 6), (text >= 0).float()), dim=1),
        query_embeds=ours.reader.queries.expand(2, -1, -1),
        encoder_hidden_states=ours.reader.norm_vision(source),
    ).last_hidden_state[:, :6]
    torch.testing.assert_close(ours(source, (1, 9), text), ours.projection(expected), **CLOSE)
    assert (ours(source, (1, 9), text.flip(1)) - ours.projection(expected)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="this connector reads the question"):
        ours(source, (1, 9))


# T16


@torch.no_grad()
@pytest.mark.parametrize("content", [0, 1, 2])
def test_context_and_content_are_llama_vids(content):
    sizes = {"queries": 6, "layers": 2, "width": 24, "heads": 4, "intermediate": 40}
    ours = connector(type="context_content", **sizes, text_length=5, content=content)
    x, text = torch.randn(2, 24, WIDTH), torch.randint(0, 50, (2, 5))
    found = ours(x, (4, 6), text)
    asked = ours.asking(ours.reader(x, text))
    weights = (asked @ ours.key(x).transpose(1, 2) / WIDTH**0.5).softmax(-1)
    context = (weights @ x).mean(1) @ ours.value.weight.T + ours.value.bias
    torch.testing.assert_close(found[:, 0], context, **CLOSE)
    plane = x.unflatten(1, (4, 6))
    pooled = {
        0: x,
        1: x.mean(1, keepdim=True),
        2: torch.stack([plane[:, r : r + 2, c : c + 3].mean((1, 2)) for r in (0, 2) for c in (0, 3)], dim=1),
    }[content]
    torch.testing.assert_close(found[:, 1:], ours.content(pooled), **CLOSE)
    other = ours(x, (4, 6), text.flip(1))
    assert torch.equal(other[:, 1:], found[:, 1:])
    assert (other[:, 0] - found[:, 0]).abs().max() > 1e-4


# T5


@torch.no_grad()
def test_pixel_shuffle_is_internvls():
    features = torch.randn(2, 24, WIDTH)
    theirs = InternVLModel.pixel_shuffle(None, features.unflatten(1, (4, 6)), scale_factor=0.5)
    torch.testing.assert_close(PixelShuffle(2)(features, (4, 6)), theirs.flatten(1, 2), **EXACT)


@torch.no_grad()
def test_projections_are_their_formulas():
    x = torch.randn(2, 6, WIDTH)
    gelu, silu = nn.functional.gelu, nn.functional.silu
    one, linear = {"type": "mlp"}, connector(type="mlp", kind="linear")
    torch.testing.assert_close(linear(x, (2, 3)), x @ linear[0].weight.T + linear[0].bias, **CLOSE)
    yi = connector(**one, kind="mlp2x_gelu_norm")
    torch.testing.assert_close(yi(x, (2, 3)), yi[4](yi[3](gelu(yi[1](yi[0](x))))), **EXACT)
    assert [type(layer).__name__ for layer in yi] == ["Linear", "LayerNorm", "GELU", "Linear", "LayerNorm"]
    glu = connector(**one, kind="glu", hidden=24)
    hidden = gelu(glu[1](x @ glu[0].weight.T))
    unit = glu[3]
    expected = (silu(hidden @ unit.gate.weight.T) * (hidden @ unit.up.weight.T)) @ unit.down.weight.T
    torch.testing.assert_close(glu(x, (2, 3)), expected, **CLOSE)
    neck = connector(**one, kind="neck", hidden=8)
    torch.testing.assert_close(neck(x, (2, 3)), neck[2](silu(neck[0](x))), **EXACT)


def decoder_config():
    """The tiny decoder of our bridges, as transformers' own composites take it."""
    return tiny(**spec("llava15"))[0].config.text_config


@torch.no_grad()
def test_llava_15_is_transformers_llava():
    ours, processor = tiny(**spec("llava15"))
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**{key: value for key, value in CLIP.items() if key != "type"}),
        text_config=decoder_config(),
        image_token_index=processor.image_token_id,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    theirs = LlavaForConditionalGeneration(config).eval()
    own = ours.state_dict()
    for name, value in theirs.state_dict().items():
        found = name.replace("vision_tower.", "vision.tower.").replace("multi_modal_projector.linear_1", "connector.0")
        found = found.replace("multi_modal_projector.linear_2", "connector.2")
        if found in own:
            value.copy_(own[found])
        else:  # the layer above the one that is read, which ours does not have
            assert "vision_tower.encoder.layers.2." in name or "post_layernorm" in name
    shown = {"text": ["<image>how many?"], "images": [[picture(0, 40, 24)]], "return_tensors": "pt"}
    inputs = processor(**shown)
    expected = theirs(**inputs).logits
    torch.testing.assert_close(ours(**inputs).logits, expected, **CLOSE)
    other = tiny(**spec("llava15") | {"encoder": {"type": "tower", "layer": -1}})[0]
    other.load_state_dict({**other.state_dict(), **own})
    assert (other(**inputs).logits - expected).abs().max() > 1e-3


# T6


@torch.no_grad()
@pytest.mark.parametrize("grid", [(3, 3), (4, 6), (1, 5)])
def test_the_resampler_is_qwen_vls(grid):
    ours = connector(type="cross_attention", queries=9, heads=2)
    x = torch.randn(2, grid[0] * grid[1], WIDTH)
    table = torch.zeros(9, TEXT)
    for row in range(3):
        for col in range(3):
            for half, place in enumerate((col, row)):  # columns first
                for i in range(TEXT // 4):
                    angle = place / 10000 ** (i / (TEXT // 4))
                    table[row * 3 + col, half * TEXT // 2 + i] = math.sin(angle)
                    table[row * 3 + col, half * TEXT // 2 + TEXT // 4 + i] = math.cos(angle)
    torch.testing.assert_close(ours.positions, table, **CLOSE)
    keys = table.T.reshape(1, TEXT, 3, 3)
    if grid != (3, 3):
        keys = nn.functional.interpolate(keys, size=grid, mode="bicubic", align_corners=False)
    attention = nn.MultiheadAttention(TEXT, 2, batch_first=True)
    parts = [ours.to_q, ours.to_k, ours.to_v]
    attention.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
    attention.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
    attention.out_proj.load_state_dict(ours.to_out.state_dict())
    value = ours.norm_kv(ours.kv(x))
    query = (ours.norm_query(ours.query) + table).expand(2, -1, -1)
    found = attention(query, value + keys.flatten(2).transpose(1, 2), value)[0]
    expected = ours.norm_post(found) @ ours.projection.weight.T
    torch.testing.assert_close(ours(x, grid), expected, **CLOSE)
    ours.positions.zero_()  # the control
    assert (ours(x, grid) - expected).abs().max() > 1e-2


# T7


def sizes(count, seed, low, high):
    chance = random.Random(seed)
    return [(chance.randint(low, high), chance.randint(low, high)) for _ in range(count)]


def llava_next():
    ours, processor = tiny(**spec("llava_next"))
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**{key: value for key, value in CLIP.items() if key != "type"}),
        text_config=decoder_config(),
        image_grid_pinpoints=CANVASES,
        image_token_index=processor.image_token_id,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    theirs = LlavaNextModel(config).eval()
    own = ours.model.state_dict()
    with torch.no_grad():
        for name, value in theirs.state_dict().items():
            found = name.replace("vision_tower.", "vision.tower.").replace("image_newline", "packer.newline")
            found = found.replace("multi_modal_projector.linear_1", "connector.0")
            found = found.replace("multi_modal_projector.linear_2", "connector.2")
            if found in own:
                value.copy_(own[found])
    return ours, processor, theirs


@torch.no_grad()
def test_pictures_of_any_resolution_are_packed_as_in_llava_next():
    ours, processor, theirs = llava_next()
    preprocess = LlavaNextImageProcessorPil(
        size={"shortest_edge": 16},
        crop_size={"height": 16, "width": 16},
        image_grid_pinpoints=CANVASES,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    packed = 0
    for place, size in enumerate(
        [*sizes(60, 0, 1, 90), *sizes(20, 1, 100, 900), (48, 16), (47, 16), (16, 47), (33, 32)]
    ):
        image = picture(place, *size)
        inputs = processor.image_inputs([image])
        reference = preprocess(images=[image], return_tensors="pt")
        torch.testing.assert_close(
            inputs["pixel_values"], reference["pixel_values"][0], atol=1e-5, rtol=0, msg=str(size)
        )
        (found,) = ours.get_image_features(**inputs).pooler_output
        (expected,) = theirs.get_image_features(
            reference["pixel_values"], reference["image_sizes"], vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        ).pooler_output  # fmt: skip
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0, msg=str(size))
        packed += len(found) < 16 * (1 + len(inputs["pixel_values"]) - 1) + 12
    assert packed > 40  # most pictures lose rows or columns of padding


def test_canvases_are_chosen_as_in_llava_next():
    canvases = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]
    for width, height in [*sizes(2000, 2, 1, 2000), (1, 4000), (4000, 1), (672, 672)]:
        assert most_effective(width, height, canvases) == select_best_resolution((height, width), canvases)


# T8

PUBLISHED = {  # (width, height): rows and columns of slices, rows and columns of patches of one
    (672, 1008): ((3, 2), (24, 24)),
    (1008, 672): ((2, 3), (24, 24)),
    (1344, 336): ((1, 4), (24, 24)),
    (500, 400): ((1, 2), (30, 18)),
    (672, 1088): ((3, 2), (24, 23)),
    (2000, 2000): ((2, 3), (29, 19)),
    (300, 900): ((3, 1), (24, 24)),
}


def test_slices_are_llava_uhds():
    processor = MiniCPMV4_6ImageProcessorPil()
    for width, height in sizes(5000, 3, 60, 2000):
        expected = processor.get_sliced_grid((height, width), 6, 336) or [1, 1]
        assert list(slicing(width, height, 336, 6, "eccv")) == expected, (width, height)
    for (width, height), (grid, patches) in PUBLISHED.items():
        assert slicing(width, height, 336, 6, "eccv") in (grid, grid[::-1] if width == height else grid)
        rows, cols = slicing(width, height, 336, 6, "eccv")
        box = shaped((width // cols) / (height // rows), 336, 14)
        assert (box[0] // 14, box[1] // 14) in (patches, patches[::-1] if width == height else patches), (width, height)
    assert slicing(336, 336, 336, 6, "eccv") == (1, 1)
    # where the two published rules differ: a long picture that is not large, and seven slices
    assert slicing(1340, 62, 336, 6, "eccv") == (1, 1)
    assert slicing(1340, 62, 336, 6, "arxiv") == (1, 2)
    assert slicing(1955, 289, 336, 6, "eccv") == (1, 6)
    assert slicing(1955, 289, 336, 6, "arxiv") == (1, 7)


def test_a_slice_never_has_more_patches_than_the_square():
    for width, height in [*sizes(2000, 4, 1, 4000), (4000, 1), (1, 4000)]:
        high, wide = shaped(width / height, 336, 14)
        assert high >= 14
        assert wide >= 14
        assert (high // 14) * (wide // 14) <= 576


@torch.no_grad()
def test_a_tower_resizes_its_positions_as_clip_does():
    ours, processor = tiny(**spec("llava_uhd"))
    tower = AutoModel.from_config(ours.config.vision_config).eval()
    own = {name.removeprefix("vision.tower."): value for name, value in ours.model.state_dict().items()}
    tower.load_state_dict({**tower.state_dict(), **{name: own[name] for name in tower.state_dict() if name in own}})
    layout = processor.layout((60, 20))
    assert len({tile.box for tile in layout.tiles}) == 2
    for box in {tile.box for tile in layout.tiles}:
        pixels = torch.randn(2, 3, *box)
        states = tower(pixels, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
        torch.testing.assert_close(ours.model.vision(pixels), states[-2][:, 1:], **CLOSE)


# T10


@torch.no_grad()
def test_patches_of_pixels_are_fuyus():
    ours, processor = tiny(**spec("otterhd"))
    text = ours.config.text_config
    config = FuyuConfig(
        text_config=text, hidden_size=text.hidden_size, patch_size=4, image_token_id=processor.image_token_id
    )
    theirs = FuyuForCausalLM(config).eval()
    own = ours.state_dict()
    for name, value in theirs.state_dict().items():
        value.copy_(own[name.replace("vision_embed_tokens", "connector.0")])
    preprocess = FuyuImageProcessorPil(size={"height": 24, "width": 40}, patch_size={"height": 4, "width": 4})
    for place, size in enumerate([(40, 24), (17, 9), (30, 24), (12, 23)]):
        image = picture(place, *size)
        inputs = processor(text=["<image>what?"], images=[[image]], return_tensors="pt")
        box = processor.layout(size).tiles[0].box
        pixels = torch.from_numpy(preprocess(images=[image], return_tensors="np")["images"][0][0]).float()
        patches = preprocess.patchify_image(pixels[None, :, : box[0], : box[1]])
        assert patches.shape[0] == (box[0] // 4) * (box[1] // 4)
        expected = theirs(input_ids=inputs["input_ids"], image_patches=patches[None]).logits
        torch.testing.assert_close(ours(**inputs).logits, expected, **CLOSE, msg=str(size))
        turned = preprocess.patchify_image(pixels[None, :, : box[0], : box[1]].transpose(-1, -2).contiguous())
        assert (theirs(input_ids=inputs["input_ids"], image_patches=turned[None]).logits - expected).abs().max() > 1e-3


def test_a_large_picture_is_scaled_into_fuyus_box():
    _, processor = tiny(**spec("otterhd"))
    preprocess = FuyuImageProcessorPil(size={"height": 24, "width": 40})
    for width, height in sizes(200, 5, 20, 300):
        array = np.zeros((3, height, width), dtype=np.uint8)
        high, wide = preprocess.resize(array, preprocess.size).shape[-2:]
        box = processor.layout((width, height)).tiles[0].box
        least = max(1, math.ceil(high / 4)), max(2, math.ceil(wide / 4))
        assert box == (least[0] * 4, least[1] * 4), (width, height)


# T15


@torch.no_grad()
def test_windows_have_updates_of_their_own():
    ours, processor = tiny(**spec("monkey"))
    plain = tiny(**spec("monkey") | {"encoder": {"type": "tower"}})[0]
    plain.load_state_dict({name: value for name, value in ours.state_dict().items() if ".window_" not in name})
    inputs = processor.image_inputs([picture(0, 40, 24), picture(1, 9, 50)])

    def tiles(model):
        """[pictures, tiles, tokens, width] of features: four windows, then the overview."""
        found = model.get_image_features(**inputs).pooler_output
        return torch.stack(list(found)).unflatten(1, (5, 9)) if isinstance(found, list) else found.unflatten(0, (2, 5))

    expected = tiles(plain)
    layers = ours.model.vision.tower.encoder.layers
    updates = [layer.get_submodule(name) for layer in layers for name in ("window_in", "window_out", "window_mlp")]
    for update in updates:  # `tiny` scales what is not a vector; updates start at 0
        assert not update.up.any()
        assert update.scale.eq(1).all()
    torch.testing.assert_close(tiles(ours), expected, **CLOSE)
    for window in range(4):
        for update in updates:
            nn.init.normal_(update.up[window], std=0.3)
        changed = (tiles(ours) - expected).abs().amax((0, 2, 3)) > 1e-3
        assert changed.tolist() == [place == window for place in range(4)] + [False]  # never the overview
        for update in updates:
            update.up[window] = 0


@torch.no_grad()
def test_a_windows_update_is_its_formula():
    """To q, k and v from the normed input, to the attention's output, and past the feed-forward from its input."""
    ours, _ = tiny(**spec("monkey"))
    layer = ours.model.vision.tower.encoder.layers[0]
    for update in (layer.window_in, layer.window_out, layer.window_mlp):
        nn.init.normal_(update.up, std=0.3)
        nn.init.normal_(update.scale)
    windows = torch.tensor([2, -1])
    x = torch.randn(2, 16, WIDTH)

    def low(update, value):
        return update.scale[2] * (value @ update.down[2].T @ update.up[2].T)

    one = x[:1]
    normed = layer.layer_norm1(one)
    q, k, v = low(layer.window_in, normed).chunk(3, dim=-1)
    own = layer.self_attn
    parts = [own.q_proj(normed) + q, own.k_proj(normed) + k, own.v_proj(normed) + v]
    heads = [part.unflatten(-1, (2, -1)).transpose(1, 2) for part in parts]
    weights = (heads[0] @ heads[1].transpose(2, 3) * (WIDTH / 2) ** -0.5).softmax(-1)
    joined = (weights @ heads[2]).transpose(1, 2).flatten(2)
    one = one + own.out_proj(joined) + low(layer.window_out, joined)
    expected = one + layer.mlp(layer.layer_norm2(one)) + low(layer.window_mlp, one)
    torch.testing.assert_close(layer(x, windows=windows)[:1], expected, **CLOSE)
    windows = torch.tensor([-1, -1])
    assert torch.equal(layer(x, windows=windows)[1], layer(x.flip(0), windows=windows)[0])


# T4


def aligning():
    """A reader with the heads of BLIP-2's first stage, and BLIP-2 of transformers with its weights."""
    module = connector(
        type="qformer", queries=6, layers=3, width=24, heads=2, intermediate=40, text_length=8, aligned=10
    )
    reader = module.reader.eval()
    reader.heads.temperature.data.fill_(0.5)
    for part in reader.modules():  # loud enough to tell one picture from another
        if isinstance(part, nn.LayerNorm):
            part.weight.data += 1
    theirs = Blip2ForImageTextRetrieval(
        Blip2Config(
            vision_config={
                "hidden_size": WIDTH,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 8,
            },
            qformer_config={
                "hidden_size": 24,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "intermediate_size": 40,
                "encoder_hidden_size": WIDTH,
                "cross_attention_frequency": 2,
                "vocab_size": 51,
                "max_position_embeddings": 8,
                "use_qformer_text_input": True,
            },
            text_config={"model_type": "opt", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
            num_query_tokens=6,
            image_text_hidden_size=10,
        )
    ).eval()
    copy(NAMES, reader.qformer, theirs.qformer)
    heads = reader.heads
    with torch.no_grad():
        theirs.query_tokens.copy_(reader.queries[None])
        theirs.embeddings.word_embeddings.weight.copy_(torch.cat((reader.words.weight, heads.starts[:1])))
        theirs.embeddings.position_embeddings.weight.copy_(reader.places.weight)
        own = ((heads.vision, "vision_projection"), (heads.text, "text_projection"), (heads.match, "itm_head"))
        for ours, name in own:
            getattr(theirs, name).load_state_dict(ours.state_dict())
    features = torch.randn(3, 9, WIDTH)
    captions = torch.tensor([[3, 4, 5, 6], [7, 8, -1, -1], [9, 4, 2, -1]])
    # what stands for their vision model: it gives what the reader's norm makes of the features
    theirs.vision_model.forward = lambda pixel_values, **_: (reader.norm_vision(pixel_values),)
    return reader, theirs, features, captions


def scores(theirs, features, captions, match):
    ids = torch.cat((torch.full((len(captions), 1), 50), captions.clamp(min=0)), dim=1)
    seen = torch.nn.functional.pad((captions >= 0).long(), (1, 0), value=1)
    out = theirs(features, ids, seen, use_image_text_matching_head=match, return_dict=False)
    return out[0]


@torch.no_grad()
def test_contrast_and_matching_are_blip2s():
    reader, theirs, features, captions = aligning()
    likeness = scores(theirs, features, captions, False) / 0.5
    if likeness.shape != (3, 3):
        likeness = likeness.reshape(3, 3)
    found = align(reader, features, captions, ("itc",), 3)["itc"]
    target = torch.arange(3)
    expected = sum(cross_entropy(part, target, label_smoothing=0.1) for part in (likeness, likeness.T)) / 2
    torch.testing.assert_close(found, expected, **CLOSE)
    swapped = align(reader, features.flip(0), captions.flip(0), ("itc",), 3)["itc"]
    torch.testing.assert_close(found, swapped, **CLOSE)  # the same pairs in another order
    assert abs(align(reader, features.flip(0), captions, ("itc",), 3)["itc"] - found) > 1e-3  # the control: other pairs

    torch.manual_seed(1)
    drawn = align(reader, features, captions, ("itm",), 3)["itm"]
    torch.manual_seed(1)
    others = likeness.clone().fill_diagonal_(-1e4)
    wrong_captions = torch.multinomial(others.softmax(1), 1)[:, 0]
    wrong_pictures = torch.multinomial(others.T.softmax(1), 1)[:, 0]
    assert not (wrong_captions == target).any()  # never the pair itself
    assert not (wrong_pictures == target).any()
    pictures, texts = torch.cat((target, wrong_pictures, target)), torch.cat((target, target, wrong_captions))
    logits = scores(theirs, features[pictures], captions[texts], True)
    labels = torch.tensor([1] * 3 + [0] * 6)
    torch.testing.assert_close(drawn, cross_entropy(logits, labels), **CLOSE)
    assert abs(cross_entropy(logits, 1 - labels) - drawn) > 1e-3


@torch.no_grad()
def test_generation_tells_captions_from_queries_that_do_not_see_them():
    """BLIP-2's two passes, the queries' keys kept from the first, are one pass under one mask."""
    reader, theirs, features, captions = aligning()
    found = align(reader, features, captions, ("itg",), 3)["itg"]
    source = reader.norm_vision(features)
    words = torch.cat((reader.heads.starts[1].expand(3, 1, -1), reader.words(captions.clamp(min=0))), dim=1)
    both = torch.cat((reader.queries.expand(3, -1, -1), words + reader.places.weight[:5]), dim=1)
    told = reader.qformer(reader.queries.expand(3, -1, -1), source, 6)
    seen = torch.ones(11, 11, dtype=torch.bool).tril()
    seen[:6, :6] = True
    whole = reader.qformer(both, source, 6, seen[None, None])
    asked = {"query_embeds": both, "query_length": 6, "encoder_hidden_states": source}
    expected = theirs.qformer(
        **asked, attention_mask=torch.where(seen, 0.0, torch.finfo(torch.float32).min).expand(3, 1, -1, -1)
    ).last_hidden_state
    torch.testing.assert_close(whole, expected, **CLOSE)
    torch.testing.assert_close(whole[:, :6], told, **CLOSE)  # queries as if there were no text
    logits = reader.heads.words(whole[:, 6:-1], reader.words.weight).transpose(1, 2)
    expected = cross_entropy(logits, captions, label_smoothing=0.1, ignore_index=-1)
    torch.testing.assert_close(found, expected, **CLOSE)
    other = captions.clone()
    other[0, 3] = 11  # the last word of a caption: nothing before it hears of it
    changed = reader.qformer(
        torch.cat((both[:, :-1], (reader.words(other.clamp(min=0))[:, -1:] + reader.places.weight[4])), dim=1),
        source,
        6,
        seen[None, None],
    )
    torch.testing.assert_close(changed[:, :-1], whole[:, :-1], **EXACT)
    assert (changed[:, -1] - whole[:, -1]).abs().max() > 1e-3


def test_pairs_that_do_not_count_change_nothing():
    reader, _, features, captions = aligning()
    wanted = ("itc", "itm", "itg")
    torch.manual_seed(0)
    two = align(reader, features[:2], captions[:2], wanted, 2)
    torch.manual_seed(0)
    padded = align(reader, features, captions, ("itg",), 2)
    torch.testing.assert_close(padded["itg"], two["itg"], **CLOSE)
    none = align(reader, features[:1], captions[:1], wanted, 0)
    assert [float(value.detach()) for value in none.values()] == [0, 0, 0]
    sum(none.values()).backward()
    assert all(parameter.grad is not None for parameter in reader.parameters())
    reader.zero_grad()
    sum(two.values()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in reader.parameters())


def test_a_q_former_of_published_size():
    """188 million parameters with BERT's words, the first stage's heads included (BLIP-2, section 3.1), to 1 %: how
    many words and which heads the paper counts it does not say."""
    settings = CONNECTORS.make({"type": "qformer", "text_length": 512, "aligned": 256})
    with torch.device("meta"):
        module = settings.build(1408, 4096, 30523)
    count = sum(parameter.numel() for parameter in module.parameters())
    assert count == settings.parameters(1408, 4096, 30523)
    count -= sum(parameter.numel() for parameter in module.projection.parameters())
    assert abs(count / 188e6 - 1) < 0.01

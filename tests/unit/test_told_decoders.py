"""Decoders with layers of their own for pictures, against plain ones written out: T2, T11 and T12 of the bridges."""

import copy

import pytest
import torch
from torch.nn.functional import gelu
from transformers import CLIPVisionConfig, Qwen3Config, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from rlhf.agreement import fingerprint_model
from rlhf.architecture import from_bridge
from rlhf.batching import BridgeVisual, collate
from rlhf.bridge import reset, upcycle
from rlhf.bridge.connectors import CONNECTORS
from rlhf.bridge.encoders import ENCODERS
from rlhf.bridge.layers.modality_adapter import ModalityAdapterConfig, ModalityAdapterModel
from rlhf.bridge.positions import FAR, next_position, position_rows, salt
from rlhf.packing import attend_by_row
from rlhf.routing import routers
from rlhf.types import Probe, Sample
from tests.unit.systems import awake, spec
from tests.unit.test_bridge_build import picture, tiny
from tests.unit.test_packing import media

TOLD = ["cogvlm", "flamingo", "lavin"]
TEXTS = ["a <image>b<image>cd<image>", "<image>", "<image><image> e", "none here"]
EXACT = {"atol": 0, "rtol": 0}


def built(name, **changes):
    """An awake bridge with weights that matter, in float64, and its processor."""
    given = spec(name)
    given["decoder"] = given["decoder"] | changes
    model, processor = tiny(**given)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 3
    awake(model)
    return model.double().eval(), processor


def inputs(processor, text, first=0):
    """One row with pictures; ids [1, length] are expanded."""
    shown = [picture(first + i, 40, 24) for i in range(text.count("<image>"))]
    found = processor(text=[text], images=[shown] if shown else None, return_tensors="pt")
    return {name: value.double() if name == "pixel_values" else value for name, value in found.items()}


def plain(model):
    """A Qwen3 of its own with the weights of the same names."""
    decoder = model.model.language_model
    sizes = {**decoder.plain_config().to_dict(), "model_type": "qwen3"}
    if hasattr(decoder.config, "language_layers"):
        sizes |= {"num_hidden_layers": decoder.config.language_layers, "layer_types": None}
    base = Qwen3Model(Qwen3Config(**sizes)).double().eval()
    mine = decoder.state_dict()
    base.load_state_dict({name: mine[name] for name in base.state_dict()})
    return base


# Where tokens stand, and what the decoder is told of them


def test_position_rows_by_hand():
    _, processor = tiny(**spec("cogvlm"))  # 16 patches between two vectors
    ids = torch.tensor([processor.expand([7, 2, 7, 2, 2, 9], [(40, 24)] * 3)])
    rows = position_rows(ids, processor.geometry)
    shared = [1, *[2] * 16, 3]
    expected = [0, *shared, 4, *(step + 4 for step in shared), *(step + 7 for step in shared), 11]
    assert rows[0, 0].tolist() == expected
    told = [0, *[1] * 17, 0, 0, *[2] * 17, 0, *[3] * 17, 0, 0]  # the first vector is the experts', the last is not
    assert (rows[1] - rows[0])[0].tolist() == told
    assert next_position(ids, processor.geometry).tolist() == [12]

    _, processor = tiny(**spec("flamingo"))  # 5 latents, which take no position
    ids = torch.tensor([processor.expand([7, 2, 7, 2, 2, 9], [(40, 24)] * 3)])
    rows = position_rows(ids, processor.geometry)
    assert rows[0, 0].tolist() == [0, *[0] * 5, 1, *[1] * 10, 2]
    assert (rows[1] - rows[0])[0].tolist() == [0, *[1] * 5, 0, *[2] * 5, *[3] * 5, 0]
    assert next_position(ids, processor.geometry).tolist() == [3]

    _, processor = tiny(**spec("lavin"))
    ids = torch.tensor([[7, 2, 2, 2, 9], [7, 8, 8, 8, 9]])
    rows = position_rows(ids, processor.geometry)
    assert rows[0].tolist() == [[0, 1, 2, 3, 4], [FAR, FAR + 1, FAR + 2, FAR + 3, FAR + 4]]
    assert next_position(ids, processor.geometry).tolist() == [5, FAR + 5]
    assert [salt(row.tolist(), processor.geometry) for row in ids] == ["pictures", "text"]


@pytest.mark.parametrize("name", TOLD)
def test_decoding_from_a_cache_is_the_whole_row(name):
    model, processor = built(name)
    for text in TEXTS:
        given = inputs(processor, text)
        length = given["input_ids"].shape[1]
        with torch.no_grad():
            ids = model.generate(**given, max_new_tokens=5, do_sample=True)
            whole = model(**{**given, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits
            first = model(**given, use_cache=True)
            rows = position_rows(ids, processor.geometry)
            follow = next_position(given["input_ids"], processor.geometry)
            assert (rows[:, 0, length:] == follow + torch.arange(5)).all()  # what engines continue with
            rest = model(ids[:, length:], position_ids=rows[..., length:], past_key_values=first.past_key_values)
        torch.testing.assert_close(torch.cat((first.logits, rest.logits), 1), whole, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", TOLD)
def test_packed_rows_are_padded_rows(name):
    model, processor = built(name)
    one, two = (media(0, 40, 24), media(1, 9, 50)), (media(2, 30, 30),)
    rows = [((7, 2, 8, 2, 9), one, (5, 6, 7)), ((7, 2, 8, 2, 9), one, (4,)), ((2, 9), two, (3, 3)), ((8, 8), (), (1,))]
    samples = [
        Sample(str(i), (*processor.expand(ids, [m.size for m in shown]), *reply), 0, shown)
        for i, (ids, shown, reply) in enumerate(rows)
    ]
    samples = [
        Sample(s.key, s.token_ids, len(s.token_ids) - len(r[2]), s.media) for s, r in zip(samples, rows, strict=True)
    ]
    found = {}
    for packs in (False, True):
        tensors = collate(samples, BridgeVisual(processor, packs))
        media_of = {k: v.double() if k == "pixel_values" else v for k, v in tensors.media.items()}
        given = {**tensors.model_inputs(), **media_of}
        if packs:
            attend_by_row(model.model.language_model)
        with torch.no_grad():
            logits = model(**given, use_cache=False).logits
        found[packs] = tensors.in_rows(logits.flatten(0, 1))[tensors.attention_mask > 0]
    torch.testing.assert_close(found[True], found[False], atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", TOLD)
def test_what_went_wrong_in_a_publish_can_be_looked_for(name):
    """Every module with weights of its own has a fingerprint."""
    model, processor = tiny(**spec(name))
    probes = [Probe((7, 2, 9), (media(0, 40, 24),)), Probe((7, 8))]
    found = fingerprint_model(model, processor, BridgeVisual(processor), probes)
    assert any("language_model.layers.1" in group for group in found.prints)


@pytest.mark.parametrize("name", TOLD)
def test_positions_that_say_nothing_of_pictures_are_refused(name):
    model, processor = built(name)
    given = inputs(processor, TEXTS[0])
    length = given["input_ids"].shape[1]
    with pytest.raises(ValueError, match=r"position rows \[3, rows, length\]"):
        model(**given, position_ids=torch.arange(length)[None])


def test_a_plain_decoder_cannot_share_positions():
    given = spec("cogvlm")
    with pytest.raises(ValueError, match='positions = "each" is all that'):
        tiny(**given | {"decoder": given["decoder"] | {"type": "qwen3"}})
    grid = {"tiler": {"type": "grid", "tile": 16, "max_tiles": 4}}
    with pytest.raises(ValueError, match="counts the features of a picture"):
        tiny(**given | grid)


# T2


@torch.no_grad()
def flamingo(model, ids, latents):
    """Flamingo as its paper has it: the text alone is the sequence, the latents are read through a mask. `latents`
    [pictures, latents, width] -> logits [text, vocabulary]."""
    decoder, marks = model.model.language_model, ids[0] == model.config.image_token_id
    first = marks & ~torch.cat((marks.new_zeros(1), marks[:-1]))
    if len(latents):  # adjacent pictures are told by their number of latents
        order = marks.cumsum(0) - 1
        first = marks & (order % latents.shape[1] == 0)
    latest = first.cumsum(0)[~marks]
    hidden = decoder.embed_tokens(ids[:, ~marks])
    length = hidden.shape[1]
    rotary = decoder.rotary_emb(hidden, torch.arange(length)[None])
    rotary = tuple(part.double() for part in rotary)

    def attention(module, query, key, value, mask):
        key, value = (part.repeat_interleave(module.num_key_value_groups, 1) for part in (key, value))
        scores = (query @ key.transpose(-1, -2) * module.scaling).masked_fill(~mask, -torch.inf)
        weights = scores.softmax(-1).nan_to_num()  # a row that may look nowhere gets nothing
        return module.o_proj((weights @ value).transpose(1, 2).flatten(-2))

    def heads(module, x):
        return module.split(x).transpose(1, 2)

    of_picture = torch.arange(1, len(latents) + 1).repeat_interleave(latents.shape[1]) if len(latents) else None
    for layer in decoder.layers:
        if layer.has_gated:
            gated, cross = layer.gated, layer.gated.attn
            read = torch.zeros_like(hidden)
            if of_picture is not None:
                seen = latents.flatten(0, 1)[None]
                query = heads(cross, cross.q_proj(cross.norm(hidden)))
                key, value = heads(cross, cross.k_proj(seen)), heads(cross, cross.v_proj(seen))
                read = attention(cross, query, key, value, latest[:, None] == of_picture)
            hidden = hidden + gated.attn_gate.tanh() * read
            hidden = hidden + gated.ffw_gate.tanh() * gated.down_proj(gelu(gated.up_proj(gated.norm(hidden))))
        own, x = layer.self_attn, layer.input_layernorm(hidden)
        query = own.q_norm(own.split(own.q_proj(x))).transpose(1, 2)
        key = own.k_norm(own.split(own.k_proj(x))).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *rotary)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        hidden = hidden + attention(own, query, key, heads(own, own.v_proj(x)), causal)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(decoder.norm(hidden))[0]


def latents_of(model, given):
    if "pixel_values" not in given:
        return torch.empty(0, 5, 32, dtype=torch.float64)
    return model.get_image_features(given["pixel_values"]).pooler_output


@pytest.mark.parametrize("every", [1, 2])
def test_gated_layers_are_flamingos(every):
    model, processor = built("flamingo", every=every)
    for text in TEXTS:
        given = inputs(processor, text)
        ids, latents = given["input_ids"], latents_of(model, given)
        marks = ids[0] == model.config.image_token_id
        with torch.no_grad():
            found = model(**given).logits[0, ~marks]
        torch.testing.assert_close(found, flamingo(model, ids, latents), atol=1e-9, rtol=0)
        if len(latents) and not marks[-1]:  # the control: other pictures
            assert (found - flamingo(model, ids, latents.flip(0) * 2)).abs().max() > 1e-2


def test_closed_gates_change_nothing():
    model, processor = built("flamingo")
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):
            parameter.data.zero_()
    without = copy.deepcopy(model)
    for layer in without.model.language_model.layers:
        layer.has_gated = False
    base = plain(model)
    for text in ("b<image>", *TEXTS[2:]):
        given = inputs(processor, text)
        marks = given["input_ids"][0] == model.config.image_token_id
        with torch.no_grad():
            found = model(**given).logits[0, ~marks]
            assert torch.equal(found, without(**given).logits[0, ~marks])
            alone = model.lm_head(base(given["input_ids"][:, ~marks]).last_hidden_state)[0]
        torch.testing.assert_close(found, alone, atol=1e-12, rtol=0)


@torch.no_grad()
def test_text_reads_the_latest_picture():
    model, processor = built("flamingo")
    text = "ab <image>cd <image>ef"
    given, other = inputs(processor, text), inputs(processor, text)
    other["pixel_values"][0] += 1  # the first picture
    changed = (model(**given).logits - model(**other).logits)[0].abs().amax(-1)
    ids = given["input_ids"][0].tolist()
    marks = [place for place, token in enumerate(ids) if token == processor.image_token_id]
    assert torch.equal(changed[: marks[0]], torch.zeros(marks[0]))  # nothing before it
    assert changed[-1] > 1e-6  # what is after the second, through the text between them
    # one layer by itself: text after the second picture reads nothing of the first
    cross = next(layer.gated.attn for layer in model.float().model.language_model.layers if layer.has_gated)
    told = (position_rows(given["input_ids"], processor.geometry).diff(dim=0))[0]
    hidden = torch.randn(1, len(ids), 32)
    moved = hidden + (told == 1)[..., None] * torch.randn(32)
    mask = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()[None, None]
    model.model.language_model.set_attn_implementation("sdpa")
    first, second = (cross(x, told, None, mask) for x in (hidden, moved))
    text_at = [place for place in range(len(ids)) if place not in marks]
    after = [place for place in text_at if place > marks[-1]]
    between = [place for place in text_at if marks[0] < place < marks[-1]]
    assert torch.equal(first[:, after], second[:, after])
    assert (first[:, between] - second[:, between]).abs().max() > 1e-3
    assert torch.equal(first[:, : marks[0]], torch.zeros(1, marks[0], 32))  # before any picture: exactly nothing


# T11


@torch.no_grad()
def test_experts_begin_as_the_text():
    """Copies for whatever is a picture, and nothing of theirs where all is text."""
    model, _ = tiny(**spec("cogvlm"))
    decoder, base = model.eval().model.language_model, plain(model).float()
    hidden = torch.randn(2, 12, 32)
    positions = torch.randint(0, 9, (2, 12)).sort().values
    for told in (torch.zeros(2, 12), torch.ones(2, 12), torch.randint(0, 2, (2, 12))):
        rows = torch.stack((positions, positions + told.long(), positions))
        expected = base(
            inputs_embeds=hidden, position_ids=positions, attention_mask=torch.ones(2, 12)
        ).last_hidden_state
        torch.testing.assert_close(
            decoder(inputs_embeds=hidden, position_ids=rows).last_hidden_state, expected, atol=1e-6, rtol=0
        )
    awake(model)
    text = torch.stack((positions,) * 3)
    exact = decoder(inputs_embeds=hidden, position_ids=text).last_hidden_state
    torch.testing.assert_close(
        exact,
        base(inputs_embeds=hidden, position_ids=positions, attention_mask=torch.ones(2, 12)).last_hidden_state,
        **EXACT,
    )
    rows = torch.stack((positions, positions + 1, positions))
    assert (decoder(inputs_embeds=hidden, position_ids=rows).last_hidden_state - exact).abs().max() > 1e-2


@torch.no_grad()
def test_an_expert_of_the_last_layer_says_what_its_picture_says():
    model, processor = built("cogvlm")
    given = inputs(processor, "ab <image>cd")
    seen = position_rows(given["input_ids"], processor.geometry).diff(dim=0)[0, 0] > 0
    before = model(**given).logits[0]
    layer = model.model.language_model.layers[-1]
    layer.vision_mlp.down_proj.weight += 1
    changed = (model(**given).logits[0] - before).abs().amax(-1) > 0
    assert torch.equal(changed, seen)
    layer.vision_mlp.down_proj.weight -= 1
    layer.self_attn.vision_v_proj.weight += 1
    changed = (model(**given).logits[0] - before).abs().amax(-1) > 1e-9
    first = int(seen.nonzero()[0])
    assert changed[first:].all()  # later text sees it
    assert not changed[:first].any()


def test_engines_route_every_token_and_say_the_same():
    model, processor = built("cogvlm")
    given = inputs(processor, TEXTS[0])
    from rlhf.bridge.layers import visual_expert

    with torch.no_grad():
        routed = model(**given).logits
        everywhere = visual_expert.by_kind
        visual_expert.by_kind = lambda *args: everywhere(*args[:4], True)
        try:
            both = model(**given).logits
        finally:
            visual_expert.by_kind = everywhere
    torch.testing.assert_close(routed, both, atol=1e-9, rtol=0)


# T12


def fold(adapter, weights, linear):
    """The linear layer behind an adapter, with the adapter in its own weight and bias."""
    width = adapter.down.shape[1]
    blocks = [torch.block_diag(*update) for update in adapter.up]  # [width, rank] each
    up = adapter.scale * sum(weight * block for weight, block in zip(weights, blocks, strict=True))
    bias = up @ adapter.down_bias + adapter.scale * (weights[:, None] * adapter.up_bias).sum(0)
    inner = torch.eye(width, dtype=torch.float64) + up @ adapter.down
    rest = torch.zeros(linear.out_features, dtype=torch.float64) if linear.bias is None else linear.bias
    return linear.weight @ inner, rest + linear.weight @ bias


@torch.no_grad()
@pytest.mark.parametrize("pictures", [True, False])
def test_adapters_fold_into_the_weights_they_precede(pictures):
    """The published modality token sees itself alone, so that routers say the same of every row: a plain Qwen3 with
    biases computes what the adapters do."""
    model, _ = built("lavin")
    decoder = model.model.language_model
    base = Qwen3Model(Qwen3Config(**{**decoder.config.to_dict(), "model_type": "qwen3", "attention_bias": True}))
    base = base.double().eval()
    mine = decoder.state_dict()
    weights = {name: mine.get(name, torch.zeros_like(value)) for name, value in base.state_dict().items()}
    # the token by itself, through the layers as they are: a sequence of one
    alone = decoder.modality_adapter.weight[None, int(pictures) : int(pictures) + 1].double()
    for index, layer in enumerate(decoder.layers):
        attention, normed = layer.self_attn, layer.input_layernorm(alone)
        mixed = attention.adapter.weights(normed[0, 0])
        for name in ("q_proj", "k_proj", "v_proj"):
            place = f"layers.{index}.self_attn.{name}"
            weights[f"{place}.weight"], weights[f"{place}.bias"] = fold(
                attention.adapter, mixed, getattr(attention, name)
            )
        value = attention.v_proj(attention.adapter(normed, mixed.expand(1, 1, 2)))
        heads = value.unflatten(-1, (-1, attention.head_dim))
        alone = alone + attention.o_proj(heads.repeat_interleave(attention.num_key_value_groups, 2).flatten(2))
        alone = alone + layer.mlp(layer.post_attention_layernorm(alone))
    base.load_state_dict(weights)
    hidden = torch.randn(2, 9, 32, dtype=torch.float64)
    positions = torch.arange(9).expand(2, -1)
    rows = (positions + (0 if pictures else FAR)).expand(3, -1, -1)
    found = decoder(inputs_embeds=hidden, position_ids=rows).last_hidden_state
    expected = base(inputs_embeds=hidden, position_ids=positions).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    other = decoder(inputs_embeds=hidden, position_ids=(rows + FAR) % (2 * FAR)).last_hidden_state
    assert (found - other).abs().max() > 1e-3  # the control: the other kind of row


@torch.no_grad()
def test_fresh_adapters_change_nothing():
    model, _ = tiny(**spec("lavin"))
    decoder, base = model.model.language_model, plain(model).float()
    ids = torch.tensor([[7, 8, 9, 10]])
    expected = base(ids).last_hidden_state
    torch.testing.assert_close(decoder(ids).last_hidden_state, expected, atol=1e-6, rtol=0)
    vision = model.model.vision
    bare, pixels = copy.deepcopy(vision), torch.randn(2, 3, 16, 16)
    for layer in bare.tower.encoder.layers:
        layer.layer_norm1.adapter.forward = lambda x, weights: x
    assert torch.equal(vision(pixels), bare(pixels))
    awake(model)
    assert (vision(pixels) - bare(pixels)).abs().max() > 1e-3


def test_lavin_adds_what_its_paper_says():
    """3,781,296 parameters at the sizes of LLaMA-7B and CLIP-L, 5,390,080 at those of 13B."""
    clip = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    for hidden, layers, inner, heads, stated in ((4096, 32, 11008, 32, 3_781_296), (5120, 40, 13824, 40, 5_390_080)):
        config = ModalityAdapterConfig(
            hidden_size=hidden, num_hidden_layers=layers, intermediate_size=inner, num_attention_heads=heads
        )
        with torch.device("meta"):
            decoder = ModalityAdapterModel(config)
            encoder = ENCODERS.make({"type": "tower", "layer": [-1], "feature": "cls", "adapter_rank": 8})
            tower = encoder.build(CLIPVisionConfig(**clip, image_size=224, patch_size=14))
            neck = CONNECTORS.make({"type": "mlp", "kind": "neck", "hidden": 128}).build(1024, hidden, 32000)
        added = [p.numel() for part in (decoder, tower) for name, p in part.named_parameters() if "adapter" in name]
        added += [p.numel() for p in neck.parameters()]
        assert sum(added) == stated


@pytest.mark.parametrize("name", TOLD)
def test_upcycling_changes_nothing_at_first(name):
    model, processor = built(name)
    sparse = upcycle(model, num_experts=4, top_k=2, layers="every_second", seed=3).eval()
    layers = sparse.model.language_model.layers
    assert [hasattr(layer.mlp, "experts") for layer in layers] == [i % 2 == 0 for i in range(len(layers))]
    with torch.no_grad():
        for text in TEXTS:
            given = inputs(processor, text)
            with routers(sparse) as routed:
                found = sparse(**given).logits
            assert (found - model(**given).logits).abs().max() < 1e-5  # a router is float32
            # heard for every token of the row, pictures too, whatever else a router is asked
            assert {len(said.logits) for said in routed.values()} == {given["input_ids"].shape[1]}
        # the control: other experts do not agree
        reset(sparse, ["*.experts.down_proj"], seed=9)
        assert (sparse(**given).logits - model(**given).logits).abs().max() > 1e-4
    planned = from_bridge(spec(name), model.config.text_config.vocab_size).upcycled(4, 2, "every_second")
    assert planned.parameters == sum(parameter.numel() for parameter in sparse.parameters())
    with pytest.raises(ValueError, match="only a dense qwen3"):
        upcycle(sparse, 4, 2, "all", 0)

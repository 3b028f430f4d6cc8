"""Tiny bridges from a recipe's plain dict, and what a wrong dict says."""

import copy
import re

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import rlhf.bridge

torch.set_num_threads(1)

SPECIAL = ["<pad>", "<eos>", "<image>", "<img>", "</img>"]
VISION = {
    "type": "siglip",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
DENSE = {
    "type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
MOE = DENSE | {
    "type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}
SINGLE = {"type": "single", "size": 16}
GRID = {"type": "grid", "tile": 16, "max_tiles": 4}
SPEC = {
    "vision": VISION,
    "encoder": {"type": "tower", "layer": -1},
    "tiler": GRID,
    "connector": {"type": "mlp", "kind": "pixel_shuffle_mlp", "factor": 2},
    "packer": {"type": "segments", "wrap": ["<img>", "</img>"]},
    "decoder": DENSE,
}


def byte_tokenizer(marks=()):
    """One token a byte and the special ones: no training, no files."""
    special = [*SPECIAL, *(mark for mark in marks if mark not in SPECIAL)]
    vocabulary = {token: i for i, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=special[2:],
        padding_side="left",
    )


def tiny(seed=0, loud=True, marks=(), **slots):
    """(model, processor). `loud` scales the weights so that every part is heard in the logits."""
    model, processor = rlhf.bridge.build(copy.deepcopy(SPEC | slots), byte_tokenizer(marks), seed)
    if loud:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(3)
    return model.eval(), processor


def picture(seed, width=40, height=24):
    pixels = np.random.RandomState(seed).randint(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def changed(slot, **keys):
    return SPEC | {slot: SPEC[slot] | keys}


def test_the_seed_decides_the_weights_and_leaves_the_callers_random_state_alone():
    torch.manual_seed(7)
    state = torch.get_rng_state()
    one, again, other = (tiny(seed)[0].state_dict() for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["model.connector.2.weight"], other["model.connector.2.weight"])


def test_a_folder_without_all_weights_is_refused(tmp_path):
    """transformers would put anything in their place, and say so in a note."""
    model, processor = tiny()
    kept = {name: value for name, value in model.state_dict().items() if "connector" not in name}
    model.save_pretrained(tmp_path, state_dict=kept)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks \d+ weights of its model, model.connector"):
        rlhf.bridge.load(tmp_path)


def test_architecture_names_say_which_decoder_has_experts():
    for decoder, moe in ((DENSE, False), (MOE, True)):
        model, _ = tiny(decoder=decoder)
        assert model.config.architectures == [type(model).__name__]
        assert rlhf.bridge.ARCHITECTURES[type(model).__name__] is moe


def test_parameter_names_are_the_ones_recipes_write():
    names = {rlhf.bridge.short_name(name) for name, _ in tiny()[0].named_parameters()}
    assert {name.split(".")[0] for name in names} == {"vision", "connector", "language_model"}


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (SPEC | {"conector": {}}, "unknown bridge slot 'conector' (did you mean 'connector'?)"),
        (changed("vision", hiden_size=8), "unknown vision key 'hiden_size' (did you mean 'hidden_size'?)"),
        (changed("decoder", num_layers=8), "unknown decoder key 'num_layers'"),
        (changed("decoder", type="qwen4"), "unknown decoder type 'qwen4'"),
        (changed("vision", type="sigclip"), "unknown vision type 'sigclip' (did you mean 'siglip'?)"),
        (
            changed("tiler", type="gird"),
            "unknown tiler type 'gird' (did you mean 'grid'?); allowed: grid, native, single, slices",
        ),
        (changed("tiler", max_tile=3), "unknown tiler.grid key 'max_tile' (did you mean 'max_tiles'?)"),
        (changed("tiler", overview="end"), "unknown tiler.grid overview 'end'"),
        (SPEC | {"tiler": {"type": "grid", "tile": 16}}, "tiler.grid needs either 'max_tiles' or 'grids'"),
        (changed("connector", kind="mlp"), "unknown connector.mlp kind 'mlp'"),
        (changed("connector", factor=3), "does not divide by connector.mlp factor 3"),
        (changed("packer", wrap=["<img>", "</im>"]), "the tokenizer has no token '</im>'"),
        (changed("encoder", layer=2), "counts from the end"),
        (changed("tiler", tile=24), "position table is for (16, 16)"),
        ({k: v for k, v in SPEC.items() if k != "tiler"}, "a bridge needs a 'tiler' table"),
    ],
)
def test_a_wrong_recipe_names_the_key_and_what_is_allowed(spec, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        rlhf.bridge.build(spec, byte_tokenizer(), 0)


def test_reset_touches_the_named_parameters_only():
    model, _ = tiny()
    before = {name: value.clone() for name, value in model.named_parameters()}
    names = rlhf.bridge.reset(model, ["connector.*"], seed=5)
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert len(names) == 6
    assert all(name.startswith("model.connector.") for name in names)
    # The norm and the biases restart from the constants they still hold.
    assert moved == {"model.connector.2.weight", "model.connector.4.weight"}
    with pytest.raises(ValueError, match="no parameter matches 'conector"):
        rlhf.bridge.reset(model, ["conector.*"], seed=5)

"""Picture sizes -> layouts -> token ids, against slow oracles, and without torch."""

import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from rlhf.bridge.geometry import Geometry
from rlhf.bridge.layers.mlp import PixelShuffle
from rlhf.bridge.layout import Layout
from rlhf.bridge.raster import to_cells
from rlhf.bridge.tilers import TILERS
from rlhf.bridge.tilers.grid import closest_ratio
from tests.unit.test_bridge_build import GRID, SINGLE, picture, tiny

IMAGE, OPEN, CLOSE = 2, 3, 4


def geometry(tiler, wrap=None):
    return Geometry.of(
        tiler=tiler,
        encoder={"type": "tower"},
        connector={"type": "mlp", "kind": "pixel_shuffle_mlp"},
        packer={"type": "segments", "wrap": wrap},
        vision={"patch_size": 4, "image_size": 16},
        image_token_id=IMAGE,
    )


def sizes(count, seed=0):
    chance = random.Random(seed)
    return [(chance.randint(1, 900), chance.randint(1, 900)) for _ in range(count)]


def canvas_oracle(width, height, side, max_tiles):
    """`get_optimal_tiled_canvas` of InternVL as transformers ships it (torchvision-free copy of the rule), rewritten as
    the plainest search: all grids by area, then the tie rule one candidate at a time."""
    grids = sorted(
        {(c, r) for c in range(1, max_tiles + 1) for r in range(1, max_tiles + 1) if c * r <= max_tiles},
        key=lambda g: g[0] * g[1],
    )
    nearest = min(abs(width / height - c / r) for c, r in grids)
    ties = [g for g in grids if abs(width / height - g[0] / g[1]) == nearest]
    best = ties[0]
    for c, r in ties[1:]:
        if width * height > 0.5 * side * side * c * r:
            best = (c, r)
    return best[1], best[0]


@pytest.mark.parametrize("wrap", [None, (OPEN, CLOSE)])
@pytest.mark.parametrize(
    "tiler", [SINGLE, GRID, GRID | {"overview": "first"}, GRID | {"overview": "none", "max_tiles": 9}]
)
def test_placeholders_equal_features_for_500_sizes(tiler, wrap):
    contract = geometry(tiler, wrap)
    for width, height in sizes(500):
        layout = contract.layout(width, height)
        pattern = contract.pattern(layout)
        assert pattern.count(IMAGE) == contract.num_features(layout) == layout.num_tiles * 4
        assert len(pattern) == pattern.count(IMAGE) + (2 if wrap else 0)
        assert len(pattern) <= contract.most_tokens


@pytest.mark.parametrize("tiler", [SINGLE, SINGLE | {"fit": "pad"}, SINGLE | {"fit": "crop"}, GRID])
def test_pixels_follow_the_layout(tiler):
    contract = geometry(tiler)
    for width, height in sizes(20, seed=1):
        layout = contract.layout(width, height)
        pixels = to_cells(contract.tiler.apply(Image.new("RGB", (width, height), (255, 0, 0)), layout), (16, 16))
        assert pixels.shape == (layout.num_tiles, 3, 16, 16)
        assert pixels.min() >= 0
        assert pixels.max() <= 1


def test_grids_are_internvls():
    for max_tiles in (1, 4, 6, 12):
        for width, height in [*sizes(200, seed=2), (32, 32), (64, 64), (16, 16), (900, 1), (1, 900), (96, 64)]:
            assert closest_ratio(width, height, (16, 16), max_tiles) == canvas_oracle(width, height, 16, max_tiles)


def test_grid_tiles_are_the_cells_of_the_canvas_and_then_the_whole():
    tiler = TILERS.make(GRID)
    image = picture(0, width=32, height=32)
    layout = tiler.layout(*image.size)
    assert layout.grid == (2, 2)
    assert [tile.role for tile in layout.tiles] == ["local"] * 4 + ["global"]
    pixels = to_cells(tiler.apply(image, layout), (16, 16))
    whole = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255
    for i, (row, col) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        assert torch.equal(pixels[i], whole[:, 16 * row : 16 * row + 16, 16 * col : 16 * col + 16])
    first = TILERS.make(GRID | {"overview": "first"})
    assert torch.equal(to_cells(first.apply(image, first.layout(*image.size)), (16, 16))[0], pixels[-1])


def test_pixel_shuffle_against_a_loop():
    rows, cols, width, f = 4, 6, 3, 2
    features = torch.randn(2, rows * cols, width)
    expected = torch.empty(2, (rows // f) * (cols // f), f * f * width)
    for tile in range(2):
        for r in range(rows // f):
            for c in range(cols // f):
                block = [features[tile, (r * f + i) * cols + c * f + j] for i in range(f) for j in range(f)]
                expected[tile, r * (cols // f) + c] = torch.cat(block)
    assert torch.equal(PixelShuffle(f)(features, (rows, cols)), expected)
    plain_reshape = features.reshape(expected.shape)  # the control: folding without the shuffle is something else
    assert not torch.equal(plain_reshape, expected)


def test_expand_replaces_each_placeholder_by_its_own_pattern():
    contract = geometry(GRID, (OPEN, CLOSE))
    pictures = [(16, 16), (64, 16)]
    patterns = [contract.pattern(contract.layout(*size)) for size in pictures]
    assert [len(pattern) for pattern in patterns] == [1 * 4 + 2, 5 * 4 + 2]
    assert contract.expand([9, IMAGE, 8, IMAGE, 7], pictures) == [9, *patterns[0], 8, *patterns[1], 7]
    assert contract.expand([9, 8], []) == [9, 8]
    for ids, given in (([IMAGE], []), ([9], pictures[:1]), (patterns[1], pictures[1:])):
        with pytest.raises(ValueError, match="image placeholders"):
            contract.expand(ids, given)


def test_the_processor_says_the_same_as_the_arithmetic():
    _, processor = tiny()
    images = [picture(i, width, height) for i, (width, height) in enumerate(sizes(12, seed=3))]
    ids = processor.tokenizer("a" + "<image>b" * 12)["input_ids"]
    call = processor(text="a" + "<image>b" * 12, images=images, return_tensors="pt")
    assert call["input_ids"][0].tolist() == processor.expand(ids, [image.size for image in images])
    assert torch.equal(call["pixel_values"], processor.image_inputs(images)["pixel_values"])
    assert call["pixel_values"].shape[0] == sum(processor.layout(image.size).num_tiles for image in images)
    counts = processor._get_num_multimodal_tokens(image_sizes=[image.size[::-1] for image in images])
    assert counts["num_image_patches"] == [processor.layout(image.size).num_tiles for image in images]
    assert sum(counts["num_image_tokens"]) == call["input_ids"].shape[1] - 1 - 12
    with pytest.raises(ValueError, match="1 <image> in the text for 2 images"):
        processor(text="<image>", images=images[:2])


def test_video_says_that_it_is_not_there():
    with pytest.raises(ValueError, match="media kind 'video' is not implemented"):
        Layout((4, 4), (1, 1), (), kind="video")
    with pytest.raises(ValueError, match="media kind 'video' is not implemented"):
        tiny()[1].layout((4, 4), kind="video")


def test_the_arithmetic_needs_no_torch():
    code = (
        "import sys; from rlhf.bridge import Geometry; "
        "g = Geometry.of(tiler={'type': 'grid', 'tile': 16, 'max_tiles': 4}, encoder={'type': 'tower'}, "
        "connector={'type': 'mlp'}, packer={'type': 'segments'}, vision={'patch_size': 4, 'image_size': 16}, "
        "image_token_id=2); assert len(g.pattern(g.layout(64, 16))) == 80; "
        "assert not {'torch', 'transformers'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

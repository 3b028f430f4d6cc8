"""Tiny bridges with the components of published systems; what `rlhf.bridge.build` takes."""

from __future__ import annotations

from typing import Any

import torch

from rlhf.bridge.layers.gated_cross_attention import GatedLayer
from rlhf.bridge.layers.modality_adapter import Adapter
from rlhf.bridge.layers.windows import LowRank
from tests.unit.test_bridge_build import DENSE

CLIP: dict[str, Any] = {
    "type": "clip",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
SIGLIP = CLIP | {"type": "siglip"}
PENULTIMATE = {"type": "tower", "layer": -2}
ALL = PENULTIMATE | {"feature": "all"}
SINGLE = {"type": "single", "size": 16}
QFORMER = {"type": "qformer", "queries": 6, "layers": 3, "width": 24, "heads": 2, "intermediate": 40}
READER = {"type": "cross_attention", "queries": 9, "heads": 2}
GRIDS = [[2, 1], [1, 2], [2, 2], [3, 1], [1, 3]]

GATED = {key: value for key, value in DENSE.items() if key not in ("head_dim", "num_hidden_layers")} | {
    "type": "gated_cross_attention",
    "language_layers": 3,
    "language_head_dim": 16,
    "every": 2,
}

SYSTEMS: dict[str, dict[str, Any]] = {
    "llava": {"vision": CLIP, "encoder": PENULTIMATE, "tiler": SINGLE, "connector": {"type": "mlp", "kind": "linear"}},
    "llava15": {
        "vision": CLIP,
        "encoder": PENULTIMATE,
        "tiler": SINGLE | {"fit": "pad", "padding": [122, 116, 104]},
        "connector": {"type": "mlp", "kind": "mlp2x_gelu"},
    },
    "llava_next": {
        "vision": CLIP,
        "encoder": PENULTIMATE,
        "tiler": {
            "type": "grid",
            "tile": 16,
            "grids": GRIDS,
            "overview": "first",
            "fit": "pad",
            "fit_overview": "stretch",
            "padding": [0, 0, 0],
        },
        "connector": {"type": "mlp", "kind": "mlp2x_gelu"},
        "packer": {"type": "feature_map"},
    },
    "blip2": {"vision": CLIP, "encoder": ALL, "tiler": SINGLE, "connector": QFORMER},
    "internlm_xcomposer": {
        "vision": CLIP,
        "encoder": ALL,
        "tiler": SINGLE,
        "connector": QFORMER | {"queries": 12},
        "packer": {"type": "segments", "edges": "zeros"},
    },
    "qwen_vl": {
        "vision": SIGLIP,
        "tiler": SINGLE,
        "connector": READER,
        "packer": {"type": "segments", "wrap": ["<img>", "</img>"]},
    },
    "monkey": {
        "vision": SIGLIP,
        "encoder": {"type": "tower", "windows": 4, "attention_rank": 2, "mlp_rank": 3},
        "tiler": {"type": "grid", "tile": 16, "grids": [[2, 2]]},
        "connector": READER,
        "packer": {"type": "segments", "wrap": ["<img>", "</img>"]},
    },
    "llava_uhd": {
        "vision": CLIP,
        "encoder": PENULTIMATE | {"interpolate": True},
        "tiler": {"type": "slices", "tile": 16, "patch": 4},
        "connector": READER,
        "packer": {"type": "segments", "between": ",", "row_end": "\n"},
    },
    "otterhd": {
        "vision": {"type": "patches", "patch_size": 4},
        "encoder": {"type": "patches"},
        "tiler": {"type": "native", "cell": 4, "max_size": [24, 40]},
        "connector": {"type": "mlp", "kind": "linear"},
        "packer": {"type": "segments", "newline": "\n"},
    },
    "yi_vl": {
        "vision": CLIP,
        "encoder": PENULTIMATE,
        "tiler": SINGLE,
        "connector": {"type": "mlp", "kind": "mlp2x_gelu_norm"},
    },
    "sail_vl2": {
        "vision": CLIP | {"type": "aimv2"},
        "tiler": {"type": "grid", "tile": 16, "max_tiles": 4},
        "connector": {"type": "mlp", "kind": "pixel_shuffle_mlp"},
        "packer": {"type": "segments", "wrap": ["<img>", "</img>"]},
    },
    "sail_vl2_anyres": {
        "vision": SIGLIP,
        "encoder": {"type": "tower", "interpolate": True},
        "tiler": {"type": "native", "cell": 8, "max_size": 32, "fit": "stretch"},
        "connector": {"type": "mlp", "kind": "pixel_shuffle_mlp"},
        "packer": {"type": "segments", "wrap": ["<img>", "</img>"]},
    },
    "instructblip": {
        "vision": CLIP,
        "encoder": ALL,
        "tiler": SINGLE,
        "connector": QFORMER | {"text_length": 10},
    },
    "llama_vid": {
        "vision": CLIP,
        "encoder": PENULTIMATE,
        "tiler": SINGLE,
        "connector": QFORMER | {"type": "context_content", "text_length": 10, "content": 2},
    },
    "llama_vid_all": {
        "vision": CLIP,
        "encoder": PENULTIMATE,
        "tiler": SINGLE,
        "connector": QFORMER | {"type": "context_content", "text_length": 10},
    },
    "cogvlm": {
        "vision": CLIP,
        "encoder": PENULTIMATE,
        "tiler": SINGLE,
        "connector": {"type": "mlp", "kind": "glu", "hidden": 24},
        "packer": {"type": "segments", "edges": "learned", "positions": "shared"},
        "decoder": DENSE | {"type": "visual_expert"},
    },
    "flamingo": {
        "vision": CLIP,
        "encoder": PENULTIMATE,
        "tiler": SINGLE,
        "connector": {"type": "perceiver", "latents": 5, "depth": 2, "heads": 2, "head_dim": 8, "project": False},
        "packer": {"type": "segments", "positions": "none"},
        "decoder": GATED,
    },
    "lavin": {
        "vision": CLIP,
        "encoder": {"type": "tower", "every": 1, "feature": "cls", "adapter_rank": 4},
        "tiler": SINGLE,
        "connector": {"type": "mlp", "kind": "neck", "hidden": 8},
        "decoder": DENSE | {"type": "modality_adapter"},
    },
    "learned edges": {
        "vision": CLIP,
        "encoder": PENULTIMATE,
        "tiler": SINGLE,
        "connector": {"type": "mlp", "kind": "glu", "hidden": 24},
        "packer": {"type": "segments", "edges": "learned"},
    },
    "perceiver": {
        "vision": CLIP,
        "encoder": ALL,
        "tiler": SINGLE,
        "connector": {"type": "perceiver", "latents": 5, "depth": 2, "heads": 2, "head_dim": 8, "project": False},
    },
    "class tokens": {
        "vision": CLIP,
        "encoder": {"type": "tower", "layer": [-3, -2, -1], "feature": "cls"},
        "tiler": SINGLE,
        "connector": {"type": "mlp", "kind": "neck", "hidden": 8},
    },
}


SILENT = (".up", ".up_bias", "_gate", ".router")  # ends of the names of parameters that begin at nothing, or nearly so


def awake(model: torch.nn.Module) -> None:
    """Layers that start as if they were not there get something to say."""
    generator = torch.Generator().manual_seed(0)
    for part in model.modules():
        if isinstance(part, (LowRank, Adapter, GatedLayer)):
            for name, parameter in part.named_parameters():
                if f".{name}".endswith(SILENT):
                    torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    for name, parameter in model.named_parameters():
        if ".vision_" in name:  # an expert's, begun as copies of the text's
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def spec(name: str) -> dict[str, Any]:
    """All slots of a system's bridge."""
    return {"encoder": {"type": "tower"}, "packer": {"type": "segments"}, "decoder": DENSE, **SYSTEMS[name]}

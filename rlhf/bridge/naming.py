"""Names that other layers rely on: architectures for vLLM, parameter names for recipes. Needs no torch."""

from __future__ import annotations

MODEL_TYPE = "thinkfusion_bridge"
PATCHES = "thinkfusion_patches"  # the vision config without a vision transformer

SLOTS = ("vision", "encoder", "tiler", "connector", "packer", "decoder", "head")  # of a recipe's [model.bridge]

DENSE = "BridgeForConditionalGeneration"
MOE = "BridgeMoeForConditionalGeneration"

ARCHITECTURES: dict[str, bool] = {DENSE: False, MOE: True}
"""Architecture name -> whether its decoder is a mixture of experts. vLLM serves the two with different classes
(`TransformersMultiModalForCausalLM`, `TransformersMultiModalMoEForCausalLM`) and picks by this name."""


def short_name(name: str) -> str:
    """A parameter's name as recipes write it: `model.connector.0.weight` -> `connector.0.weight`."""
    return name.removeprefix("model.")

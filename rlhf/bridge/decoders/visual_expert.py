"""CogVLM (2311.03079, section 2.1): every layer has weights of its own for a picture's tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from rlhf.bridge.decoders import DECODERS, SameSizes


@DECODERS.register
@dataclass(frozen=True)
class VisualExpert(SameSizes):
    """Queries, keys, values, the attention's output and the feed-forward of a picture's tokens have weights of their
    own (`*.vision_*`), which begin as copies of the text's; norms and the attention itself are shared."""

    type: ClassVar[str] = "visual_expert"
    told: ClassVar[str] = "pictures"

    def parameters(self, table: Mapping[str, Any], inside: int) -> int:
        hidden, head = table["hidden_size"], table["head_dim"]
        queries, keys = table["num_attention_heads"] * head, table["num_key_value_heads"] * head
        attention = hidden * (2 * queries + 2 * keys)
        attention += (queries + 2 * keys + hidden) * bool(table.get("attention_bias"))
        return inside + int(table["num_hidden_layers"] * (attention + 3 * hidden * table["intermediate_size"]))

    def classes(self) -> tuple[Any, Any]:
        from rlhf.bridge.layers.visual_expert import VisualExpertConfig, VisualExpertModel

        return VisualExpertConfig, VisualExpertModel

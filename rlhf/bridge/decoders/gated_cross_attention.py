"""Flamingo (2204.14198, section 2.2): layers between those of a decoder in which text reads the latest picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from rlhf.bridge.decoders import DECODERS, Served
from rlhf.slots import at_least

# heads for which vLLM's attention has kernels
HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)


@DECODERS.register
@dataclass(frozen=True)
class GatedCrossAttention(Served):
    """A Qwen3 of `language_layers` layers with heads of `language_head_dim`, and a gated one before every `every`-th of
    them. The sizes an engine reserves follow: a KV cache for each gated layer too, and heads one dimension wider, in
    which attention is told what it may look at."""

    type: ClassVar[str] = "gated_cross_attention"
    told: ClassVar[str] = "pictures"
    language_layers: int = 32
    language_head_dim: int = 128
    every: int = 1

    def __post_init__(self) -> None:
        at_least("decoder.gated_cross_attention", self, 1, ("language_layers", "language_head_dim", "every"))
        if self.every > self.language_layers:
            raise ValueError(
                f"decoder.gated_cross_attention every = {self.every} leaves {self.language_layers} language_layers "
                "without a gated one: lower it"
            )
        if self.language_head_dim >= HEAD_DIMS[-1]:
            raise ValueError(
                f"decoder.gated_cross_attention language_head_dim = {self.language_head_dim}: no kernel takes heads of "
                f"more than {HEAD_DIMS[-1]} dimensions, of which one is the mask's"
            )

    @property
    def gated(self) -> int:
        """How many gated layers there are."""
        return self.language_layers // self.every

    @property
    def head_dim(self) -> int:
        """Of heads with room for what masks them."""
        return min(size for size in HEAD_DIMS if size > self.language_head_dim)

    @classmethod
    def of_plain(cls, table: Mapping[str, Any]) -> dict[str, Any]:
        return {"language_layers": table["num_hidden_layers"], "language_head_dim": table["head_dim"]}

    def derived(self, table: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        return {"num_hidden_layers": self.language_layers + self.gated, "head_dim": self.head_dim}

    def plain(self, table: Mapping[str, Any]) -> dict[str, Any]:
        return {**table, "num_hidden_layers": self.language_layers, "head_dim": self.language_head_dim}

    def parameters(self, table: Mapping[str, Any], inside: int) -> int:
        hidden = table["hidden_size"]
        queries = table["num_attention_heads"] * self.language_head_dim
        keys = table["num_key_value_heads"] * self.language_head_dim
        norms, gates = 4 * hidden, 2
        return inside + int(self.gated * (hidden * (2 * queries + 2 * keys) + 8 * hidden * hidden + norms + gates))

    def classes(self) -> tuple[Any, Any]:
        from rlhf.bridge.layers.gated_cross_attention import GatedConfig, GatedModel

        return GatedConfig, GatedModel

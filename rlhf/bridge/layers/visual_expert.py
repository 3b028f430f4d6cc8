"""CogVLM's decoder (2311.03079, section 2.1)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import Qwen3Config
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3MLP,
    Qwen3RMSNorm,
)

from rlhf.bridge.decoders import PREFIX
from rlhf.bridge.decoders.visual_expert import VisualExpert
from rlhf.bridge.layers.told import ToldAttention, ToldModel, feed_forward, is_sparse

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class VisualExpertConfig(Qwen3Config):
    """Qwen3's."""

    model_type = PREFIX + VisualExpert.type
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        **Qwen3Config.base_model_tp_plan,
        **{f"layers.*.self_attn.vision_{name}_proj": "colwise" for name in "qkv"},
        "layers.*.self_attn.vision_o_proj": "rowwise",
        "layers.*.vision_mlp.gate_proj": "colwise",
        "layers.*.vision_mlp.up_proj": "colwise",
        "layers.*.vision_mlp.down_proj": "rowwise",
    }


def by_kind(x: torch.Tensor, seen: torch.Tensor, text: nn.Module, vision: nn.Module, everywhere: bool) -> torch.Tensor:
    """x [rows, length, width] through `vision` where `seen` [rows, length], else through `text`; `everywhere`: all of
    it through both, for engines, whose graphs have no shapes that depend on values."""
    if everywhere:
        return torch.where(seen[..., None], vision(x), text(x))
    of_text, of_vision = text(x[~seen]), vision(x[seen])
    found = of_text.new_empty((*x.shape[:-1], of_text.shape[-1]))
    return found.masked_scatter(~seen[..., None], of_text).masked_scatter(seen[..., None], of_vision)


class VisualExpertAttention(ToldAttention):
    """Qwen3's, with projections of its own for a picture's tokens."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        for name in PROJECTIONS:
            text = getattr(self, name)
            self.add_module(f"vision_{name}", nn.Linear(text.in_features, text.out_features, text.bias is not None))

    def _by_kind(self, name: str, x: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        everywhere = self.config._attn_implementation == "vllm"
        return by_kind(x, told > 0, getattr(self, name), getattr(self, f"vision_{name}"), everywhere)

    def heads(self, hidden: torch.Tensor, told: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key, value = (self._by_kind(name, hidden, told) for name in PROJECTIONS[:3])
        return query, key, value

    def close(self, found: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        return self._by_kind("o_proj", found, told)


class VisualExpertLayer(GradientCheckpointingLayer):  # type: ignore[misc]
    """One layer of the decoder."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = VisualExpertAttention(config, layer_idx)
        self.mlp, self.vision_mlp = feed_forward(config, layer_idx), Qwen3MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden: torch.Tensor, told: torch.Tensor, **shared: Any) -> torch.Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), told, **shared)
        config = self.self_attn.config
        # a router is heard for every token of a row (`rlhf.routing`)
        everywhere = config._attn_implementation == "vllm" or is_sparse(config)
        fed = by_kind(self.post_attention_layernorm(hidden), told > 0, self.mlp, self.vision_mlp, everywhere)
        return hidden + fed


class VisualExpertModel(ToldModel):
    """The decoder."""

    config_class = VisualExpertConfig
    _no_split_modules: ClassVar[list[str]] = ["VisualExpertLayer"]

    def make_layers(self) -> list[nn.Module]:
        return [VisualExpertLayer(self.config, index) for index in range(self.config.num_hidden_layers)]

    @torch.no_grad()
    def begin(self, names: Collection[str]) -> None:
        """Vision weights become copies of the text's; a mixture of experts has none to copy."""
        here = dict(self.named_parameters())
        for name in names:
            if ".vision_" in name and (text := here.get(name.replace(".vision_", "."))) is not None:
                here[name].copy_(text)

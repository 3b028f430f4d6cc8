"""CogVLM's decoder (2311.03079, section 2.1)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import Qwen3Config
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3MLP,
    Qwen3RMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from rlhf.bridge.decoders import PREFIX
from rlhf.bridge.decoders.visual_expert import VisualExpert
from rlhf.bridge.layers.told import Rotary, ToldModel

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


class VisualExpertAttention(Qwen3Attention):  # type: ignore[misc]
    """Qwen3's, with projections of its own for a picture's tokens."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        for name in PROJECTIONS:
            text = getattr(self, name)
            self.add_module(f"vision_{name}", nn.Linear(text.in_features, text.out_features, text.bias is not None))

    def forward(
        self,
        hidden: torch.Tensor,
        rotary: Rotary,
        mask: torch.Tensor | None,
        seen: torch.Tensor,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """hidden and the result [rows, length, width]; seen [rows, length]"""
        everywhere = self.config._attn_implementation == "vllm"
        shape = (*hidden.shape[:-1], -1, self.head_dim)
        query = by_kind(hidden, seen, self.q_proj, self.vision_q_proj, everywhere).view(shape)
        key = by_kind(hidden, seen, self.k_proj, self.vision_k_proj, everywhere).view(shape)
        value = by_kind(hidden, seen, self.v_proj, self.vision_v_proj, everywhere).view(shape).transpose(1, 2)
        query, key = self.q_norm(query).transpose(1, 2), self.k_norm(key).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *rotary)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention_interface: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        found, _ = attention_interface(
            self,
            query,
            key,
            value,
            mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        found = found.reshape(*hidden.shape[:-1], -1).contiguous()
        return by_kind(found, seen, self.o_proj, self.vision_o_proj, everywhere)


class VisualExpertLayer(GradientCheckpointingLayer):  # type: ignore[misc]
    """One layer of the decoder."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = VisualExpertAttention(config, layer_idx)
        self.mlp, self.vision_mlp = Qwen3MLP(config), Qwen3MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, hidden: torch.Tensor, told: torch.Tensor, rotary: Rotary, mask: torch.Tensor | None, **kwargs: Any
    ) -> torch.Tensor:
        seen = told > 0
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotary, mask, seen, **kwargs)
        everywhere = self.self_attn.config._attn_implementation == "vllm"
        fed = by_kind(self.post_attention_layernorm(hidden), seen, self.mlp, self.vision_mlp, everywhere)
        return hidden + fed


class VisualExpertModel(ToldModel):
    """The decoder."""

    config_class = VisualExpertConfig
    _no_split_modules: ClassVar[list[str]] = ["VisualExpertLayer"]

    def make_layers(self) -> list[nn.Module]:
        return [VisualExpertLayer(self.config, index) for index in range(self.config.num_hidden_layers)]

    @torch.no_grad()
    def begin(self, names: Collection[str]) -> None:
        """Vision weights become copies of the text's."""
        for name in names:
            if ".vision_" in name:
                self.get_parameter(name).copy_(self.get_parameter(name.replace(".vision_", ".")))

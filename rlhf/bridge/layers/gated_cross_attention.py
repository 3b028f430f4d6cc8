"""Flamingo's decoder (2204.14198, section 2.2), in one sequence: a picture's latents stand among the text.

Flamingo's text reads the latents in layers of its own, by a mask. vLLM's attention takes no mask but the causal one, so
what may be looked at stands in the heads themselves, one dimension wider than they were:

self-attention   a latent's key has −1 there, a text's 0: no query gives latents any weight
cross-attention  a latent's key has the number of its picture, a text's 0. Of what the causal mask leaves, a query gives
                 weight to the highest number alone, which is that of the latest picture. Values of text are 0, so
                 before the first picture, and without one, the result is exactly 0

Queries have a power of two there, so that half precision holds every product exactly. Latents pass all layers as they
are.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.functional import gelu, pad
from transformers import Qwen3Config
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3RMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from rlhf.bridge.decoders import PREFIX
from rlhf.bridge.decoders.gated_cross_attention import GatedCrossAttention
from rlhf.bridge.layers.told import Rotary, ToldModel, feed_forward

APART = 32.0  # at least so far apart are the logits of what is read and what is not: e^-32 of its weight


class GatedConfig(Qwen3Config):
    """Qwen3's, with the sizes of `GatedCrossAttention`."""

    model_type = PREFIX + GatedCrossAttention.type
    language_layers: int = 32
    language_head_dim: int = 128
    every: int = 1
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        **Qwen3Config.base_model_tp_plan,
        **{f"layers.*.gated.attn.{name}_proj": "colwise" for name in "qkv"},
        "layers.*.gated.attn.o_proj": "rowwise",
        "layers.*.gated.up_proj": "colwise",
        "layers.*.gated.down_proj": "rowwise",
    }

    def __post_init__(self, **kwargs: Any) -> None:
        own = GatedCrossAttention(self.language_layers, self.language_head_dim, self.every)
        for name, value in own.derived({}).items():
            setattr(self, name, value)
        super().__post_init__(**kwargs)


class WideAttention(nn.Module):
    """What both kinds of attention share: heads one dimension wider, and zeros up to a size with a kernel."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.head_dim = config.language_head_dim
        self.scaling = self.head_dim**-0.5
        self.query_mark = 2.0 ** math.ceil(math.log2(APART / self.scaling))
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.attention_bias)

    def heads(
        self, hidden: torch.Tensor, told: torch.Tensor, rotary: Rotary
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values [rows, heads, length, head width], and the keys' marks [rows, length]."""
        raise NotImplementedError

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, length, heads x width] -> [rows, length, heads, width]"""
        return x.unflatten(-1, (-1, self.head_dim))

    def widen(self, x: torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
        """x [rows, heads, length, width] with marks [rows, length] after its last dimension, and zeros after those."""
        marked = torch.cat((x, marks.to(x)[:, None, :, None].expand(-1, x.shape[1], -1, -1)), dim=-1)
        return pad(marked, (0, self.config.head_dim - self.head_dim - 1))

    def forward(
        self,
        hidden: torch.Tensor,
        told: torch.Tensor,
        rotary: Rotary,
        mask: torch.Tensor | None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """hidden and the result [rows, length, width]; told [rows, length]"""
        query, key, value, marks = self.heads(hidden, told, rotary)
        query = self.widen(query, torch.full_like(marks, self.query_mark))
        key, value = self.widen(key, marks), self.widen(value, torch.zeros_like(marks))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention_interface: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        found, _ = attention_interface(self, query, key, value, mask, dropout=0.0, scaling=self.scaling, **kwargs)
        found = found.reshape(*hidden.shape[:-1], -1, self.config.head_dim)[..., : self.head_dim]
        return self.o_proj(found.flatten(-2))


class SelfAttention(WideAttention):
    """Qwen3's among the text."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.q_norm = Qwen3RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = Qwen3RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def heads(
        self, hidden: torch.Tensor, told: torch.Tensor, rotary: Rotary
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        query = self.q_norm(self.split(self.q_proj(hidden))).transpose(1, 2)
        key = self.k_norm(self.split(self.k_proj(hidden))).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *rotary)
        value = self.split(self.v_proj(hidden)).transpose(1, 2)
        return query, key, value, -(told > 0).to(hidden.dtype)


class CrossAttention(WideAttention):
    """Text reads the latents of the latest picture. They are not normed, as in Flamingo."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.norm = nn.LayerNorm(config.hidden_size)

    def heads(
        self,
        hidden: torch.Tensor,
        told: torch.Tensor,
        rotary: Rotary,  # noqa: ARG002
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        query = self.split(self.q_proj(self.norm(hidden))).transpose(1, 2)
        key = self.split(self.k_proj(hidden)).transpose(1, 2)
        value = self.split(self.v_proj(hidden) * (told > 0)[..., None]).transpose(1, 2)
        return query, key, value, told.to(hidden.dtype)


class GatedLayer(nn.Module):
    """y + tanh(a) XAttn(y), then y + tanh(b) FFW(y); a and b begin at 0, where the layer changes nothing."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.attn = CrossAttention(config, layer_idx)
        self.norm = nn.LayerNorm(width)
        self.up_proj, self.down_proj = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        self.attn_gate, self.ffw_gate = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, hidden: torch.Tensor, **shared: Any) -> torch.Tensor:
        hidden = hidden + self.attn_gate.tanh() * self.attn(hidden, **shared)
        return hidden + self.ffw_gate.tanh() * self.down_proj(gelu(self.up_proj(self.norm(hidden))))


class LanguageLayer(GradientCheckpointingLayer):  # type: ignore[misc]
    """A layer of Qwen3, and the gated one before it where there is one (`gated`)."""

    def __init__(self, config: Any, plain: Any, layer_idx: int, gated_idx: int | None) -> None:
        super().__init__()
        if gated_idx is not None:
            self.gated = GatedLayer(config, gated_idx)
        self.has_gated = gated_idx is not None
        self.self_attn = SelfAttention(config, layer_idx)
        self.mlp = feed_forward(plain, layer_idx)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden: torch.Tensor, told: torch.Tensor, **shared: Any) -> torch.Tensor:
        text = self.gated(hidden, told=told, **shared) if self.has_gated else hidden
        text = text + self.self_attn(self.input_layernorm(text), told, **shared)
        text = text + self.mlp(self.post_attention_layernorm(text))
        return torch.where((told > 0)[..., None], hidden, text)


class GatedModel(ToldModel):
    """The decoder."""

    config_class = GatedConfig
    _no_split_modules: ClassVar[list[str]] = ["LanguageLayer"]

    def plain_config(self) -> Any:
        plain = copy.deepcopy(self.config)
        plain.head_dim = self.config.language_head_dim
        return plain

    def make_layers(self) -> list[nn.Module]:
        # a gated layer keeps keys of its own: its number is one after those of the language's layers
        layers, every, plain = self.config.language_layers, self.config.every, self.plain_config()
        gated = {index: layers + count for count, index in enumerate(range(every - 1, layers, every))}
        return [LanguageLayer(self.config, plain, index, gated.get(index)) for index in range(layers)]

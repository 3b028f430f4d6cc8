"""LaVIN's decoder (2305.15023, section 3.2) and the adapters that its vision encoder has too."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import nn
from transformers import Qwen3Config
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from rlhf.bridge.decoders import PREFIX
from rlhf.bridge.decoders.modality_adapter import ModalityAdapter
from rlhf.bridge.layers.told import ToldAttention, ToldModel, feed_forward
from rlhf.bridge.positions import FAR


class Adapter(nn.Module):
    """x + s (w0 B + w1 D) A x, with w = softmax of a router over what it is shown. B and D have groups and begin at 0,
    so a fresh one changes nothing."""

    def __init__(self, width: int, rank: int, groups: int, scale: float, temperature: float) -> None:
        super().__init__()
        self.groups, self.scale, self.temperature = groups, scale, temperature
        # parameters, not linear layers: transformers would give those a random start
        self.down = nn.Parameter(nn.init.xavier_uniform_(torch.empty(rank, width)))
        self.down_bias = nn.Parameter(torch.zeros(rank))
        self.up = nn.Parameter(torch.zeros(2, groups, width // groups, rank // groups))  # of both updates
        self.up_bias = nn.Parameter(torch.zeros(2, width))
        self.router = nn.Parameter(nn.init.xavier_uniform_(torch.empty(2, width)))
        self.router_bias = nn.Parameter(torch.zeros(2))

    def weights(self, shown: torch.Tensor) -> torch.Tensor:
        """[..., 2] of what the router is shown [..., width]."""
        return ((shown @ self.router.T + self.router_bias) / self.temperature).softmax(-1)

    def forward(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x [..., width] and weights [..., 2] -> [..., width]"""
        low = (x @ self.down.T + self.down_bias).unflatten(-1, (self.groups, -1))
        updates = torch.einsum("...gr,ugwr->...ugw", low, self.up).flatten(-2) + self.up_bias
        return x + self.scale * (weights[..., None] * updates).sum(-2)


class ModalityAdapterConfig(Qwen3Config):
    """Qwen3's, with the fields of `ModalityAdapter`."""

    model_type = PREFIX + ModalityAdapter.type
    adapter_rank: int = 8
    adapter_groups: int = 2
    adapter_scale: float = 1.0
    router_temperature: float = 10.0


class AdaptedAttention(ToldAttention):
    """Qwen3's, its input adapted."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        shape = config.hidden_size, config.adapter_rank, config.adapter_groups
        self.adapter = Adapter(*shape, config.adapter_scale, config.router_temperature)

    def of_one(self, alone: torch.Tensor) -> torch.Tensor:
        """Of tokens that see themselves alone [tokens, width]: each gets its own value, in all heads that share it."""
        value = self.v_proj(alone).unflatten(-1, (-1, self.head_dim))
        return cast(torch.Tensor, self.o_proj(value.repeat_interleave(self.num_key_value_groups, dim=1).flatten(1)))


class AdaptedLayer(GradientCheckpointingLayer):  # type: ignore[misc]
    """One layer of the decoder."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = AdaptedAttention(config, layer_idx)
        self.mlp = feed_forward(config, layer_idx)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, hidden: torch.Tensor, alone: torch.Tensor, told: torch.Tensor, **shared: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden [rows, length, width] and the two modality tokens' alone [2, width] -> the same; told [rows, length]
        says which of the two a token belongs to."""
        attention, shown = self.self_attn, self.input_layernorm(alone)
        weights = attention.adapter.weights(shown)
        adapted = attention.adapter(self.input_layernorm(hidden), weights[told])
        hidden = hidden + attention(adapted, told, **shared)
        alone = alone + attention.of_one(attention.adapter(shown, weights))
        # the rows last: what a router said last is what is heard of it (`rlhf.routing`)
        alone = alone + self.mlp(self.post_attention_layernorm(alone)[None])[0]
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), alone


class ModalityAdapterModel(ToldModel):
    """The decoder. The published one sets a learned token before each row, which nothing may look at and which looks at
    nothing but itself: what routers see of it does not depend on the row. Here the two of them, of rows with a picture
    and of rows without, pass the layers beside the rows."""

    config_class = ModalityAdapterConfig
    _no_split_modules: ClassVar[list[str]] = ["AdaptedLayer"]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.modality_adapter = nn.Embedding(2, config.hidden_size)

    def make_layers(self) -> list[nn.Module]:
        return [AdaptedLayer(self.config, index) for index in range(self.config.num_hidden_layers)]

    def tell(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pictures = rows[0] < FAR
        return torch.where(pictures, rows[0], rows[0] - FAR), pictures.long()

    def run(self, hidden: torch.Tensor, told: torch.Tensor, **shared: Any) -> torch.Tensor:
        alone = self.modality_adapter(torch.arange(2, device=hidden.device))
        for layer in self.layers:
            hidden, alone = layer(hidden, alone, told=told, **shared)
        return hidden

"""A Qwen3 decoder whose layers are told something of each token beside its position (`rlhf.bridge.positions`)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, cast

import torch
from torch import nn
from transformers import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3MLP,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoePreTrainedModel, Qwen3MoeSparseMoeBlock
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

Rotary = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, [rows, length, head width]


def is_sparse(config: Any) -> bool:
    """Whether a decoder was upcycled: a dense one's config knows nothing of experts."""
    return bool(getattr(config, "num_experts", 0))


def feed_forward(config: Any, layer_idx: int) -> nn.Module:
    """A layer's, [rows, length, width] -> the same: Qwen3's, or Qwen3-MoE's where this layer is a mixture."""
    sparse = is_sparse(config) and layer_idx not in config.mlp_only_layers
    return Qwen3MoeSparseMoeBlock(config) if sparse else Qwen3MLP(config)


class ToldAttention(Qwen3Attention):  # type: ignore[misc]
    """Qwen3's, whose projections a subclass makes of what it is told. vLLM looks for the call of the attention
    interface in `forward`, and would join projections that stood there too."""

    def heads(
        self,
        hidden: torch.Tensor,
        told: torch.Tensor,  # noqa: ARG002
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values [rows, length, heads x head width], before their norms."""
        return self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)

    def close(self, found: torch.Tensor, told: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """The output of what the heads found [rows, length, heads x head width]."""
        return cast(torch.Tensor, self.o_proj(found))

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
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)) for part in self.heads(hidden, told))
        query, key = self.q_norm(query).transpose(1, 2), self.k_norm(key).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *rotary)
        value = value.transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention_interface: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        found, _ = attention_interface(self, query, key, value, mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.close(found.reshape(*hidden.shape[:-1], -1).contiguous(), told)


class ToldModel(Qwen3MoePreTrainedModel):  # type: ignore[misc]
    """Embeddings and a final norm as Qwen3 has them, around the layers of a subclass, whose feed-forwards may be
    mixtures."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(self.make_layers())
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(self.plain_config())
        self.gradient_checkpointing = False
        self.post_init()

    def make_layers(self) -> list[nn.Module]:
        """As many as the Qwen3 inside has."""
        raise NotImplementedError

    def plain_config(self) -> Any:
        """Of the Qwen3 inside."""
        return self.config

    def begin(self, names: Collection[str]) -> None:
        """Give those of its parameters that begin afresh their values where these depend on others."""

    def tell(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Position and what layers are told, each [rows, length], of position rows [3, rows, length]."""
        return rows[0], rows[1] - rows[0]

    def run(self, hidden: torch.Tensor, told: torch.Tensor, **shared: Any) -> torch.Tensor:
        """The hidden states [rows, length, width] after all layers."""
        for layer in self.layers:
            hidden = layer(hidden, told=told, **shared)
        return hidden

    @merge_with_config_defaults  # type: ignore[untyped-decorator]
    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """`position_ids` are position rows [3, rows, length], or [rows, length] where all is text."""
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(hidden.shape[1], device=hidden.device) + seen)[None]
        rows = position_ids if position_ids.ndim == 3 else position_ids.expand(3, -1, -1)
        positions, told = self.tell(rows)
        # without positions: transformers takes a step other than one for the beginning of another text
        mask = create_causal_mask(self.config, hidden, attention_mask, past_key_values, None)
        shared = {"mask": mask, "rotary": self.rotary_emb(hidden, positions), "past_key_values": past_key_values}
        hidden = self.run(hidden, told, **shared, **kwargs)
        return MoeModelOutputWithPast(
            last_hidden_state=cast(torch.Tensor, self.norm(hidden)),
            past_key_values=past_key_values if use_cache else None,
        )

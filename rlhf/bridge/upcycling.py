"""A dense decoder becomes a mixture of experts (2212.05055) that computes the same function."""

from __future__ import annotations

import torch
from transformers import Qwen3MoeConfig

from rlhf.bridge.builder import new
from rlhf.bridge.config import BridgeConfig, is_moe
from rlhf.bridge.decoders import own, type_of
from rlhf.bridge.model import BridgeForConditionalGeneration
from rlhf.bridge.sparsity import dense_layers


def upcycle(
    model: BridgeForConditionalGeneration, num_experts: int, top_k: int, layers: str, seed: int
) -> BridgeForConditionalGeneration:
    """A new bridge from one whose decoder is a dense Qwen3, mixtures in these `layers`: a Qwen3-MoE, or, of a decoder
    built on Qwen3 (`rlhf.bridge.decoders`), the same with Qwen3-MoE's feed-forwards for the text. Every expert is a
    copy of the dense feed-forward and the chosen experts' weights are normalised to sum to one, so the output is that
    of `model` whatever the (random) router says. Everything else is copied; `model` is left as it was."""
    dense = model.config.text_config
    told = own({**dense.to_dict(), "type": type_of(dense.model_type)})
    if is_moe(dense) or not (told.upcycles if told else dense.model_type == "qwen3"):
        raise ValueError(
            f"only a dense qwen3 decoder, or one built on it, can be upcycled; this one is {dense.model_type!r}"
        )
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must lie between 1 and num_experts {num_experts}, got {top_k}")
    if dense.use_sliding_window:
        raise ValueError("a decoder with sliding-window layers cannot be upcycled: qwen3_moe has no per-layer windows")
    depth = (told.plain(dense.to_dict()) if told else dense.to_dict())["num_hidden_layers"]
    fields = dense.to_dict()
    for key in ("model_type", "architectures", "transformers_version", "layer_types", "max_window_layers"):
        fields.pop(key, None)
    sparse = (type(dense) if told else Qwen3MoeConfig)(
        **fields,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=dense.intermediate_size,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=dense_layers(layers, depth),
        output_router_logits=False,
        router_aux_loss_coef=0.001,
    )
    settings = {**model.config.to_dict(), "text_config": sparse}
    for key in ("architectures", "model_type", "transformers_version"):
        settings.pop(key, None)
    upcycled = new(BridgeConfig(**settings), seed)
    upcycled.to(device=model.device, dtype=model.dtype)
    upcycled.load_state_dict(_sparse_weights(model, upcycled, num_experts))
    upcycled.generation_config = model.generation_config
    upcycled.train(model.training)
    return upcycled


def _sparse_weights(
    model: BridgeForConditionalGeneration, upcycled: BridgeForConditionalGeneration, num_experts: int
) -> dict[str, torch.Tensor]:
    """The dense weights under the sparse names; routers keep their fresh values."""
    dense = model.state_dict()
    weights = {}
    for name, fresh in upcycled.state_dict().items():
        mlp = name.partition(".experts.")[0]
        if name.endswith(".mlp.experts.gate_up_proj"):
            both = torch.cat([dense[f"{mlp}.gate_proj.weight"], dense[f"{mlp}.up_proj.weight"]])
            weights[name] = both.expand(num_experts, *both.shape)
        elif name.endswith(".mlp.experts.down_proj"):
            down = dense[f"{mlp}.down_proj.weight"]
            weights[name] = down.expand(num_experts, *down.shape)
        elif name.endswith(".mlp.gate.weight"):
            weights[name] = fresh
        else:
            weights[name] = dense[name]
    return weights

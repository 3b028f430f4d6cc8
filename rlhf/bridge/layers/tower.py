"""A transformers vision model that returns the features of some of its layers."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.nn.functional import layer_norm
from transformers import AutoModel, PretrainedConfig

from rlhf.bridge.layers.modality_adapter import Adapter
from rlhf.bridge.layers.windows import WindowedLayer

if TYPE_CHECKING:
    from rlhf.bridge.encoders.tower import TowerEncoder

FINAL_NORMS = ("post_layernorm", "rms_norm")  # CLIP's and SigLIP's, AIMv2's


class AdaptedNorm(nn.Module):
    """A layer's first norm, and what attention reads adapted (LaVIN): the router sees the class token. Not a LayerNorm,
    which vLLM would put its own in place of."""

    def __init__(self, norm: nn.LayerNorm, settings: TowerEncoder) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        shape = norm.normalized_shape[0], settings.adapter_rank, settings.adapter_groups
        self.adapter = Adapter(*shape, settings.adapter_scale, settings.router_temperature)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [tiles, tokens, width], the class token first"""
        x = layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        return cast(torch.Tensor, self.adapter(x, self.adapter.weights(x[:, :1])))


class Tower(nn.Module):
    """Normalised pixels [tiles, 3, height, width] -> features [tiles, features, width]. Layers above the highest that
    is read are left out, since they would be parameters without a gradient."""

    def __init__(self, config: PretrainedConfig, settings: TowerEncoder) -> None:
        super().__init__()
        read = settings.layers(config.to_dict())
        dropped = -1 - max(read)
        config = copy.deepcopy(config)
        config.num_hidden_layers -= dropped
        if min(read) + dropped < -1 - config.num_hidden_layers:
            raise ValueError(f"encoder.tower layer {min(read)}: the tower has {config.num_hidden_layers} layers only")
        self.tower = AutoModel.from_config(config)
        has_class = hasattr(self.tower.embeddings, "class_embedding")
        for asked, name in (
            (settings.feature != "patch", f"feature {settings.feature!r}"),
            (settings.adapter_rank, "adapter_rank"),
        ):
            if asked and not has_class:
                raise ValueError(f"encoder.tower {name}: a {config.model_type} has no class token")
        if dropped or has_class:  # CLIP's norm is for its pooled class token alone
            for name in FINAL_NORMS:
                if hasattr(self.tower, name):
                    setattr(self.tower, name, nn.Identity())
        stack = self.tower.encoder.layers
        if settings.windows and not hasattr(stack[0], "layer_norm1"):
            raise ValueError(f"encoder.tower windows: a {config.model_type} has no layers like CLIP's")
        for place, layer in enumerate(stack):
            if settings.adapter_rank:
                layer.layer_norm1 = AdaptedNorm(layer.layer_norm1, settings)
            if settings.windows:
                stack[place] = WindowedLayer(layer, settings.windows, settings.attention_rank, settings.mlp_rank)
        self.windows = settings.windows
        self.layers = [layer + dropped for layer in read]
        self.chosen = {"patch": slice(int(has_class), None), "cls": slice(0, 1), "all": slice(None)}[settings.feature]
        # Passed only when asked for: AIMv2 has no such argument.
        self.options: dict[str, Any] = {"interpolate_pos_encoding": True} if settings.interpolate else {}

    def forward(self, pixel_values: torch.Tensor, windows: torch.Tensor | None = None) -> torch.Tensor:
        options = self.options
        if self.windows:
            if windows is None or int(windows.max()) >= self.windows:
                raise ValueError(f"this tower has {self.windows} windows; the tiles are of windows {windows}")
            options = {**options, "windows": windows}
        if self.layers == [-1]:
            return cast(torch.Tensor, self.tower(pixel_values, **options).last_hidden_state)[:, self.chosen]
        out = self.tower(pixel_values, output_hidden_states=True, **options)
        states = [out.last_hidden_state if layer == -1 else out.hidden_states[layer] for layer in self.layers]
        return torch.cat([state[:, self.chosen] for state in states], dim=1)

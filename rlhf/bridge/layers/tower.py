"""A transformers vision model that returns the features of some of its layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig

from rlhf.bridge.layers.windows import WindowedLayer

FINAL_NORMS = ("post_layernorm", "rms_norm")  # CLIP's and SigLIP's, AIMv2's


class Tower(nn.Module):
    """Normalised pixels [tiles, 3, height, width] -> features [tiles, features, width].

    layers   counted from the end, -1 after the final norm; those above the highest are left out, since they would be
             parameters without a gradient
    feature  "patch", "cls" or "all"; the class token comes first
    windows  so many windows have low-rank updates of these `ranks`, of the attention and beside the feed-forward
    """

    def __init__(
        self,
        config: PretrainedConfig,
        layers: Sequence[int],
        feature: str,
        interpolate: bool,
        windows: int = 0,
        ranks: tuple[int, int] = (16, 32),
    ) -> None:
        super().__init__()
        dropped = -1 - max(layers)
        config = copy.deepcopy(config)
        config.num_hidden_layers -= dropped
        if min(layers) + dropped < -1 - config.num_hidden_layers:
            raise ValueError(f"encoder.tower layer {min(layers)}: the tower has {config.num_hidden_layers} layers only")
        self.tower = AutoModel.from_config(config)
        has_class = hasattr(self.tower.embeddings, "class_embedding")
        if feature != "patch" and not has_class:
            raise ValueError(f"encoder.tower feature {feature!r}: a {config.model_type} has no class token")
        if dropped or has_class:  # CLIP's norm is for its pooled class token alone
            for name in FINAL_NORMS:
                if hasattr(self.tower, name):
                    setattr(self.tower, name, nn.Identity())
        if windows:
            stack = self.tower.encoder.layers
            if not hasattr(stack[0], "layer_norm1"):
                raise ValueError(f"encoder.tower windows: a {config.model_type} has no layers like CLIP's")
            for place, layer in enumerate(stack):
                stack[place] = WindowedLayer(layer, windows, *ranks)
        self.windows = windows
        self.layers = [layer + dropped for layer in layers]
        self.chosen = {"patch": slice(int(has_class), None), "cls": slice(0, 1), "all": slice(None)}[feature]
        # Passed only when asked for: AIMv2 has no such argument.
        self.options: dict[str, Any] = {"interpolate_pos_encoding": True} if interpolate else {}

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

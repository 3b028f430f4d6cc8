"""A transformers vision model that returns the patch features of one of its layers."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig


class Tower(nn.Module):
    """Normalised pixels [tiles, 3, height, width] -> features [tiles, patches, width]."""

    def __init__(self, config: PretrainedConfig, layer: int, interpolate: bool) -> None:
        super().__init__()
        self.tower = AutoModel.from_config(config)
        self.layer = layer
        # Passed only when asked for: AIMv2 has no such argument.
        self.options: dict[str, Any] = {"interpolate_pos_encoding": True} if interpolate else {}

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if self.layer == -1:
            return cast(torch.Tensor, self.tower(pixel_values, **self.options).last_hidden_state)
        states = self.tower(pixel_values, output_hidden_states=True, **self.options).hidden_states
        return cast(torch.Tensor, states[self.layer])

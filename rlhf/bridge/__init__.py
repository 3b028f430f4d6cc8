"""The vision-language bridge: tiler -> vision encoder -> connector -> packer -> decoder, as a Hugging Face config,
model and processor. One definition for the trainer and for vLLM's Transformers backend.

The arithmetic (`Geometry`, tilers, layouts) imports without torch, for `rlhf plan`. Touching any other name imports
the model and registers it with transformers' Auto classes; before using those alone, call `register()`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from rlhf.bridge.geometry import Geometry
from rlhf.bridge.layout import Layout, Tile
from rlhf.bridge.naming import ARCHITECTURES, MODEL_TYPE, short_name

if TYPE_CHECKING:
    from rlhf.bridge.builder import build, load
    from rlhf.bridge.config import BridgeConfig
    from rlhf.bridge.initialisation import reset
    from rlhf.bridge.model import BridgeForConditionalGeneration, BridgeModel, BridgeMoeForConditionalGeneration
    from rlhf.bridge.processor import BridgeImageProcessor, BridgeProcessor
    from rlhf.bridge.rebuilding import rebuild
    from rlhf.bridge.registration import register
    from rlhf.bridge.upcycling import upcycle

_HOMES = {
    "BridgeConfig": "config",
    "BridgeModel": "model",
    "BridgeForConditionalGeneration": "model",
    "BridgeMoeForConditionalGeneration": "model",
    "BridgeImageProcessor": "processor",
    "BridgeProcessor": "processor",
    "build": "builder",
    "load": "builder",
    "register": "registration",
    "rebuild": "rebuilding",
    "reset": "initialisation",
    "upcycle": "upcycling",
}

__all__ = [
    "ARCHITECTURES",
    "MODEL_TYPE",
    "BridgeConfig",
    "BridgeForConditionalGeneration",
    "BridgeImageProcessor",
    "BridgeModel",
    "BridgeMoeForConditionalGeneration",
    "BridgeProcessor",
    "Geometry",
    "Layout",
    "Tile",
    "build",
    "load",
    "rebuild",
    "register",
    "reset",
    "short_name",
    "upcycle",
]


def _publish() -> None:
    """Import the torch side, which registers it, and bind its names here."""
    importlib.import_module("rlhf.bridge.registration")
    for name, home in _HOMES.items():
        globals()[name] = getattr(importlib.import_module(f"rlhf.bridge.{home}"), name)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _publish()
    return globals()[name]

"""Make the bridge known to transformers' Auto classes."""

from __future__ import annotations

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor

from rlhf.bridge.config import BridgeConfig
from rlhf.bridge.model import BridgeForConditionalGeneration, BridgeModel, BridgeMoeForConditionalGeneration
from rlhf.bridge.naming import MODEL_TYPE
from rlhf.bridge.processor import BridgeImageProcessor, BridgeProcessor


def register() -> None:
    """Enter config, models, image processor and processor. Calling it again changes nothing."""
    AutoConfig.register(MODEL_TYPE, BridgeConfig, exist_ok=True)
    AutoModel.register(BridgeConfig, BridgeModel, exist_ok=True)
    # Of a pair, the Auto class takes the one that the config's `architectures` names.
    heads = (BridgeForConditionalGeneration, BridgeMoeForConditionalGeneration)
    AutoModelForImageTextToText.register(BridgeConfig, heads, exist_ok=True)
    AutoImageProcessor.register(BridgeConfig, image_processor_classes={"pil": BridgeImageProcessor}, exist_ok=True)
    AutoProcessor.register(BridgeConfig, BridgeProcessor, exist_ok=True)


register()

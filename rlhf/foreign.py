"""Open any vision-language model for training: a think-fusion bridge, or an ordinary Hugging Face one."""

from __future__ import annotations

import inspect
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from rlhf import bridge
from rlhf.architecture import chain_of
from rlhf.batching import BridgeVisual, Visual, concatenate, pad_of
from rlhf.types import Media, Sample


def open_model(path: str) -> tuple[PreTrainedModel, Any, Visual]:
    """(model, processor, visual) of a model folder or hub name. A folder in peft's format opens as its base model
    with the adapter merged in. Raises ValueError if the folder holds no vision-language model."""
    *adapters, base = chain_of(Path(path))
    model, processor, visual = _open_base(str(base))
    for adapter in reversed(adapters):
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return model, processor, visual


def _open_base(path: str) -> tuple[PreTrainedModel, Any, Visual]:
    bridge.register()
    if AutoConfig.from_pretrained(path).model_type == bridge.MODEL_TYPE:
        own, own_processor = bridge.load(path)
        return own, own_processor, BridgeVisual(own_processor)
    try:
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    except ValueError as error:
        raise ValueError(f"{path} holds no vision-language model that transformers can load: {error}") from error
    processor = ForeignProcessor(AutoProcessor.from_pretrained(path))
    return model, processor, ForeignVisual(model, processor)


def loop_over_experts(model: PreTrainedModel) -> None:
    """On CPU a loop over experts is the fastest of transformers' implementations ("batched_mm": 55 times slower).
    Written to the configs that the experts read: `set_experts_implementation` refuses a wrapper without experts."""
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._experts_implementation = "eager"


def mixes_experts(model: PreTrainedModel) -> bool:
    """Whether the decoder is a mixture of experts."""
    text = model.config.get_text_config().to_dict()
    return any(text.get(name) for name in ("num_experts", "num_local_experts", "n_routed_experts"))


class ForeignProcessor:
    """An ordinary processor under the names a bridge's has: one placeholder for each image in un-expanded ids, and
    `expand` for as many as the model takes."""

    reads = False

    def __init__(self, processor: Any) -> None:
        self._inner = processor
        self.tokenizer = processor.tokenizer
        self.image_processor = processor.image_processor
        self.image_token_id = int(processor.image_token_id)
        self.media_token_ids = tuple(
            int(value)
            for name in ("image", "video", "audio")
            if (value := getattr(processor, f"{name}_token_id", None))
        )

    def expand(self, token_ids: Sequence[int], sizes: Sequence[tuple[int, int]]) -> list[int]:
        """token_ids with the placeholder of every image (width, height) repeated as often as it has features. Raises
        ValueError when placeholders and images differ in number."""
        if list(token_ids).count(self.image_token_id) != len(sizes):
            raise ValueError(f"{list(token_ids).count(self.image_token_id)} image placeholders for {len(sizes)} images")
        if not sizes:
            return list(token_ids)
        # transformers' own count, which vLLM's Transformers backend relies on too
        found = self._inner._get_num_multimodal_tokens(image_sizes=[(height, width) for width, height in sizes])
        counts = iter(found["num_image_tokens"])
        return [token for one in token_ids for token in ([one] * next(counts) if one == self.image_token_id else [one])]

    def salt(self, token_ids: Sequence[int]) -> str | None:  # noqa: ARG002
        """None: what stands before a token is all that its keys depend on."""
        return None

    def save_pretrained(self, folder: str | Path) -> None:
        self._inner.save_pretrained(folder)


class ForeignVisual:
    """Media of an ordinary Hugging Face model, through its own image processor. The model computes its own positions
    (M-RoPE) and runs its vision tower only when there is a picture, so text-only micro-batches get a blank one."""

    packs = False
    reads = False

    def __init__(self, model: PreTrainedModel, processor: ForeignProcessor) -> None:
        self._processor = processor
        self._image_token_id = processor.image_token_id
        self._token_types = "mm_token_type_ids" in inspect.signature(model.forward).parameters
        self.pad_id = pad_of(processor.tokenizer)

    def read(self, media: Media) -> Mapping[str, Tensor]:
        found = self._processor.image_processor(images=[media.open()], return_tensors="pt")
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def join(self, items: Sequence[Mapping[str, Tensor]], input_ids: Tensor) -> dict[str, Tensor]:
        if not self._token_types:
            return concatenate(items)
        # a model with M-RoPE places its pictures by this: 1 at image placeholders, 0 elsewhere
        return {**concatenate(items), "mm_token_type_ids": (input_ids == self._image_token_id).long()}

    def positions(self, input_ids: Tensor) -> Tensor | None:  # noqa: ARG002
        return None

    def blank(self) -> Sample | None:
        picture = Image.new("RGB", (64, 64))
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        ids = (*self._processor.expand([self._image_token_id], [picture.size]), self.pad_id)
        return Sample("blank", ids, len(ids) - 1, (Media(buffer.getvalue(), picture.size),), weight=0.0)

"""Pictures and text -> model inputs, with PIL and torch only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, cast

import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.processing_utils import MultiModalData, ProcessingKwargs

from rlhf.bridge.geometry import Geometry
from rlhf.bridge.layout import Layout, require_kind


def flatten(images: Any) -> Iterator[Image.Image]:
    """Pictures out of any nesting of lists (TRL hands over one list a row, some of them empty). Arrays are
    [height, width, 3] uint8; anything else raises `TypeError`."""
    if images is None:
        return
    if isinstance(images, (list, tuple)):
        for image in images:
            yield from flatten(image)
    elif isinstance(images, Image.Image):
        yield images
    elif isinstance(images, (np.ndarray, torch.Tensor)):
        pixels = np.asarray(images)
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
            raise TypeError(f"an image array must be [height, width, 3] uint8, got {pixels.shape} {pixels.dtype}")
        yield Image.fromarray(pixels)
    else:
        raise TypeError(f"an image must be a PIL image or an array, got {type(images).__name__}")


class BridgeImageProcessor(BaseImageProcessor):
    """Cuts and normalises pictures. `geometry` is `Geometry.to_dict()`, so a saved folder carries the contract."""

    model_input_names: ClassVar[list[str]] = ["pixel_values"]

    def __init__(self, geometry: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.geometry = dict(geometry)

    @property
    def contract(self) -> Geometry:
        """The media contract of this bridge."""
        return Geometry.from_dict(self.geometry)

    def pixels(self, images: Sequence[Image.Image], layouts: Sequence[Layout]) -> torch.Tensor:
        """Normalised pixels [sum of tiles, 3, height, width], pictures in order."""
        contract = self.contract
        raw = torch.cat([contract.tiler.apply(image, layout) for image, layout in zip(images, layouts, strict=True)])
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (contract.encoder.mean, contract.encoder.std))
        return (raw - mean) / std

    def preprocess(self, images: Any, return_tensors: Any = None, **kwargs: Any) -> BatchFeature:  # noqa: ARG002
        """`pixel_values`, and `num_patches`: tiles of each picture, under the name TRL's GRPO trainer asks for."""
        pictures = list(flatten(images))
        contract = self.contract
        layouts = [contract.layout(*image.size) for image in pictures]
        data: dict[str, Any] = {}
        if pictures:
            data["pixel_values"] = self.pixels(pictures, layouts)
            data["num_patches"] = torch.tensor([layout.num_tiles for layout in layouts])
        return BatchFeature(data, tensor_type=return_tensors)

    __call__ = preprocess


class BridgeProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """Defaults of `BridgeProcessor.__call__`."""

    _defaults = {"text_kwargs": {"padding": False, "return_mm_token_type_ids": False}}  # noqa: RUF012 - an annotation would make it a key


class BridgeProcessor(ProcessorMixin):
    """Image processor and tokenizer in one. The tokenizer must know the special token `<image>`."""

    valid_processor_kwargs = BridgeProcessorKwargs

    def __init__(
        self,
        image_processor: BridgeImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.image_token_id = image_processor.contract.image_token_id
        self.image_token = str(tokenizer.convert_ids_to_tokens(self.image_token_id))
        template = tokenizer.chat_template if chat_template is None else chat_template
        super().__init__(image_processor, tokenizer, chat_template=template, **kwargs)

    @property
    def geometry(self) -> Geometry:
        """The media contract of this bridge."""
        return cast(Geometry, self.image_processor.contract)

    def layout(self, size: tuple[int, int], kind: str = "image") -> Layout:
        """How a picture of `size` = (width, height) is cut. Raises `ValueError` for a kind other than image."""
        require_kind(kind)
        return self.geometry.layout(*size)

    def expand(self, token_ids: Sequence[int], sizes: Sequence[tuple[int, int]]) -> list[int]:
        """Un-expanded ids, one placeholder a picture -> the ids the model and vLLM see. See `Geometry.expand`."""
        return self.geometry.expand(token_ids, sizes)

    def pixel_values(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Normalised pixels [sum of tiles, 3, height, width], pictures in order; [0, 3, height, width] for none."""
        if not images:
            return torch.empty(0, 3, *self.geometry.tiler.box)
        return cast(torch.Tensor, self.image_processor.pixels(images, [self.layout(image.size) for image in images]))

    def num_tiles(self, images: Sequence[Image.Image]) -> list[int]:
        """Tiles of each picture."""
        return [self.layout(image.size).num_tiles for image in images]

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """The usual Hugging Face call: `input_ids`, `attention_mask` and, with pictures, `pixel_values`. Raises
        `ValueError` unless the text holds exactly one `<image>` for each picture."""
        pictures = list(flatten(images))
        texts = [text] if isinstance(text, str) else list(text) if text is not None else []
        if pictures and all(isinstance(row, str) for row in texts) and texts:
            found = sum(row.count(self.image_token) for row in texts)
            if found != len(pictures):
                raise ValueError(f"{found} {self.image_token} in the text for {len(pictures)} images")
        return super().__call__(images=pictures or None, text=text, **kwargs)

    @property
    def unused_input_names(self) -> list[str]:
        """Dropped from the call's output: the model needs no tile counts."""
        return ["num_patches"]

    # The methods below are what transformers' base class and vLLM's Transformers backend ask a processor.

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[BatchFeature, list[str]]:
        """Pixels, and the text each picture's placeholder becomes."""
        pictures = list(flatten(images))
        return self.image_processor(pictures, **kwargs), [self.pattern_text(image.size) for image in pictures]

    def pattern_text(self, size: tuple[int, int]) -> str:
        """The pattern of a picture of `size` = (width, height), as text."""
        pattern = self.geometry.pattern(self.layout(size))
        return "".join(self.tokenizer.convert_ids_to_tokens(pattern))

    def _get_num_multimodal_tokens(
        self,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        **kwargs: Any,  # noqa: ARG002 - vLLM passes its own
    ) -> MultiModalData:
        """Tokens and rows of `pixel_values` of pictures of `image_sizes` = (height, width)."""
        if image_sizes is None:
            return MultiModalData()
        layouts = [self.layout((width, height)) for height, width in image_sizes]
        return MultiModalData(
            num_image_tokens=[len(self.geometry.pattern(layout)) for layout in layouts],
            num_image_patches=[layout.num_tiles for layout in layouts],
        )

"""Pictures and text -> model inputs, with PIL and torch only."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar, cast

import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.processing_utils import MultiModalData, ProcessingKwargs

from rlhf.bridge.geometry import Geometry
from rlhf.bridge.layout import Layout, require_kind
from rlhf.bridge.positions import position_rows, salt
from rlhf.bridge.raster import to_cells


@lru_cache
def _contract(fields: str) -> Geometry:
    return Geometry.from_dict(json.loads(fields))


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

    model_input_names: ClassVar[list[str]] = ["pixel_values", "picture_sizes", "questions"]

    def __init__(self, geometry: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.geometry = dict(geometry)

    @property
    def contract(self) -> Geometry:
        """The media contract of this bridge."""
        return _contract(json.dumps(self.geometry))

    def inputs(self, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        """What `BridgeModel.get_image_features` takes of pictures, in order. What is asked beside a picture is in its
        `info["question"]`, token ids."""
        contract = self.contract
        layouts = [contract.layout(*image.size) for image in images]
        counts = torch.tensor([contract.cells(layout) for layout in layouts], dtype=torch.long)
        pictures = zip(images, layouts, strict=True)
        tiles = [tile for image, layout in pictures for tile in contract.tiler.apply(image, layout)]
        cells = to_cells(tiles, contract.tiler.cell) if tiles else torch.empty(0, 3, *contract.tiler.cell)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (contract.encoder.mean, contract.encoder.std))
        found = {"pixel_values": (cells - mean) / std}
        if contract.sized:
            sizes = torch.tensor([layout.size for layout in layouts], dtype=torch.long).reshape(-1, 2)
            found["picture_sizes"] = sizes.repeat_interleave(counts, dim=0)
        if length := contract.connector.text_length:
            asked = torch.full((len(images), length), -1, dtype=torch.long)
            for row, image in zip(asked, images, strict=True):
                ids = image.info.get("question", ())[:length]
                row[: len(ids)] = torch.tensor(ids, dtype=torch.long)
            found["questions"] = asked.repeat_interleave(counts, dim=0)
        return found

    def preprocess(self, images: Any, return_tensors: Any = None, **kwargs: Any) -> BatchFeature:  # noqa: ARG002
        """`inputs`, and `num_patches`: cells of each picture, under the name TRL's GRPO trainer asks for."""
        pictures = list(flatten(images))
        data: dict[str, Any] = {}
        if pictures:
            data = {**self.inputs(pictures)}
            counts = [self.contract.cells(self.contract.layout(*image.size)) for image in pictures]
            data["num_patches"] = torch.tensor(counts)
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

    @property
    def reads(self) -> bool:
        """Whether what becomes of a picture depends on what is asked beside it."""
        return self.geometry.connector.text_length > 0

    def layout(self, size: tuple[int, int], kind: str = "image") -> Layout:
        """How a picture of `size` = (width, height) is cut. Raises `ValueError` for a kind other than image."""
        require_kind(kind)
        return self.geometry.layout(*size)

    def expand(self, token_ids: Sequence[int], sizes: Sequence[tuple[int, int]]) -> list[int]:
        """Un-expanded ids, one placeholder a picture -> the ids the model and vLLM see. See `Geometry.expand`."""
        return self.geometry.expand(token_ids, sizes)

    def positions(self, input_ids: torch.Tensor) -> torch.Tensor:
        """What the model takes for positions of rows of expanded ids [rows, length], padded on the right."""
        if self.geometry.told == "nothing":
            return torch.arange(input_ids.shape[1]).expand(input_ids.shape).contiguous()
        return position_rows(input_ids, self.geometry)

    def salt(self, token_ids: Sequence[int]) -> str | None:
        """See `rlhf.bridge.positions.salt`."""
        return salt(token_ids, self.geometry)

    def image_inputs(self, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        """What the model takes of pictures, in order; see `BridgeImageProcessor.inputs`."""
        return cast(dict[str, torch.Tensor], self.image_processor.inputs(images))

    def __call__(
        self, images: Any = None, text: Any = None, question: str | Sequence[str] | None = None, **kwargs: Any
    ) -> BatchFeature:
        """The usual Hugging Face call: `input_ids`, `attention_mask` and, with pictures, `pixel_values`. Raises
        `ValueError` unless the text holds exactly one `<image>` for each picture. `question`, one for all pictures or
        one for each, is what a connector that reads gets beside a picture that does not bring its own."""
        pictures = list(flatten(images))
        if question is not None:
            pictures = self._asking(pictures, question)
        texts = [text] if isinstance(text, str) else list(text) if text is not None else []
        if pictures and all(isinstance(row, str) for row in texts) and texts:
            found = sum(row.count(self.image_token) for row in texts)
            if found != len(pictures):
                raise ValueError(f"{found} {self.image_token} in the text for {len(pictures)} images")
        return super().__call__(images=pictures or None, text=text, **kwargs)

    def _asking(self, pictures: Sequence[Image.Image], question: str | Sequence[str]) -> list[Image.Image]:
        """The pictures, each with its question."""
        questions = [question] * len(pictures) if isinstance(question, str) else list(question)
        if len(questions) != len(pictures):
            raise ValueError(f"{len(questions)} questions for {len(pictures)} images; give one, or one for each")
        found = []
        for picture, asked in zip(pictures, questions, strict=True):
            copy = picture.copy()
            copy.info.setdefault("question", tuple(self.tokenizer.encode(asked, add_special_tokens=False)))
            found.append(copy)
        return found

    @property
    def unused_input_names(self) -> list[str]:
        """Dropped from the call's output: the model needs no counts."""
        return ["num_patches"]

    # The methods below are what transformers' base class and vLLM's Transformers backend ask a processor.

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[BatchFeature, list[str]]:
        """Pixels, and the text each picture's placeholder becomes."""
        pictures = list(flatten(images))
        return self.image_processor(pictures, **kwargs), [self.pattern_text(image.size) for image in pictures]

    def pattern_text(self, size: tuple[int, int]) -> str:
        """The pattern of a picture of `size` = (width, height), as text."""
        pattern = self.geometry.pattern(self.layout(size))
        texts = {token: self.tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in set(pattern)}
        return "".join(texts[token] for token in pattern)

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
            num_image_patches=[self.geometry.cells(layout) for layout in layouts],
        )

"""Ordinary Hugging Face models: their placeholders, and torchvision's operators."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf.foreign import ForeignProcessor
from rlhf.models import masked_ids
from tests.unit.test_bridge_build import tiny

IMAGE, VIDEO, PAD = 7, 8, 0


class Qwenlike:
    """A processor that takes one token for every 16 × 16 pixels of an image (height, width)."""

    tokenizer = SimpleNamespace(pad_token_id=PAD, eos_token_id=1)
    image_processor = None
    image_token_id = IMAGE
    video_token_id = VIDEO

    def _get_num_multimodal_tokens(self, image_sizes: list[tuple[int, int]]) -> Any:
        return {"num_image_tokens": [(height // 16) * (width // 16) for height, width in image_sizes]}


def test_placeholders_grow_to_each_image_in_order() -> None:
    processor = ForeignProcessor(Qwenlike())
    assert processor.expand([3, IMAGE, 4, IMAGE, 5], [(32, 16), (48, 32)]) == [3, *[IMAGE] * 2, 4, *[IMAGE] * 6, 5]
    assert processor.expand([3, 4], []) == [3, 4]
    with pytest.raises(ValueError, match="1 image placeholders for 2 images"):
        processor.expand([IMAGE], [(16, 16), (16, 16)])


def test_no_placeholder_of_any_kind_is_sampled() -> None:
    assert masked_ids(ForeignProcessor(Qwenlike())) == (PAD, IMAGE, VIDEO)


def test_operators_are_declared_when_torchvision_is_first_imported(tmp_path: Path) -> None:
    """A torchvision whose C++ extension is missing, as PyPI's is beside a CPU torch."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "import torch\n@torch.library.register_fake('torchvision::nms')\ndef nms(d, s, i): return d\n"
    )
    for first, expected in (("", 1), ("import rlhf; ", 0)):
        ran = subprocess.run(
            [sys.executable, "-c", f"{first}import torchvision"],
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert ran.returncode == expected, ran.stderr[-1000:]


def test_a_bridge_opens_where_its_arithmetic_was_imported_before_torch(tmp_path: Path) -> None:
    tiny()[0].save_pretrained(tmp_path)
    tiny()[1].save_pretrained(tmp_path)
    code = (
        "import sys; import rlhf.architecture; assert 'torch' not in sys.modules; "
        f"from rlhf.foreign import open_model; print(type(open_model({str(tmp_path)!r})[0]).__name__)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert ran.stdout.strip() == "BridgeForConditionalGeneration", ran.stderr[-1000:]

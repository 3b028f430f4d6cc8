"""Weights read from disk for an engine that is running: half precision, and adapters upon adapters."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from actors.artifacts import read_weights
from rlhf.architecture import base_of, from_folder

NAME = "model.language_model.layers.0.self_attn.q_proj"


def base(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    folder.mkdir()
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_file({f"{NAME}.weight": weight}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architectures": ["SomeVLM"]}))
    return weight.float()


def adapter(folder: Path, on: Path, seed: int) -> torch.Tensor:
    """A LoRA adapter of rank 2 on `on`; returns what it adds."""
    folder.mkdir()
    random = torch.Generator().manual_seed(seed)
    down, up = torch.randn(2, 4, generator=random), torch.randn(6, 2, generator=random)
    names = {"lora_A": down, "lora_B": up}
    save_file(
        {f"base_model.model.{NAME}.{part}.weight": value for part, value in names.items()},
        folder / "adapter_model.safetensors",
    )
    settings = {"base_model_name_or_path": str(on), "lora_alpha": 6, "r": 2}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return 3.0 * (up @ down)


def test_half_precision_is_read_exactly(tmp_path: Path) -> None:
    weight = base(tmp_path / "base", torch.bfloat16)
    ((name, found),) = read_weights(tmp_path / "base")
    assert name == f"{NAME}.weight"
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, weight.numpy())


def test_adapters_upon_adapters_are_merged_into_their_base(tmp_path: Path) -> None:
    weight = base(tmp_path / "base", torch.float32)
    first = adapter(tmp_path / "first", tmp_path / "base", 1)
    second = adapter(tmp_path / "second", tmp_path / "first", 2)
    ((_, found),) = read_weights(tmp_path / "second")
    np.testing.assert_allclose(found, (weight + first + second).numpy(), atol=1e-5)
    assert base_of(tmp_path / "second") == tmp_path / "base"
    assert from_folder(tmp_path / "second").digest == from_folder(tmp_path / "base").digest

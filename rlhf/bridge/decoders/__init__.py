"""Decoders with layers of their own for pictures, built on Qwen3's. A plain decoder is any of transformers and needs
nothing here. Importing this package needs no torch.

A new decoder is one new module here: a frozen dataclass with a class attribute `type`, decorated `@DECODERS.register`,
whose fields are what a recipe writes beside Qwen3's keys. Its torch module lives in `rlhf/bridge/layers`. Every
parameter of the Qwen3 inside keeps its name, so that trained weights find their places.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from rlhf.slots import Slot

PREFIX = "thinkfusion_"  # of their model types in a config.json


class Decoder(Protocol):
    """What every decoder offers. `table` is a recipe's table, every key present."""

    type: ClassVar[str]
    told: ClassVar[str]  # what its layers know of a token beside its position; see `rlhf.bridge.positions`
    served: ClassVar[str]  # by which engine: "vllm" or "huggingface"
    upcycles: ClassVar[bool]  # whether its feed-forwards can become mixtures of experts
    token_keys: ClassVar[tuple[str, ...]]  # settings that are token ids; recipes write the tokens themselves

    @classmethod
    def of_plain(cls, table: Mapping[str, Any]) -> dict[str, Any]:
        """Keys of its own that follow from the Qwen3 it is put around, where a recipe is silent."""

    def derived(self, table: Mapping[str, Any]) -> dict[str, Any]:
        """Keys that follow from others, as an engine must read them."""

    def plain(self, table: Mapping[str, Any]) -> dict[str, Any]:
        """The Qwen3 inside, as a table."""

    def parameters(self, table: Mapping[str, Any], inside: int) -> int:
        """How many, the Qwen3 inside having `inside`."""

    def classes(self) -> tuple[Any, Any]:
        """The config and the model, of transformers."""


class Served:
    """A decoder that vLLM serves, that can be upcycled, and that names no tokens."""

    served: ClassVar[str] = "vllm"
    upcycles: ClassVar[bool] = True
    token_keys: ClassVar[tuple[str, ...]] = ()


class SameSizes(Served):
    """A decoder whose keys are those of the Qwen3 inside, and its own that follow from nothing."""

    @classmethod
    def of_plain(cls, table: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG003
        return {}

    def derived(self, table: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        return {}

    def plain(self, table: Mapping[str, Any]) -> dict[str, Any]:
        return dict(table)


DECODERS: Slot[Decoder] = Slot("decoder", __name__)


def own(table: Mapping[str, Any]) -> Decoder | None:
    """The decoder a table names, or None for one of transformers'."""
    if table.get("type") not in DECODERS.types():
        return None
    fields = {field.name for field in dataclasses.fields(DECODERS.find(table))}  # type: ignore[arg-type]
    return DECODERS.make({key: value for key, value in table.items() if key in fields | {"type"}})


def require_underived(decoder: Decoder, given: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a key that follows from others, which would be overwritten."""
    for key in sorted(decoder.derived(given).keys() & given.keys()):
        own_keys = ", ".join(field.name for field in dataclasses.fields(decoder))  # type: ignore[arg-type]
        raise ValueError(f"decoder.{decoder.type}: {key} follows from its own keys ({own_keys}); give those")


def type_of(model_type: str) -> str:
    """As a recipe writes it, of a config's model type."""
    return model_type.removeprefix(PREFIX)

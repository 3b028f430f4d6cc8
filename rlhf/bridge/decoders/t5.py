"""T5 (1910.10683), as BLIP-2 has it (2301.12597): pictures and question are read by an encoder, the reply is written by
a decoder that looks at what the encoder made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from rlhf.bridge.decoders import DECODERS, SameSizes
from rlhf.slots import at_least


@DECODERS.register
@dataclass(frozen=True)
class EncoderDecoder(SameSizes):
    """`reply`: the token that ends a prompt, the first of its kind in a row; what follows is the decoder's. Without
    one, the prompt ends with its last picture, or with its first token · `decoder_layers`: 0 for as many as the
    encoder's num_hidden_layers · `buckets`, `distance`: of relative positions · `gated`: T5 1.1's feed-forward, with
    GELU; else the first T5's. vLLM serves no such model."""

    type: ClassVar[str] = "t5"
    told: ClassVar[str] = "asked"
    served: ClassVar[str] = "huggingface"
    upcycles: ClassVar[bool] = False
    token_keys: ClassVar[tuple[str, ...]] = ("reply",)
    reply: str | int = "<assistant>"
    decoder_layers: int = 0
    buckets: int = 32
    distance: int = 128
    gated: bool = True

    def __post_init__(self) -> None:
        at_least("decoder.t5", self, 0, ("decoder_layers",))
        at_least("decoder.t5", self, 1, ("buckets", "distance"))

    def derived(self, table: Mapping[str, Any]) -> dict[str, Any]:
        return {"num_key_value_heads": table["num_attention_heads"]}

    def parameters(self, table: Mapping[str, Any], inside: int) -> int:  # noqa: ARG002 - there is no Qwen3 inside
        hidden, inner = table["hidden_size"], table["num_attention_heads"] * table["head_dim"]
        attention = 4 * hidden * inner
        feed = (2 + self.gated) * hidden * table["intermediate_size"]
        asked, answered = table["num_hidden_layers"], self.decoder_layers or table["num_hidden_layers"]
        stacks = asked * (attention + feed + 2 * hidden) + answered * (2 * attention + feed + 3 * hidden)
        ends = 2 * (hidden + self.buckets * table["num_attention_heads"])
        tables = 1 if table.get("tie_word_embeddings") else 2
        return int(stacks + ends + tables * table["vocab_size"] * hidden)

    def classes(self) -> tuple[Any, Any]:
        from rlhf.bridge.layers.t5 import JoinedT5, JoinedT5Config

        return JoinedT5Config, JoinedT5

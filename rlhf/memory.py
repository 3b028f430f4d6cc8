"""How many bytes training and serving take, by what they are for: arithmetic on an architecture.

Of one rank, or of one GPU of an engine. What DeepSpeed holds is as its own estimators have it, what backward keeps as
autograd was seen to (tests/unit/test_memory.py has both). Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf.architecture import Architecture

LOGITS = 2**25  # of tokens times vocabulary at once: 128 MiB in float32
# DeepSpeed's defaults, in elements: what it reduces at once, and how much of a model ZeRO-3 keeps gathered
BUCKET, GATHERED = 500_000_000, 1_000_000_000
CAPTION = 32  # tokens of text that a picture comes with, at least
PREFILL = 8192  # tokens that an engine takes in at once; a longest row, if that is longer
BLOCK = 128  # tokens that keys and values are kept by, at most


@dataclass(frozen=True)
class Sharding:
    """How a model that trains lies over ranks, and in which precision."""

    precision: str
    zero_stage: int
    ranks: int
    offload: bool = False  # gradients and optimizer state to the host

    @property
    def width(self) -> int:
        """Bytes of a parameter."""
        return width_of(self.precision)

    def split(self, bytes_: int, stage: int) -> int:
        """What a rank holds of what ZeRO splits from `stage` on."""
        return -(-bytes_ // self.ranks) if self.zero_stage >= stage else bytes_


def width_of(precision: str) -> int:
    return 4 if precision == "float32" else 2


def weight_bytes(parameters: int, over: Sharding) -> int:
    """Parameters of one rank (ZeRO, 1910.02054): stage 3 splits them over ranks."""
    return over.split(over.width * parameters, 3)


def gathered_bytes(parameters: int, over: Sharding) -> int:
    """What ZeRO-3 holds whole, of other ranks' parameters, while layers compute."""
    return over.width * min(parameters, GATHERED) if over.zero_stage >= 3 and over.ranks > 1 else 0


def gradient_bytes(trainable: int, over: Sharding) -> int:
    """Gradients of one rank, which add up in float32 under ZeRO: beside those of a micro-batch until that is reduced
    (stage 2), and once more as the flat partition that the optimizer reads (stage 1)."""
    if over.zero_stage == 0:
        return over.width * trainable
    if over.zero_stage == 1:
        return (over.width + (4 if over.width < 4 else 0)) * trainable + over.split(4 * trainable, 1)
    return over.split((4 + (over.width if over.zero_stage == 2 else 0)) * trainable, 2)


def optimizer_bytes(trainable: int, over: Sharding, matrices: int = 0) -> int:
    """State of one rank, which ZeRO splits from stage 1 on: two moments of AdamW, one of Muon for the `matrices` among
    the trainable; and a float32 copy of the weights, unless these are in float32 and the partition itself (stage 3)."""
    itself = over.width == 4 and (over.zero_stage == 0 or (over.zero_stage == 3 and not over.offload))
    return over.split((8 + (0 if itself else 4)) * trainable - 4 * min(matrices, trainable), 1)


def bucket_bytes(over: Sharding) -> int:
    """The buffer in which gradients are reduced."""
    return 4 * BUCKET if over.zero_stage else 0


def kept_bytes(architecture: Architecture, tokens: int, precision: str, checkpointing: bool, encodes: bool) -> int:
    """Activations of one micro-batch of `tokens`, pictures among them: what backward keeps of every layer; with
    `checkpointing` the input of each, and all of the largest. `encodes`: the vision encoder trains. 0 where the
    configuration is unknown."""
    decoder = architecture.plain_decoder
    if not {"num_hidden_layers", "hidden_size", "vocab_size"} <= decoder.keys():
        return 0
    width, hidden = width_of(precision), decoder["hidden_size"]
    stacks = [(tokens, decoder["num_hidden_layers"], hidden, _decoder_layer(architecture, width))]
    if encodes and (patches := _patches(architecture, tokens)):
        vision = architecture.tables["vision"]
        stacks.append((patches, vision["num_hidden_layers"], vision["hidden_size"], _vision_layer(vision, width)))
    ends = tokens * 8 * width * hidden  # embeddings, what the connector gave, the last norm
    # logits, the same in float32, their softmax and two gradients
    head = (width + 16) * min(tokens * decoder["vocab_size"], LOGITS)
    if checkpointing:
        inputs = sum(count * layers * width * wide for count, layers, wide, _ in stacks)
        return inputs + max(count * layer for count, _, _, layer in stacks) + ends + head
    return sum(count * layers * layer for count, layers, _, layer in stacks) + ends + head


def _patches(architecture: Architecture, tokens: int) -> int:
    """Features that the encoder makes of a micro-batch's pictures, at most; at least one picture's."""
    if architecture.tables.get("vision", {}).get("type") == "patches":
        return 0
    return max(
        (max(1, tokens // (length + CAPTION)) * features for length, features in architecture.pictures), default=0
    )


def _decoder_layer(architecture: Architecture, width: int) -> int:
    """Bytes that backward keeps of a token in one layer of a decoder such as Qwen3's."""
    decoder = architecture.plain_decoder
    hidden, heads = decoder["hidden_size"], decoder.get("num_attention_heads", 1)
    queries = heads * (decoder.get("head_dim") or hidden // heads)
    keys = queries // heads * decoder.get("num_key_value_heads", heads)
    norms = 2 * hidden + queries + keys  # each keeps its input and, in float32, what it scales; and gives as much
    attention = 2 * queries + keys + 2 * queries  # rotated queries and keys, values; the output, put together
    if architecture.experts is not None:
        number, visited = architecture.experts
        inner = decoder.get("moe_intermediate_size", decoder.get("intermediate_size", 4 * hidden))
        feed = visited * (3 * hidden + 4 * inner) + 2 * number  # of each expert input, output, weighted output
    else:
        feed = 4 * decoder.get("intermediate_size", 4 * hidden)  # gate, its activation, up, their product
    return int(width * (norms + attention + feed) + 8 * norms)


def _vision_layer(vision: Mapping[str, Any], width: int) -> int:
    hidden, inner = vision["hidden_size"], vision["intermediate_size"]
    if vision["type"] == "aimv2":  # RMSNorm and SwiGLU
        return int(width * (2 * hidden + 5 * hidden + 4 * inner) + 8 * 2 * hidden)
    return int(width * (4 * hidden + 5 * hidden + 2 * inner))


@dataclass(frozen=True)
class Serving:
    """An engine over `tensor_parallel` GPUs, as a recipe's [resources] have it."""

    precision: str
    tensor_parallel: int
    max_model_len: int
    max_num_seqs: int


def served_bytes(architecture: Architecture, over: Serving) -> int:
    """Weights on one GPU of an engine: tensor parallelism splits the decoder's, the others lie on each whole."""
    total = architecture.parameters or 0
    split = total if architecture.parts is None else architecture.parts["decoder"]
    return width_of(over.precision) * (total - split + -(-split // over.tensor_parallel))


def row_bytes(architecture: Architecture, over: Serving) -> int:
    """Keys and values of a row of max_model_len on one GPU of an engine, in whole blocks; 0 where the configuration is
    unknown. GPUs share the heads, of which each has one at least."""
    decoder = architecture.plain_decoder
    if not {"num_hidden_layers", "hidden_size", "num_attention_heads"} <= decoder.keys():
        return 0
    heads = decoder["num_attention_heads"]
    width = decoder.get("head_dim") or decoder["hidden_size"] // heads
    keys = math.ceil(decoder.get("num_key_value_heads", heads) / over.tensor_parallel)
    tokens = math.ceil(over.max_model_len / BLOCK) * BLOCK
    return int(2 * decoder["num_hidden_layers"] * keys * width * width_of(over.precision) * tokens)


def working_bytes(architecture: Architecture, over: Serving) -> int:
    """What an engine computes in: a layer of the tokens it takes in at once, and the logits of as many rows as it
    samples for, in float32, with their softmax and order. 0 where the configuration is unknown."""
    decoder = architecture.plain_decoder
    if not {"hidden_size", "vocab_size"} <= decoder.keys():
        return 0
    hidden = decoder["hidden_size"]
    inner = decoder.get("intermediate_size", 4 * hidden)
    if architecture.experts is not None:
        inner = architecture.experts[1] * decoder.get("moe_intermediate_size", inner)
    tokens = max(PREFILL, over.max_model_len)
    layer = width_of(over.precision) * tokens * (4 * hidden + 2 * inner // over.tensor_parallel)
    return int(layer + 12 * over.max_num_seqs * decoder["vocab_size"])

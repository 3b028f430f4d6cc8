"""What a model is, from its configuration alone: its parts, their sizes, its parameters.

Reads a recipe's `[model.bridge]`, or a folder's config.json and safetensors headers. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

from rlhf.bridge.decoders import DECODERS, own, require_underived, type_of
from rlhf.bridge.geometry import Geometry
from rlhf.bridge.heads import HEADS, Head
from rlhf.bridge.naming import DENSE, MODEL_TYPE, MOE, PATCHES, SLOTS
from rlhf.bridge.packers import PACKERS
from rlhf.bridge.sparsity import dense_layers
from rlhf.recipe import Lora, Model, Rl
from rlhf.slots import laid_over, settings

GIB = float(2**30)
# what saving a model writes beside its architecture
VOLATILE = {"_name_or_path", "dtype", "torch_dtype", "transformers_version"}
SLOT_DEFAULTS: dict[str, dict[str, Any]] = {
    "encoder": {"type": "tower"},
    "connector": {"type": "mlp"},
    "packer": {"type": "segments"},
}
# What transformers 5.19 fills in where a recipe is silent; a test compares with its own config classes.
VISION_DEFAULTS: dict[str, dict[str, Any]] = {
    "siglip": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "image_size": 224,
        "patch_size": 16,
    },
    "aimv2": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 24,
        "image_size": 224,
        "patch_size": 14,
        "qkv_bias": False,
        "mlp_bias": False,
        "is_native": False,
    },
    "clip": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "image_size": 224,
        "patch_size": 32,
    },
    "patches": {"patch_size": 30},
}
DECODER_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen3": {
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "attention_bias": False,
        "tie_word_embeddings": False,
    },
    "qwen3_moe": {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
    },
}


SIZES = {
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "max_position_embeddings", "moe_intermediate_size", "num_experts_per_tok"),
}


@dataclass(frozen=True)
class Architecture:
    """Everything but the weights: an engine of one architecture can serve any model of it.

    spec              canonical JSON of the configuration (empty tables for a hub name)
    stored_parameters counted in a folder's safetensors, None where there are none
    """

    name: str
    spec: str
    stored_parameters: int | None = None

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"{self.name}\n{self.spec}".encode()).hexdigest()[:16]

    @cached_property
    def tables(self) -> dict[str, dict[str, Any]]:
        return dict(json.loads(self.spec))

    @property
    def decoder(self) -> dict[str, Any]:
        return self.tables.get("decoder", {})

    @property
    def plain_decoder(self) -> dict[str, Any]:
        """The decoder's table, or that of the Qwen3 inside of one that is built around it."""
        decoder = own(self.decoder)
        return self.decoder if decoder is None else decoder.plain(self.decoder)

    @property
    def is_bridge(self) -> bool:
        return self.name in (DENSE, MOE)

    @property
    def served(self) -> str:
        """By which engine: "vllm", or "huggingface" for what vLLM cannot serve."""
        decoder = own(self.decoder)
        return "vllm" if decoder is None else decoder.served

    @property
    def known(self) -> bool:
        """Whether the configuration could be read; a hub name's cannot, without the network."""
        return bool(self.decoder)

    @property
    def experts(self) -> tuple[int, int] | None:
        """(number of experts, experts a token visits), or None for a dense decoder."""
        number = next(
            (self.decoder[k] for k in ("num_experts", "num_local_experts", "n_routed_experts") if self.decoder.get(k)),
            0,
        )
        return (int(number), int(self.decoder.get("num_experts_per_tok", 1))) if number else None

    @cached_property
    def pictures(self) -> tuple[tuple[int, int], ...]:
        """(tokens, features of the encoder) of a picture of each extreme size; none for models other than bridges."""
        if not self.is_bridge:
            return ()
        geometry = geometry_of(self.tables)
        layouts = [geometry.layout(*size) for size in geometry.tiler.extremes]
        return tuple(
            (len(geometry.pattern(one)), sum(rows * cols for rows, cols in map(geometry.features, one.tiles)))
            for one in layouts
        )

    @property
    def image_tokens(self) -> int | None:
        """Most tokens one picture can become; None for models other than bridges."""
        return max(tokens for tokens, _ in self.pictures) if self.is_bridge else None

    @cached_property
    def shapes_differ(self) -> bool:
        """Whether a bridge's encoder is called once for each shape of tile."""
        return self.is_bridge and geometry_of(self.tables).shapes_differ

    @cached_property
    def parts(self) -> dict[str, int] | None:
        """How many parameters each part of a bridge has, tied ones once, the decoder's with embeddings and head. None
        where the configuration does not tell."""
        if not self.is_bridge or _defaults("decoder", self.decoder["type"]) is None:
            return None
        geometry, vision, width = geometry_of(self.tables), self.tables["vision"], self.decoder["hidden_size"]
        sizes = geometry.encoder.width(vision), width, self.decoder["vocab_size"]
        head = head_of(self.tables)
        return {
            "vision": _vision(vision, self.tables["encoder"]) + geometry.encoder.parameters(vision),
            "connector": geometry.connector.parameters(*sizes),
            "packer": geometry.packer.parameters(width),
            "head": 0 if head is None else head.parameters(*sizes),
            "decoder": _decoder(self.decoder),
        }

    @property
    def parameters(self) -> int | None:
        """How many, tied ones once. None when neither the files nor the configuration tell."""
        if self.stored_parameters is not None:
            return self.stored_parameters
        return None if self.parts is None else sum(self.parts.values())

    @property
    def active_parameters(self) -> int | None:
        """Those that one token meets: of a mixture's experts only the ones it visits."""
        total, experts = self.parameters, self.experts
        if total is None or experts is None or not self.is_bridge:
            return total
        plain = self.plain_decoder
        idle = experts[0] - experts[1]
        return total - _sparse_layers(plain) * idle * 3 * plain["hidden_size"] * plain["moe_intermediate_size"]

    def lora_parameters(self, lora: Lora) -> int | None:
        """Parameters of the adapters on the decoder's linear layers."""
        if not self.is_bridge or self.decoder["type"] not in DECODER_DEFAULTS:
            return None
        d, hidden = self.decoder, self.decoder["hidden_size"]
        queries, keys = d["num_attention_heads"] * _head_dim(d), d["num_key_value_heads"] * _head_dim(d)
        ends = {
            "q_proj": hidden + queries,
            "k_proj": hidden + keys,
            "v_proj": hidden + keys,
            "o_proj": queries + hidden,
            "gate_proj": hidden + d["intermediate_size"],
            "up_proj": hidden + d["intermediate_size"],
            "down_proj": hidden + d["intermediate_size"],
        }
        return int(sum(ends.get(name, 0) for name in lora.target_modules) * lora.rank * d["num_hidden_layers"])

    def rebuilt(self, over: Mapping[str, Mapping[str, Any]]) -> Architecture:
        """This bridge with these tables laid over its own. Raises ValueError where they do not fit."""
        if not self.is_bridge:
            raise ValueError("only a bridge of this project can be rebuilt; leave the stage out")
        if missing := sorted(over.keys() - set(SLOTS)):
            raise ValueError(f"bridge has no slot {missing[0]!r}; its slots are {', '.join(SLOTS)}")
        tables = {slot: _relaid(slot, self.tables[slot], over.get(slot, {})) for slot in self.tables if slot != "head"}
        head = laid_over(self.tables.get("head", {}), over.get("head", {}))
        tables |= {"head": head} if head else {}
        made = from_bridge(tables, self.decoder["vocab_size"])
        same = made.tables == self.tables
        return self if same else made

    def upcycled(self, num_experts: int, top_k: int, layers: str = "all") -> Architecture:
        """This dense bridge after `upcycle`. Raises ValueError where `rlhf.bridge.upcycle` would."""
        if self.experts is not None:
            raise ValueError(f"its decoder already has {self.experts[0]} experts; leave `upcycle` out")
        if top_k > num_experts:
            raise ValueError(f"top_k = {top_k} is more than num_experts = {num_experts}; lower top_k")
        told = own(self.decoder)
        if not self.is_bridge or not (told.upcycles if told else self.decoder["type"] == "qwen3"):
            raise ValueError(
                "only a bridge with a dense qwen3 decoder, or one built on it, can be upcycled; leave `upcycle` out"
            )
        plain = told.plain(self.decoder) if told else self.decoder
        decoder = self.decoder | {
            "type": self.decoder["type"] if told else "qwen3_moe",
            "num_experts": num_experts,
            "num_experts_per_tok": top_k,
            "moe_intermediate_size": self.decoder["intermediate_size"],
            "decoder_sparse_step": 1,
            "mlp_only_layers": dense_layers(layers, plain["num_hidden_layers"]),
        }
        return replace(self, name=MOE, spec=_canonical({**self.tables, "decoder": decoder}), stored_parameters=None)


def _relaid(slot: str, table: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """A vision encoder or decoder of another type keeps the sizes that it has too, as `rlhf.bridge.rebuild` has it."""
    if slot not in ("vision", "decoder"):
        return laid_over(table, over)
    kind = str(over.get("type", table["type"]))
    if kind == table["type"]:
        return {**table, **over}
    plain = decoder.plain(table) if slot == "decoder" and (decoder := own(table)) else dict(table)
    inherited = DECODERS.find({"type": kind}).of_plain(plain) if kind in DECODERS.types() else {}
    return {**(_defaults(slot, kind) or {}), **plain, **inherited, "type": kind, **over}


def algorithm_of(stage: Rl, architecture: Architecture) -> str | None:
    """The policy loss of an rl stage: "auto" is gspo for a mixture of experts and dapo for a dense decoder, or None
    where that is not known."""
    if stage.algorithm != "auto":
        return stage.algorithm
    if not architecture.known:
        return None
    return "gspo" if architecture.experts else "dapo"


def architecture_of(model: Model) -> Architecture:
    """The architecture `[model]` describes. Raises ValueError saying what to change."""
    if model.bridge is not None:
        if (decoder := own(model.bridge.get("decoder", {}))) is not None:
            require_underived(decoder, model.bridge["decoder"])
        return from_bridge(model.bridge, model.tokenizer.vocab_size)
    assert model.path is not None
    folder = Path(model.path)
    return from_folder(folder) if folder.is_dir() else Architecture(model.path, _canonical({}))


def from_bridge(bridge: Mapping[str, Mapping[str, Any]], vocab_size: int) -> Architecture:
    """The architecture of a bridge to build; its components are made, so their own errors surface here."""
    missing = [slot for slot in ("vision", "decoder", "tiler") if slot not in bridge]
    if missing:
        raise ValueError(f"model.bridge needs the table {' and '.join(map(repr, missing))}")
    unknown = sorted(bridge.keys() - set(SLOTS))
    if unknown:
        raise ValueError(f"model.bridge has no slot {unknown[0]!r}; its slots are {', '.join(SLOTS)}")
    tables = {**SLOT_DEFAULTS, **{slot: dict(table) for slot, table in bridge.items()}}
    for slot in ("vision", "decoder"):
        kind = tables[slot].get("type")
        if slot == "vision" and kind not in VISION_DEFAULTS:
            raise ValueError(f"model.bridge.vision type {kind!r} is unknown; choose {' or '.join(VISION_DEFAULTS)}")
        tables[slot] = {**(_defaults(slot, str(kind)) or {}), **tables[slot]}
    tables["decoder"].setdefault("vocab_size", vocab_size)
    if decoder := own(tables["decoder"]):
        tables["decoder"] |= decoder.derived(tables["decoder"])
    for slot in ("vision", "decoder"):
        _require_sizes(slot, tables[slot])
    try:
        geometry_of(tables)
        head_of(tables)
    except (ValueError, TypeError) as error:
        raise ValueError(f"model.bridge: {error}; make tiler, vision and connector fit one another") from error
    architecture = Architecture(DENSE, _canonical(tables))
    if architecture.experts is None:
        return architecture
    number, visited = architecture.experts
    if visited > number:
        raise ValueError(
            f"model.bridge.decoder: num_experts_per_tok = {visited} is more than num_experts = {number}; lower it"
        )
    return replace(architecture, name=MOE)


def _defaults(slot: str, kind: str) -> dict[str, Any] | None:
    """What transformers fills in where a table of this type is silent; None where that is not known."""
    if slot == "vision":
        return VISION_DEFAULTS.get(kind)
    if kind in DECODERS.types():
        fields = settings(DECODERS.make({"type": kind}))
        return DECODER_DEFAULTS["qwen3"] | {name: value for name, value in fields.items() if name != "type"}
    return DECODER_DEFAULTS.get(kind)


def _require_sizes(slot: str, table: Mapping[str, Any]) -> None:
    """Raise ValueError for a size that is none, and for widths that do not divide into heads."""
    for key in SIZES & table.keys():
        if not isinstance(table[key], int) or table[key] < 1:
            raise ValueError(f"model.bridge.{slot}.{key} = {table[key]!r}: give a whole number above 0")
    hidden, heads = table.get("hidden_size"), table.get("num_attention_heads")
    if hidden and heads and "head_dim" not in table and hidden % heads:
        raise ValueError(
            f"model.bridge.{slot}: hidden_size = {hidden} does not divide into num_attention_heads = {heads}; "
            "change one"
        )
    if heads and (keys := table.get("num_key_value_heads")) and heads % keys:
        raise ValueError(
            f"model.bridge.{slot}: num_attention_heads = {heads} do not divide into num_key_value_heads = {keys}; "
            "change one"
        )


def base_of(folder: Path) -> Path:
    """The folder that holds the weights: of adapters in peft's format, the model at the end of their chain of bases;
    else the folder itself."""
    return chain_of(folder)[-1]


def chain_of(folder: Path) -> list[Path]:
    """The folder, where it holds adapters what they adapt, and so on to the folder that holds the weights."""
    chain = [folder]
    while (adapter := chain[-1] / "adapter_config.json").exists():
        try:
            chain.append(Path(json.loads(adapter.read_text())["base_model_name_or_path"]))
        except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{adapter}: names no base model ({type(error).__name__}: {error}); save the adapters with peft"
            ) from error
    return chain


def from_folder(folder: Path) -> Architecture:
    """The architecture of a Hugging Face model folder, or of an adapter's base. Raises ValueError naming the file that
    is missing or broken."""
    folder = base_of(folder)
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); a model folder holds config.json") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(  # noqa: TRY004 - the file is wrong, not the type of an argument
            f"{path}: holds a {type(config).__name__}, and a model's configuration is an object"
        )
    return of_config(config, folder)


def of_config(config: Mapping[str, Any], folder: Path) -> Architecture:
    """The architecture of a configuration as transformers writes it, of the model in `folder`."""
    name = str((config.get("architectures") or [config.get("model_type", "unknown")])[0])
    text = dict(config.get("text_config") or config)
    text["type"] = type_of(str(text.pop("model_type", None)))
    if "num_local_experts" in text:  # the name under which transformers 5 saves qwen3_moe's num_experts
        text["num_experts"] = text.pop("num_local_experts")
    text.setdefault("tie_word_embeddings", bool(config.get("tie_word_embeddings", False)))
    tables: dict[str, Any] = {"decoder": text}
    if config.get("model_type") == MODEL_TYPE:
        vision = dict(config["vision_config"])
        kind = str(vision.pop("model_type", ""))
        vision["type"] = "patches" if kind == PATCHES else kind.removesuffix("_vision_model")
        tables |= {"vision": vision} | {slot: config[slot] for slot in ("encoder", "tiler", "connector", "packer")}
        tables |= {"head": config["head"]} if config.get("head") else {}
    elif "vision_config" in config:
        tables["vision"] = config["vision_config"]
    return Architecture(name, _canonical(tables), _stored(folder))


def geometry_of(tables: Mapping[str, Mapping[str, Any]]) -> Geometry:
    """The media contract of a bridge's tables. Raises ValueError where components do not fit together."""
    # the packer names tokens, whose ids only a tokenizer knows; any will do to count them
    ids: defaultdict[Any, int] = defaultdict(count(-1, -1).__next__)
    packer = dict(tables["packer"])
    for key in PACKERS.find(packer).token_keys:
        named = packer.get(key)
        if named is not None:
            packer[key] = [ids[token] for token in named] if isinstance(named, list | tuple) else ids[named]
    told = decoder.told if (decoder := own(tables["decoder"])) else "nothing"
    return Geometry.of(
        tiler=tables["tiler"],
        encoder=tables["encoder"],
        connector=tables["connector"],
        packer=packer,
        vision=tables["vision"],
        image_token_id=0,
        told=told,
        # which token it is only a tokenizer knows
        reply_token_id=1 if told == "asked" else None,
    )


def head_of(tables: Mapping[str, Mapping[str, Any]]) -> Head | None:
    """The head of a bridge's tables, if it has one; of the tokens it names only their number matters."""
    if "head" not in tables:
        return None
    table = dict(tables["head"])
    for key in HEADS.find(table).token_keys:
        if isinstance(table.get(key), list | tuple):
            table[key] = list(range(len(table[key])))
    return HEADS.make(table)


def _vision(v: Mapping[str, Any], encoder: Mapping[str, Any]) -> int:
    if v["type"] == "patches":
        return 0
    chosen = encoder.get("layer", -1)
    highest = chosen if isinstance(chosen, int) else max(chosen)
    if every := encoder.get("every"):
        highest = -1 - v["num_hidden_layers"] % every
    dropped = -1 - highest  # layers above the highest that is read
    hidden, inner, layers = v["hidden_size"], v["intermediate_size"], v["num_hidden_layers"] - dropped
    patch, image = _area(v["patch_size"]), _area(v["image_size"])
    patches = 3 * patch * hidden
    positions = 0 if v.get("is_native") else image // patch * hidden
    if v["type"] == "aimv2":
        biases = 4 * hidden * bool(v.get("qkv_bias")) + (2 * inner + hidden) * bool(v.get("mlp_bias"))
        layer = 4 * hidden * hidden + 3 * hidden * inner + 2 * hidden + biases
        return int(patches + hidden + hidden + positions + layers * layer + hidden * (not dropped))
    layer = 4 * (hidden * hidden + hidden) + 2 * hidden * inner + inner + hidden + 4 * hidden
    # CLIP: a class token with its position, a norm before the layers, no bias and no norm after them
    ends = 2 * hidden + 2 * hidden if v["type"] == "clip" else hidden + 2 * hidden * (not dropped)
    return int(patches + positions + layers * layer + ends)


def _decoder(d: Mapping[str, Any]) -> int:
    if decoder := own(d):
        inside = "qwen3_moe" if d.get("num_experts") else "qwen3"
        return decoder.parameters(d, _decoder({**decoder.plain(d), "type": inside}))
    hidden, layers = d["hidden_size"], d["num_hidden_layers"]
    queries, keys = d["num_attention_heads"] * _head_dim(d), d["num_key_value_heads"] * _head_dim(d)
    attention = hidden * (queries + 2 * keys) + queries * hidden + 2 * _head_dim(d)
    attention += (queries + 2 * keys + hidden) * bool(d.get("attention_bias"))
    dense = 3 * hidden * d["intermediate_size"]
    total = layers * (attention + 2 * hidden)
    if d.get("num_experts"):
        sparse = _sparse_layers(d)
        expert = 3 * hidden * d["moe_intermediate_size"]
        total += sparse * d["num_experts"] * (expert + hidden) + (layers - sparse) * dense
    else:
        total += layers * dense
    heads = 1 if d.get("tie_word_embeddings") else 2
    return int(total + hidden + heads * d["vocab_size"] * hidden)


def _sparse_layers(d: Mapping[str, Any]) -> int:
    """How many layers of a mixture have experts."""
    step, only_dense = d.get("decoder_sparse_step", 1), d.get("mlp_only_layers") or []
    return sum(layer not in only_dense and (layer + 1) % step == 0 for layer in range(d["num_hidden_layers"]))


def _head_dim(d: Mapping[str, Any]) -> int:
    return int(d.get("head_dim") or d["hidden_size"] // d["num_attention_heads"])


def _area(side: Any) -> int:
    sides = (side, side) if isinstance(side, int) else tuple(side)
    return int(sides[0] * sides[1])


def _stored(folder: Path) -> int | None:
    """Parameters in the folder's safetensors headers: 8 bytes of length, then JSON with every tensor's shape."""
    files = sorted(folder.glob("*.safetensors"))
    total = 0
    for path in files:
        with path.open("rb") as file:
            start = file.read(8)
            if len(start) < 8:
                raise ValueError(f"{path}: not a safetensors file (shorter than its header); download or save it again")
            header = json.loads(file.read(struct.unpack("<Q", start)[0]))
        for name, tensor in header.items():
            if name != "__metadata__":
                total += _product(tensor["shape"])
    return total if files else None


def _product(shape: list[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def _canonical(tables: Mapping[str, Any]) -> str:
    return json.dumps(_lasting(tables), sort_keys=True, default=str)


def _lasting(value: Any) -> Any:
    """Without what saving a model writes beside its architecture."""
    if not isinstance(value, Mapping):
        return value
    return {name: _lasting(inner) for name, inner in value.items() if name not in VOLATILE}

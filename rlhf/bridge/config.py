"""The bridge's Hugging Face config."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, PretrainedConfig

from rlhf.bridge.decoders import DECODERS, type_of
from rlhf.bridge.geometry import Geometry
from rlhf.bridge.heads import HEADS
from rlhf.bridge.naming import DENSE, MODEL_TYPE, MOE, PATCHES
from rlhf.slots import settings


def is_moe(text_config: PretrainedConfig) -> bool:
    """Whether the decoder routes tokens to experts."""
    return any(getattr(text_config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))


def _sub_config(name: str, value: PretrainedConfig | dict[str, Any] | None) -> PretrainedConfig:
    if isinstance(value, PretrainedConfig):
        return value
    if not value or "model_type" not in value:
        raise ValueError(f"{name} needs a transformers config, or its dict with a 'model_type'; got {value!r}")
    return CONFIG_MAPPING[value["model_type"]](**{key: v for key, v in value.items() if key != "model_type"})


class PatchesConfig(PretrainedConfig):
    """Of `encoder.patches`, which has no vision transformer: only what a patch is."""

    model_type = PATCHES
    patch_size: int = 30


CONFIG_MAPPING.register(PATCHES, PatchesConfig, exist_ok=True)
for _kind in DECODERS.types():
    _config, _model = DECODERS.make({"type": _kind}).classes()
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)


class BridgeConfig(PretrainedConfig):
    """`vision_config` and `text_config` are configs of transformers; `tiler`, `encoder`, `connector` and `packer` are
    the settings of the four slots between them, `head` those of one beside the words (see those packages);
    `image_token_id` is the placeholder."""

    model_type = MODEL_TYPE
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig, "vision_config": AutoConfig}
    has_no_defaults_at_init = True

    # Written out: transformers 5 would otherwise generate a dataclass-like one that leaves sub-configs as dicts.
    def __init__(
        self,
        vision_config: PretrainedConfig | dict[str, Any] | None = None,
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        tiler: dict[str, Any] | None = None,
        encoder: dict[str, Any] | None = None,
        connector: dict[str, Any] | None = None,
        packer: dict[str, Any] | None = None,
        head: dict[str, Any] | None = None,
        image_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        if tiler is None or image_token_id is None:
            raise ValueError("a bridge config needs a tiler and an image_token_id")
        self.vision_config = _sub_config("vision_config", vision_config)
        self.text_config = _sub_config("text_config", text_config)
        # The pooling head would be parameters that nothing reads: no gradient, and no proof of a weight sync.
        self.vision_config.vision_use_head = False  # SigLIP's name
        self.vision_config.use_head = False  # AIMv2's name
        self.image_token_id = image_token_id
        geometry = Geometry.of(
            tiler=tiler,
            encoder={"type": "tower"} if encoder is None else encoder,
            connector={"type": "mlp"} if connector is None else connector,
            packer={"type": "segments"} if packer is None else packer,
            vision=self.vision_config.to_dict(),
            image_token_id=image_token_id,
            told=self.told,
            reply_token_id=self.reply_token_id,
        )
        self.tiler = settings(geometry.tiler)
        self.encoder = settings(geometry.encoder)
        self.connector = settings(geometry.connector)
        self.packer = settings(geometry.packer)
        self.head = None if head is None else settings(HEADS.make(head))
        kwargs.setdefault("tie_word_embeddings", bool(getattr(self.text_config, "tie_word_embeddings", False)))
        # The name by which vLLM and the Auto classes choose; a saved folder already carries it.
        if kwargs.get("architectures") is None:
            kwargs["architectures"] = [MOE if is_moe(self.text_config) else DENSE]
        super().__init__(**kwargs)

    @property
    def told(self) -> str:
        """What the decoder is told of a token beside its position; see `rlhf.bridge.positions`."""
        kind = type_of(self.text_config.model_type)
        return DECODERS.find({"type": kind}).told if kind in DECODERS.types() else "nothing"

    @property
    def reply_token_id(self) -> int | None:
        """Where the decoder is told what is asked: the token that ends a prompt."""
        return int(self.text_config.reply) if self.told == "asked" else None

    @property
    def mrope_section(self) -> list[int] | None:
        """Where vLLM finds this it hands over positions in rows."""
        return None if self.told == "nothing" else [1, 0, 0]

    @property
    def geometry(self) -> Geometry:
        """The media contract these settings describe."""
        return Geometry.of(
            tiler=self.tiler,
            encoder=self.encoder,
            connector=self.connector,
            packer=self.packer,
            vision=self.vision_config.to_dict(),
            image_token_id=self.image_token_id,
            told=self.told,
            reply_token_id=self.reply_token_id,
        )

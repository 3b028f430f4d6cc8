"""The bridge as a Hugging Face model: vision encoder, connector, decoder. The trainer and vLLM's Transformers backend
run this one definition."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, ClassVar, cast

import torch
from torch import nn
from transformers import AutoModel, Cache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput, MoeCausalLMOutputWithPast
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from rlhf.bridge.alignment import align, contrast
from rlhf.bridge.config import BridgeConfig, is_moe
from rlhf.bridge.heads import HEADS
from rlhf.bridge.layers.contrast import ContrastHead
from rlhf.bridge.layers.qformer import Reader
from rlhf.bridge.layout import Layout, Tile
from rlhf.bridge.positions import next_position, position_rows
from rlhf.bridge.raster import from_cells

PICTURES = ("pixel_values", "picture_sizes", "questions")  # what forward takes of pictures, a row for each cell


class BridgePreTrainedModel(PreTrainedModel):
    """What both classes below tell transformers, TRL, PEFT and vLLM about themselves."""

    config_class = BridgeConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Also what no file holds: `from_pretrained` builds modules without memory, their constant buffers too."""
        super()._init_weights(module)
        constants = getattr(module, "constants", None)
        if callable(constants):
            for name, value in constants().items():
                init.copy_(module.get_buffer(name), value)


class BridgeModel(BridgePreTrainedModel):
    """Pictures and token ids -> the decoder's hidden states."""

    def __init__(self, config: BridgeConfig) -> None:
        super().__init__(config)
        self.geometry = config.geometry
        vision_width = self.geometry.encoder.width(config.vision_config.to_dict())
        text_width = config.text_config.hidden_size
        sizes = vision_width, text_width, config.text_config.vocab_size
        self.vision = self.geometry.encoder.build(config.vision_config)
        self.connector = self.geometry.connector.build(*sizes)
        self.packer = self.geometry.packer.build(text_width)
        self.head = None if config.head is None else HEADS.make(config.head).build(*sizes)
        self.sized = self.geometry.sized
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return cast(nn.Module, self.language_model.get_input_embeddings())

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        picture_sizes: torch.Tensor | None = None,
        questions: torch.Tensor | None = None,
        return_dict: bool = True,  # noqa: ARG002 - vLLM passes it
        **kwargs: Any,  # noqa: ARG002 - transformers may pass more
    ) -> BaseModelOutputWithPooling:
        """`pixel_values` [cells, 3, height, width] of all pictures in order; where features depend on it,
        `picture_sizes` [cells, 2], (width, height) of the picture of each cell; and for a connector that reads,
        `questions` [cells, text length], token ids of what is asked beside the picture of each cell, -1 for none -> an
        output whose `pooler_output` holds the features that go in the placeholders' places: a list with [placeholders,
        text width] for each picture, or, where every tile is a cell and nothing stands between them, [tiles, tokens,
        text width], which vLLM splits by itself."""
        pixel_values = pixel_values.to(self.dtype)
        if not self.sized:
            # one tile's grid is every tile's
            grid = self.geometry.features(self.geometry.layout(*self.geometry.tiler.extremes[0]).tiles[0])
            patches = self.vision(pixel_values)
            features = self.connector(patches, grid, questions)
            return BaseModelOutputWithPooling(last_hidden_state=patches, pooler_output=features)
        layouts = self.layouts(pixel_values, picture_sizes)
        tiles = [tile for layout in layouts for tile in layout.tiles]
        windows = [
            tile.row * layout.grid[1] + tile.col if tile.role == "local" else -1
            for layout in layouts
            for tile in layout.tiles
        ]
        found = iter(self._tile_features(pixel_values, tiles, windows, questions))
        pictures = [
            self.packer(layout, self.geometry.grids(layout), [next(found) for _ in layout.tiles]) for layout in layouts
        ]
        return BaseModelOutputWithPooling(pooler_output=cast(Any, pictures))

    def layouts(self, pixel_values: torch.Tensor, picture_sizes: torch.Tensor | None) -> list[Layout]:
        """How the pictures were cut, of which these are the cells. Raises `ValueError` where the two disagree."""
        if picture_sizes is None or len(picture_sizes) != len(pixel_values):
            found = "none" if picture_sizes is None else len(picture_sizes)
            raise ValueError(
                f"this bridge's features depend on a picture's size: give picture_sizes, (width, height) for each of "
                f"the {len(pixel_values)} rows of pixel_values; there are {found}"
            )
        sizes = picture_sizes.tolist()
        layouts = []
        place = 0
        while place < len(sizes):
            layouts.append(self.geometry.layout(*sizes[place]))
            place += self.geometry.cells(layouts[-1])
        if place != len(sizes):
            raise ValueError(
                f"the last picture lacks {place - len(sizes)} of its {self.geometry.cells(layouts[-1])} cells"
            )
        return layouts

    def _tile_features(
        self,
        pixel_values: torch.Tensor,
        tiles: Sequence[Tile],
        windows: Sequence[int],
        questions: torch.Tensor | None,
    ) -> list[torch.Tensor]:
        """[tokens, text width] of each tile; tiles of one shape go through the encoder together."""
        counts = [self.geometry.cells_of(tile) for tile in tiles]
        cells, starts = torch.split(pixel_values, counts), [0, *accumulate(counts)]
        found: list[torch.Tensor] = [pixel_values] * len(tiles)
        for box in dict.fromkeys(tile.box for tile in tiles):
            places = [place for place, tile in enumerate(tiles) if tile.box == box]
            pictures = from_cells(torch.cat([cells[place] for place in places]), box)
            asked = None if questions is None else questions[[starts[place] for place in places]]
            seen_by = torch.tensor([windows[place] for place in places], device=pixel_values.device)
            features = self.connector(self.vision(pictures, seen_by), self.geometry.features(tiles[places[0]]), asked)
            for place, feature in zip(places, features, strict=True):
                found[place] = feature
        return found

    def _scatter(
        self, input_ids: torch.Tensor | None, embeds: torch.Tensor, **pictures: torch.Tensor | None
    ) -> torch.Tensor:
        """`embeds` [rows, length, width] with the features of all pictures in place of the placeholders."""
        if input_ids is None:
            raise ValueError("pixel_values need input_ids: the placeholders say where the features go")
        found = self.get_image_features(**cast(Any, pictures)).pooler_output
        features = (torch.cat(list(found)) if isinstance(found, list) else found.flatten(0, 1)).to(embeds.dtype)
        places = input_ids == self.config.image_token_id
        count = int(places.sum())
        if count != features.shape[0]:
            raise ValueError(
                f"{features.shape[0]} image features for {count} image placeholders (id {self.config.image_token_id}): "
                "input_ids must be expanded (`processor.expand`), complete (not truncated inside a picture), and free "
                "of sampled placeholder ids (forbid the id when sampling)"
            )
        return embeds.masked_scatter(places.unsqueeze(-1).to(embeds.device), features.to(embeds.device))

    def _no_picture(self, embeds: torch.Tensor) -> torch.Tensor:
        """`embeds` unchanged in value, after a vision and connector pass whose result is multiplied by zero.

        Data-parallel ranks must run the same modules in the same order: ZeRO-2 and -3 reduce gradients, and ZeRO-3
        gathers parameters, as modules run. A rank whose rows hold no picture therefore runs the pass too, and at the
        place of the real one: after the decoder, ZeRO-2 sums wrong gradients in silence.
        """
        layout = self.geometry.layout(*self.geometry.tiler.extremes[0])
        blank = torch.zeros(self.geometry.cells(layout), 3, *self.geometry.tiler.cell, device=embeds.device)
        sizes = torch.tensor([layout.size] * len(blank)) if self.sized else None
        length = self.geometry.connector.text_length
        asked = torch.full((len(blank), length), -1, device=embeds.device) if length else None
        features = self.get_image_features(blank, sizes, asked).pooler_output
        found = torch.cat(list(features)) if isinstance(features, list) else cast(torch.Tensor, features)
        return embeds + found.sum().to(embeds.dtype) * 0

    def align(
        self, pixel_values: torch.Tensor, captions: torch.Tensor, objectives: Sequence[str], pairs: int
    ) -> dict[str, torch.Tensor]:
        """Losses that teach encoder and connector alone; see `rlhf.bridge.alignment`. `pixel_values` [pairs, 3, height,
        width] of pictures of one tile, `captions` [pairs, length], -1 after their end; the first `pairs` count."""
        features, found = self.vision(pixel_values.to(self.dtype)), dict[str, torch.Tensor]()
        if "contrast" in objectives:
            found["contrast"] = contrast(cast(ContrastHead, self.head), features, captions, pairs)
        if wanted := [name for name in objectives if name != "contrast"]:
            found |= align(cast(Reader, self.connector.reader), features, captions, wanted, pairs)
        return found

    def get_rope_index(
        self,
        input_ids: torch.Tensor,
        **kwargs: Any,  # noqa: ARG002 - vLLM may pass more
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What vLLM asks a model with position rows: those of `input_ids` [rows, length], and by how much [rows, 1] the
        position of the token that follows differs from the length."""
        following = next_position(input_ids, self.geometry)
        return position_rows(input_ids, self.geometry), (following - input_ids.shape[1])[:, None]

    def _positions(
        self, input_ids: torch.Tensor | None, position_ids: torch.Tensor | None, decoding: bool
    ) -> torch.Tensor | None:
        """What the decoder gets for positions."""
        if self.geometry.told == "nothing":
            return position_ids
        if position_ids is None and input_ids is not None and not decoding:
            return position_rows(input_ids, self.geometry)
        if position_ids is None or position_ids.ndim != 3:
            raise ValueError(
                "this bridge's decoder is told of pictures through position rows [3, rows, length]: give those of "
                "rlhf.bridge.positions as position_ids, or whole input_ids and none"
            )
        return position_ids

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        picture_sizes: torch.Tensor | None = None,
        questions: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """`input_ids` [rows, length] are expanded; `pixel_values` [cells, 3, height, width], and `picture_sizes`
        [cells, 2] and `questions` [cells, text length] where they are needed, hold the
        pictures of all rows in order (a row may have none). `position_ids` are [rows, length], and [3, rows, length]
        for a decoder with layers of its own for pictures."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        decoding = past_key_values is not None and past_key_values.get_seq_length() > 0
        if pixel_values is not None:
            pictures = {"pixel_values": pixel_values, "picture_sizes": picture_sizes, "questions": questions}
            inputs_embeds = self._scatter(input_ids, inputs_embeds, **pictures)
        elif not decoding:
            if input_ids is not None and bool((input_ids == self.config.image_token_id).any()):
                raise ValueError(
                    "0 image features for "
                    f"{int((input_ids == self.config.image_token_id).sum())} image placeholders: pass pixel_values"
                )
            if self.training:
                inputs_embeds = self._no_picture(inputs_embeds)
        return cast(
            ModelOutput,
            self.language_model(
                attention_mask=attention_mask,
                position_ids=self._positions(input_ids, position_ids, decoding),
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **kwargs,
            ),
        )


class BridgeForConditionalGeneration(BridgePreTrainedModel, GenerationMixin):
    """The bridge with its language-model head; a dense decoder."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: BridgeConfig) -> None:
        super().__init__(config)
        self.model = BridgeModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """See `BridgeModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        picture_sizes: torch.Tensor | None = None,
        questions: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        captions: torch.Tensor | None = None,
        objectives: Sequence[str] = (),
        pairs: int = 0,
        signal_places: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Logits [rows, kept length, vocabulary]; `loss` when `labels` [rows, length] are given; `router_logits` (one
        [rows * length, experts] a layer) and the balancing `aux_loss` of a mixture-of-experts decoder when asked for,
        in which case the loss holds `router_aux_loss_coef` times it, as in transformers. With `captions`: no logits,
        but the losses of `BridgeModel.align` by name. With `signal_places` [signals, tokens], which of all input tokens
        end to end spell signals: `signals`, what the head says of them."""
        if captions is not None:
            assert pixel_values is not None
            return cast(Any, self.model.align(pixel_values, captions, objectives, pairs))
        text = self.config.text_config
        routed = is_moe(text) and (text.output_router_logits if output_router_logits is None else output_router_logits)
        if routed:
            kwargs["output_router_logits"] = True
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            picture_sizes=picture_sizes,
            questions=questions,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=text.vocab_size, **kwargs)
        balance = None
        if routed:
            balance = load_balancing_loss_func(
                out.router_logits, text.num_experts, text.num_experts_per_tok, attention_mask
            )
            loss = None if loss is None else loss + text.router_aux_loss_coef * balance
        result = MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=cast(Any, balance),
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            router_logits=out.router_logits if routed else None,
        )
        if signal_places is not None:
            assert self.model.head is not None
            assert input_ids is not None
            spelt = self.get_input_embeddings()(input_ids.flatten()[signal_places])
            result["signals"] = self.model.head(out.last_hidden_state.flatten(0, 1)[signal_places] + spelt)
        return result

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: Cache | None = None,
        is_first_iteration: bool | None = False,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Pictures go in once, with the prompt; later steps find them in the cache. Position rows are those of the row
        so far: what was sampled is text."""
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            past_key_values=past_key_values,
            is_first_iteration=is_first_iteration,
            use_cache=use_cache,
            **kwargs,
        )
        if use_cache and not is_first_iteration:
            inputs |= dict.fromkeys(PICTURES)
        if self.model.geometry.told != "nothing":
            inputs["position_ids"] = position_rows(input_ids, self.model.geometry)[..., -inputs["input_ids"].shape[1] :]
        return cast(dict[str, Any], inputs)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Repeat rows for several samples a prompt. Cells are counted over the whole batch, not one a row, so the base
        class would repeat them in the wrong order."""
        shown = {name: value for name in PICTURES if (value := kwargs.pop(name, None)) is not None}
        if shown and expand_size > 1:
            assert input_ids is not None
            found = (input_ids == self.config.image_token_id).sum(dim=1).tolist()
            counts = self._cells_of(found, shown["pixel_values"], shown.get("picture_sizes"))
            order = torch.cat(
                [
                    torch.arange(end - count, end).repeat(expand_size)
                    for count, end in zip(counts, accumulate(counts), strict=True)
                ]
            )
            shown = {name: value[order] for name, value in shown.items()}
        ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return ids, kwargs | shown

    def _cells_of(self, features: Sequence[int], pixels: torch.Tensor, sizes: torch.Tensor | None) -> list[int]:
        """How many cells belong to each row of the batch, from its number of features."""
        geometry = self.model.geometry
        if not self.model.sized:
            (grid,) = {geometry.grids(geometry.layout(*size))[0] for size in geometry.tiler.extremes}
            return [count // (grid[0] * grid[1]) for count in features]
        pictures = iter(self.model.layouts(pixels, sizes))
        counts = []
        for needed in features:
            cells = found = 0
            while found < needed:
                layout = next(pictures)
                cells, found = cells + geometry.cells(layout), found + geometry.num_features(layout)
            counts.append(cells)
        return counts


class BridgeMoeForConditionalGeneration(BridgeForConditionalGeneration):
    """The same with a mixture-of-experts decoder. A name of its own, because vLLM chooses by architecture name the
    class that builds the experts."""

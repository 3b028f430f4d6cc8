"""The bridge as a Hugging Face model: vision encoder, connector, decoder. The trainer and vLLM's Transformers backend
run this one definition."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import nn
from transformers import AutoModel, Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput, MoeCausalLMOutputWithPast
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from rlhf.bridge.config import BridgeConfig, is_moe


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


class BridgeModel(BridgePreTrainedModel):
    """Pictures and token ids -> the decoder's hidden states."""

    def __init__(self, config: BridgeConfig) -> None:
        super().__init__(config)
        self.geometry = config.geometry
        vision_width, text_width = config.vision_config.hidden_size, config.text_config.hidden_size
        self.vision = self.geometry.encoder.build(config.vision_config)
        self.connector = self.geometry.connector.build(self.geometry.patch_grid, vision_width, text_width)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return cast(nn.Module, self.language_model.get_input_embeddings())

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        num_tiles: torch.Tensor | None = None,
        return_dict: bool = True,  # noqa: ARG002 - vLLM passes it
        **kwargs: Any,  # noqa: ARG002 - transformers may pass more
    ) -> BaseModelOutputWithPooling:
        """`pixel_values` [tiles, 3, height, width] of all pictures in order -> an output whose `pooler_output` holds
        the projected features: [tiles, tokens, text width], or, when `num_tiles` [pictures] is given, a list with one
        [num_tiles * tokens, text width] for each picture. vLLM splits the tensor by itself: all tiles become equally
        many tokens."""
        dtype = next(self.vision.parameters()).dtype
        patches = self.vision(pixel_values.to(dtype))
        features = self.connector(patches)
        if num_tiles is None:
            return BaseModelOutputWithPooling(last_hidden_state=patches, pooler_output=features)
        counts = [int(count) for count in num_tiles]
        if sum(counts) != pixel_values.shape[0]:
            raise ValueError(
                f"num_tiles {counts} sums to {sum(counts)}, but pixel_values has {pixel_values.shape[0]} tiles"
            )
        pictures = [part.flatten(0, 1) for part in torch.split(features, counts)]
        return BaseModelOutputWithPooling(last_hidden_state=patches, pooler_output=cast(Any, pictures))

    def _scatter(
        self,
        input_ids: torch.Tensor | None,
        embeds: torch.Tensor,
        pixel_values: torch.Tensor,
        num_tiles: torch.Tensor | None,
    ) -> torch.Tensor:
        """`embeds` [rows, length, width] with the features of all pictures in place of the placeholders."""
        if input_ids is None:
            raise ValueError("pixel_values need input_ids: the placeholders say where the features go")
        found = self.get_image_features(pixel_values, num_tiles).pooler_output
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
        height, width = self.geometry.tiler.box
        blank = torch.zeros(1, 3, height, width, device=embeds.device)
        features = self.get_image_features(blank).pooler_output
        assert isinstance(features, torch.Tensor)
        return embeds + features.sum().to(embeds.dtype) * 0

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        num_tiles: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """`input_ids` [rows, length] are expanded; `pixel_values` [tiles, 3, height, width] hold the pictures of all
        rows in order (a row may have none); `num_tiles` [pictures] is checked when given."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        decoding = past_key_values is not None and past_key_values.get_seq_length() > 0
        if pixel_values is not None:
            inputs_embeds = self._scatter(input_ids, inputs_embeds, pixel_values, num_tiles)
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
                position_ids=position_ids,
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
        num_tiles: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Logits [rows, kept length, vocabulary]; `loss` when `labels` [rows, length] are given; `router_logits` (one
        [rows * length, experts] a layer) and the balancing `aux_loss` of a mixture-of-experts decoder when asked for,
        in which case the loss holds `router_aux_loss_coef` times it, as in transformers."""
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
            num_tiles=num_tiles,
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
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=cast(Any, balance),
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            router_logits=out.router_logits if routed else None,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: Cache | None = None,
        is_first_iteration: bool | None = False,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Pictures go in once, with the prompt; later steps find them in the cache."""
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            past_key_values=past_key_values,
            is_first_iteration=is_first_iteration,
            use_cache=use_cache,
            **kwargs,
        )
        if use_cache and not is_first_iteration:
            inputs["pixel_values"] = inputs["num_tiles"] = None
        return cast(dict[str, Any], inputs)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Repeat rows for several samples a prompt. Tiles are counted over the whole batch, not one a row, so the
        base class would repeat them in the wrong order."""
        pixels, tiles = kwargs.pop("pixel_values", None), kwargs.pop("num_tiles", None)
        if pixels is not None and expand_size > 1:
            assert input_ids is not None
            found = (input_ids == self.config.image_token_id).sum(dim=1)
            rows = torch.split(pixels, (found // self.model.geometry.tokens_per_tile).tolist())
            pixels = torch.cat([row for row in rows for _ in range(expand_size)])
            # The check by `num_tiles` is over pictures, whose number a row is not known here; the scatter still checks.
            tiles = None
        ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return ids, kwargs | {"pixel_values": pixels, "num_tiles": tiles}


class BridgeMoeForConditionalGeneration(BridgeForConditionalGeneration):
    """The same with a mixture-of-experts decoder. A name of its own, because vLLM chooses by architecture name the
    class that builds the experts."""

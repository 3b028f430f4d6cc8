"""T5 in one sequence: a prompt and its reply stand in one row, as they do for every other decoder.

The encoder reads the prompt's tokens; the decoder begins at the prompt's last one, in whose place its start token
stands, and goes on over the reply. So the state of each token foretells the next, and whoever trains, scores or samples
need not know that there are two stacks. Positions are relative in both, which is why nothing has to be moved.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import nn
from transformers import PreTrainedModel, Qwen3Config, T5Config
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.t5.modeling_t5 import T5Stack

from rlhf.bridge.decoders import PREFIX
from rlhf.bridge.decoders.t5 import EncoderDecoder


class JoinedT5Config(Qwen3Config):
    """Sizes by Qwen3's names, and those of `EncoderDecoder`."""

    model_type = PREFIX + EncoderDecoder.type
    reply: int | str = "<assistant>"
    decoder_layers: int = 0
    buckets: int = 32
    distance: int = 128
    gated: bool = True
    base_model_tp_plan: ClassVar[dict[str, str]] = {}

    def of_t5(self) -> T5Config:
        """As transformers has it; without dropout."""
        found = T5Config(
            vocab_size=self.vocab_size,
            d_model=self.hidden_size,
            d_kv=self.head_dim,
            d_ff=self.intermediate_size,
            num_layers=self.num_hidden_layers,
            num_decoder_layers=self.decoder_layers or self.num_hidden_layers,
            num_heads=self.num_attention_heads,
            relative_attention_num_buckets=self.buckets,
            relative_attention_max_distance=self.distance,
            dropout_rate=0.0,
            layer_norm_epsilon=self.rms_norm_eps,
            feed_forward_proj="gated-gelu" if self.gated else "relu",
            pad_token_id=self.pad_token_id,
            decoder_start_token_id=self.pad_token_id,
            tie_word_embeddings=self.tie_word_embeddings,
        )
        found._attn_implementation = "eager"  # its attention has a bias for positions
        return found


class JoinedT5(PreTrainedModel):
    """The two stacks."""

    config_class = JoinedT5Config
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["T5Block"]

    def __init__(self, config: JoinedT5Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.encoder, self.decoder = (self._stack(config.of_t5(), decodes) for decodes in (False, True))
        # as in T5: where the table is the head's too, states are scaled down to its values
        self.scale = config.hidden_size**-0.5 if config.tie_word_embeddings else 1.0
        self.post_init()

    def _stack(self, config: T5Config, decodes: bool) -> T5Stack:
        config.is_decoder, config.use_cache = decodes, False
        if decodes:
            config.num_layers = config.num_decoder_layers
        stack = T5Stack(config)
        stack.embed_tokens = None  # it gets embeddings
        return stack

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = cast(nn.Embedding, value)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,  # noqa: ARG002 - there is none
        **kwargs: Any,  # noqa: ARG002 - others' decoders take more
    ) -> BaseModelOutputWithPast:
        """`position_ids` are position rows [3, rows, length] (`rlhf.bridge.positions`), padded on the right. States
        before a prompt's last token foretell nothing, and are 0."""
        if past_key_values is not None and past_key_values.get_seq_length():
            raise ValueError("an encoder and a decoder in one sequence keep no keys and values: call with whole rows")
        if position_ids is None or position_ids.ndim != 3:
            raise ValueError("this decoder needs position rows, which say where the prompt ends")
        given = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        there = torch.ones(given.shape[:2], device=given.device) if attention_mask is None else attention_mask
        asked = (position_ids[1] > position_ids[0]) & (there > 0)
        places, last = torch.arange(given.shape[1], device=given.device), asked.sum(1, keepdim=True) - 1
        answering = (places >= last) & (there > 0)
        start = self.embed_tokens(torch.full((1, 1), int(self.config.pad_token_id), device=given.device))
        states = self.encoder(inputs_embeds=given, attention_mask=asked.long()).last_hidden_state
        found = self.decoder(
            inputs_embeds=torch.where((places == last)[..., None], start.to(given), given),
            attention_mask=answering.long(),
            encoder_hidden_states=states,
            encoder_attention_mask=asked.long(),
            use_cache=False,
        ).last_hidden_state
        return BaseModelOutputWithPast(last_hidden_state=found.masked_fill(~answering[..., None], 0.0) * self.scale)

"""T5 from megatron-core's parts, whole on a pipeline stage.

Parameters have the names of megatron-core's ``T5Model``, but for the output layer, which is no part of a head here.
That class is not used: it scales no tied logits, and its bias is lost to recomputed layers.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.relative_pos_embedding import RelativePositionEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import TransformerBlock

from lightning_megatron.layers.t5 import share_position_bias, t5_decoder_spec, t5_encoder_spec
from lightning_megatron.layers.vocabulary import mask_padded_vocabulary


class T5Model(LanguageModule):
    """An encoder and a decoder that share the word embedding, each with a relative position bias.

    Args:
        encoder_config: Megatron's transformer configuration of the encoder.
        config: That of the decoder.
        vocab_size: Token ids that occur.
        padded_vocab_size: Rows of the embedding.
        tie_embeddings: Whether the output layer's weight is the embedding's; the decoder's output is then scaled by one
            over the root of its width.
        buckets: Distances that the bias tells apart.
        max_distance: Distances from here on share the last bucket.
    """

    pre_process = True
    post_process = True

    def __init__(
        self,
        encoder_config: TransformerConfig,
        config: TransformerConfig,
        *,
        vocab_size: int,
        padded_vocab_size: int,
        tie_embeddings: bool,
        buckets: int,
        max_distance: int,
    ) -> None:
        super().__init__(config)
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = tie_embeddings
        self.embedding = LanguageModelEmbedding(config, padded_vocab_size, 0, position_embedding_type="none")
        heads, init = config.num_attention_heads, config.init_method
        self.encoder_relative_pos_emb = RelativePositionEmbedding(True, init, heads, buckets, max_distance)
        self.decoder_relative_pos_emb = RelativePositionEmbedding(False, init, heads, buckets, max_distance)
        self.encoder = TransformerBlock(encoder_config, t5_encoder_spec(encoder_config.num_layers))
        self.decoder = TransformerBlock(config, t5_decoder_spec(config.num_layers))
        share_position_bias(self.encoder, self.encoder_relative_pos_emb)
        share_position_bias(self.decoder, self.decoder_relative_pos_emb)
        self.output_layer = ColumnParallelLinear(
            config.hidden_size,
            padded_vocab_size,
            config=config,
            init_method=init,
            bias=False,
            skip_bias_add=False,
            gather_output=False,
            skip_weight_param_allocation=tie_embeddings,
        )
        mask_padded_vocabulary(self.output_layer, vocab_size)
        self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, _: Any) -> None:
        """Nothing comes from an earlier stage; the schedules call it."""

    def forward(
        self,
        input_ids: torch.Tensor,
        decoder_input_ids: torch.Tensor,
        encoder_mask: torch.Tensor | None,
        decoder_mask: torch.Tensor,
        cross_mask: torch.Tensor | None,
        **_: torch.Tensor,
    ) -> torch.Tensor:
        """Run the model.

        Args:
            input_ids: ``[b, se]``.
            decoder_input_ids: ``[b, sd]``.
            encoder_mask: ``[b, 1, 1 or se, se]``, True where a query may not look; None where nothing is padded.
            decoder_mask: ``[1 or b, 1, sd, sd]``, the causal part included.
            cross_mask: ``[b, 1, 1 or sd, se]``, or None.
            **_: What only the loss reads.

        Returns:
            Logits ``[b, sd, vocab/tp]``.
        """
        encoded = self.encoder(hidden_states=self.embedding(input_ids, None), attention_mask=encoder_mask)
        hidden = self.decoder(  # [sd/tp, b, h]
            hidden_states=self.embedding(decoder_input_ids, None),
            attention_mask=decoder_mask,
            context=encoded,
            context_mask=cross_mask,
        )
        weight = None
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
            hidden = hidden * self.config.hidden_size**-0.5
        return self.output_layer(hidden, weight=weight)[0].transpose(0, 1)

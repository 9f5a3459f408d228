"""T5, chunk by chunk, from megatron-core's parts.

Parameters have the names of megatron-core's ``T5Model``, but for the output layer, which is no part of a head here.
That class is not used: it scales no tied logits, its bias is lost to recomputed layers, and it has no pipeline.

Between pipeline stages travels one tensor: the encoder's hidden states, and behind them, along the sequence, the
decoder's, which are embedded on the first stage and wait until the encoder is done. A stage transforms its stack's part
and hands the other on; autograd brings the gradients of both back.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.relative_pos_embedding import RelativePositionEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import TransformerBlock

from lightning_megatron.distributed import shared_weights
from lightning_megatron.distributed.collectives import gather_vocabulary
from lightning_megatron.distributed.parameter_names import WholeModelNames
from lightning_megatron.distributed.process_groups import Stack
from lightning_megatron.distributed.sequence_shards import SequenceShards
from lightning_megatron.models.layers.attention import TorchAttention
from lightning_megatron.models.layers.attention_pattern import Mask, block_arguments, decoder_arguments
from lightning_megatron.models.layers.chunked_cross_entropy import WeightedLabels
from lightning_megatron.models.t5.config import PositionEmbedding
from lightning_megatron.models.t5.layer_spec import (
    EncoderStates,
    RelativeAttention,
    share_position_bias,
    start_queries_small,
    t5_decoder_spec,
    t5_encoder_spec,
)
from lightning_megatron.models.t5.pipeline_split import T5Stage
from lightning_megatron.models.t5.position_bias import heads_of_bias


class T5Model(WholeModelNames, LanguageModule):
    """One chunk of an encoder and a decoder that share their embedding.

    Args:
        encoder_config: Megatron's transformer configuration of the encoder.
        config: Megatron's transformer configuration of the decoder.
        stage: The layers that the chunk has.
        padded_vocab_size: Rows of the embedding.
        tie_embeddings: Whether the output layer's weight is the embedding's; the decoder's output is then scaled by one
            over the root of its width.
        positions: "relative": a bias in each stack's attention. "learned": a table of positions that both stacks share.
        max_length: Rows of that table.
        buckets: Distances that the bias tells apart.
        max_distance: Distances from here on share the last bucket.
        pre_process: Whether the chunk holds the embedding.
        post_process: Whether it holds the output layer.
        vp_stage: Number of the chunk on this pipeline stage under interleaving, else None.
        fused_layers: Whether operations between matrix products are joined.
    """

    def __init__(
        self,
        encoder_config: TransformerConfig,
        config: TransformerConfig,
        *,
        stage: T5Stage,
        padded_vocab_size: int,
        tie_embeddings: bool,
        positions: PositionEmbedding,
        max_length: int,
        buckets: int,
        max_distance: int,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
        fused_layers: bool = False,
    ) -> None:
        super().__init__(config)
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = tie_embeddings
        self.stage = stage
        self.positions = positions
        self.max_length = max_length
        self.pre_process = pre_process
        self.post_process = post_process
        self.vp_stage = vp_stage
        self._input: torch.Tensor | None = None
        kind = {"relative": "none", "learned": "learned_absolute"}[positions]
        attention: type[TorchAttention] = {"relative": RelativeAttention, "learned": TorchAttention}[positions]
        if pre_process:
            self.embedding = LanguageModelEmbedding(config, padded_vocab_size, max_length, position_embedding_type=kind)
        if stage.encoder:
            spec = t5_encoder_spec(encoder_config, attention, vp_stage, fused_layers)
            self.encoder = TransformerBlock(encoder_config, spec, post_process=stage.ends_stack, vp_stage=vp_stage)
        if stage.decoder:
            spec = t5_decoder_spec(config, attention, vp_stage, fused_layers)
            self.decoder = TransformerBlock(config, spec, post_process=stage.ends_stack, vp_stage=vp_stage)
        if positions == "relative":
            self._build_position_bias(buckets, max_distance)
        if post_process:
            self.output_layer = ColumnParallelLinear(
                config.hidden_size,
                padded_vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                skip_bias_add=False,
                gather_output=False,
                skip_weight_param_allocation=tie_embeddings and pre_process,
            )
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take the hidden states of the stage before; the schedules call it."""
        self._input = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(
        self,
        input_ids: torch.Tensor,
        decoder_input_ids: torch.Tensor,
        encoder_mask: Mask,
        decoder_mask: Mask,
        cross_mask: Mask,
        labels: torch.Tensor | WeightedLabels | None = None,
        position_ids: torch.Tensor | None = None,
        decoder_position_ids: torch.Tensor | None = None,
        **_: torch.Tensor,
    ) -> torch.Tensor:
        """Run the chunk.

        Args:
            input_ids: ``[b, se]``.
            decoder_input_ids: ``[b, sd]``.
            encoder_mask: ``[b, 1, 1 or se, se]``, True where a query may not look; or a pattern; None where nothing is
                padded.
            decoder_mask: ``[1 or b, 1, sd, sd]``, the causal part included; or a pattern; None: no token looks ahead.
            cross_mask: ``[b, 1, 1 or sd, se]``, or a pattern, or None.
            labels: ``[b, sd]``; those with weights ask for the weighted sum of their losses.
            position_ids: ``[b, se]``, of learned positions; None: the places in the row.
            decoder_position_ids: ``[b, sd]``, the same of the decoder.
            **_: Inputs that only the loss reads.

        Returns:
            Hidden states ``[(se + sd)/(tp·cp), b, h]``, or on the last stage logits ``[b, sd, vocab/tp]``, or the sum.
        """
        if self.pre_process:
            encoded = self._embed_rows(input_ids, position_ids, zigzag=False)
            hidden = self._embed_rows(decoder_input_ids, decoder_position_ids, zigzag=True)
        else:
            assert self._input is not None
            parts = 1 if not self.config.sequence_parallel else self.config.tensor_model_parallel_size
            encoded, hidden = self._input.split([ids.size(1) // parts for ids in (input_ids, decoder_input_ids)])
        if self.stage.encoder:
            encoded = self.encoder(hidden_states=encoded, **block_arguments(encoder_mask))  # [se/tp, b, h]
        if self.stage.decoder:
            masks = decoder_arguments(decoder_mask, cross_mask)
            hidden = self.decoder(hidden_states=hidden, context=encoded, **masks)  # [sd/tp, b, h]
        if not self.post_process:
            return torch.cat([encoded, hidden])
        return self._output(hidden, labels=labels) if isinstance(labels, WeightedLabels) else self._logits(hidden)

    def encode(self, input_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """This chunk's layers of the encoder alone, for generation.

        Args:
            input_ids: ``[b, se]``.
            mask: ``[b, 1, 1, se]``, True where nobody may look; None where nothing is padded.

        Returns:
            Hidden states ``[se, b, h]``.
        """
        hidden = self._embed(input_ids) if self.pre_process else self._input
        return self.encoder(hidden_states=hidden, attention_mask=mask)

    def decode(
        self, tokens: torch.Tensor, encoded: EncoderStates, mask: torch.Tensor | None, cache: StaticInferenceContext
    ) -> torch.Tensor:
        """The embedding, this chunk's layers of the decoder and the output layer, as far as it has them.

        Args:
            tokens: ``[b, 1]``, the ones behind those in the cache.
            encoded: The encoder's output.
            mask: ``[b, 1, 1, se]``, True where nobody may look; None where nothing is padded.
            cache: The decoder's keys and values so far.

        Returns:
            Hidden states ``[1, b, h]``, or on the last stage logits ``[b, 1, vocab]``.
        """
        hidden = self._embed(tokens, cache.sequence_len_offset) if self.pre_process else self._input
        assert hidden is not None
        if self.stage.decoder:
            bias = None
            if self.positions == "relative":
                new = tokens.size(1)
                bias = heads_of_bias(self.decoder_relative_pos_emb, new, cache.sequence_len_offset + new)
            hidden = self.decoder(
                hidden_states=hidden,
                attention_mask=None,
                attention_bias=bias,
                context=encoded,
                context_mask=mask,
                inference_context=cache,
            )
        return gather_vocabulary(self._logits(hidden)) if self.post_process else hidden

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """megatron-core's description of the tensors; of a position bias the stack's first stage has the original."""
        found = super().sharded_state_dict(*args, **kwargs)
        for name, entry in found.items():
            if "relative_pos_emb" in name and self.stage.copy is not None:
                entry.replica_id = (self.stage.copy, *entry.replica_id[1:])
        return found

    def start_queries_small(self) -> None:
        """Scale the first weights of queries whose scores are not scaled: those with a position bias."""
        if self.positions == "relative":
            for block in (getattr(self, "encoder", None), getattr(self, "decoder", None)):
                if block is not None:
                    start_queries_small(block)

    def _build_position_bias(self, buckets: int, max_distance: int) -> None:
        """Make a table of position biases for each stack that has layers here."""
        init, heads = self.config.init_method, self.config.num_attention_heads
        if self.stage.encoder:
            self.encoder_relative_pos_emb = RelativePositionEmbedding(True, init, heads, buckets, max_distance)
            self._share_position_bias("encoder", self.encoder, self.encoder_relative_pos_emb)
        if self.stage.decoder:
            self.decoder_relative_pos_emb = RelativePositionEmbedding(False, init, heads, buckets, max_distance)
            self._share_position_bias("decoder", self.decoder, self.decoder_relative_pos_emb)

    def _share_position_bias(self, stack: Stack, block: TransformerBlock, bias: RelativePositionEmbedding) -> None:
        share_position_bias(block, bias)
        if self.stage.copy is not None:
            shared_weights.mark_shared(bias.relative_attention_bias.weight, stack, self.stage.copy)

    def _embed_rows(self, ids: torch.Tensor, positions: torch.Tensor | None, *, zigzag: bool) -> torch.Tensor:
        """``[s/(tp·cp), b, h]`` of ``[b, s/cp]``, this rank's part of each row under context parallelism."""
        if positions is not None:
            return self._embed_at(ids, positions)
        parts = self.config.context_parallel_size
        places = torch.arange(ids.size(1) * parts, device=ids.device)
        return self._embed_at(ids, places if parts == 1 else SequenceShards.here(zigzag=zigzag).take(places, 0))

    def _embed(self, ids: torch.Tensor, first: int = 0) -> torch.Tensor:
        """``[s/tp, b, h]`` of ``[b, s]``, whose first token is at ``first``."""
        return self._embed_at(ids, torch.arange(first, first + ids.size(1), device=ids.device))

    def _embed_at(self, ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """The embedding of ``ids`` at ``places``; what is padded may lie beyond the last learned position."""
        return self.embedding(ids, places.clamp(max=self.max_length - 1).expand_as(ids))

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[b, sd, vocab/tp]`` of ``[sd/tp, b, h]``."""
        return self._output(hidden).transpose(0, 1)

    def _output(self, hidden: torch.Tensor, **labels: WeightedLabels) -> torch.Tensor:
        weight = None
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
            hidden = hidden * self.config.hidden_size**-0.5
        return self.output_layer(hidden, weight=weight, **labels)[0]

"""megatron-core's GPT: positions and patterns of attention come from the batch, and losses without the logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import ModuleSpec

from lightning_megatron.distributed import process_groups, shared_weights
from lightning_megatron.distributed.parameter_names import WholeModelNames
from lightning_megatron.models.gpt.multi_token_prediction import LaterTokenLayers, LaterTokens, loss_of_depths
from lightning_megatron.models.layers.attention_pattern import AttentionPattern, block_arguments
from lightning_megatron.models.layers.chunked_cross_entropy import WeightedLabels
from lightning_megatron.models.layers.fused.rotary import cosines_and_sines
from lightning_megatron.models.layers.window_rotary import angles_of


class PositionedGPT(WholeModelNames, GPTModel):
    """megatron-core's model, which rotates by a token's place in its row, whatever its ``position_ids`` say.

    Here ``position_ids`` ``[b, s]`` count for rotary positions as for learned ones, and None is the place in the row,
    for which all rows share one table. An ``attention_mask`` is a tensor or an ``AttentionPattern``. ``labels``
    ``[b, s]`` give the losses ``[b, s]``; those with weights give the weighted sum.

    With ``rotates_by_table``, the layers' ``rotary_pos_emb`` is a table of cosines and sines; see ``FusedRotation``.
    """

    rotates_by_table = False
    weight_of_later_tokens = 0.0
    _token_weights: torch.Tensor | None = None
    _later_tokens: LaterTokens | None = None

    mtp_block: LaterTokenLayers  # on the last stage, where later tokens are predicted

    @property
    def transformer_layers(self) -> list[Any]:
        """The transformer layers of the chunk, those of multi-token prediction among them."""
        later = self.mtp_block.layers if hasattr(self, "mtp_block") else ()
        return [*self.decoder.layers, *(layer.transformer_layer for layer in later)]

    def predict_later_tokens(self, layer: ModuleSpec, depths: int, weight: float) -> None:
        """Add the layers of multi-token prediction and the embedding for their tokens; all chunks call this.

        On the last stage the embedding is a copy of the first stage's. An output layer that is tied to the embedding
        has the copy.

        Args:
            layer: The spec of the transformer layer in each.
            depths: How many there are.
            weight: Weight of their losses.
        """
        self.weight_of_later_tokens = weight
        if self.post_process:
            self.mtp_block = LaterTokenLayers(self.config, layer, depths, self.vp_stage)
        if self.pre_process == self.post_process:  # one stage, or one between the ends
            return
        if self.post_process:
            self.embedding = LanguageModelEmbedding(
                self.config, self.vocab_size, self.max_sequence_length, self.position_embedding_type,
                tp_group=self.pg_collection.tp,
            )  # fmt: skip
        if not self.share_embeddings_and_output_weights:
            weight_of_ids = self.embedding.word_embeddings.weight
            shared_weights.mark_shared(weight_of_ids, "ends", number=int(self.post_process))
        elif self.post_process:
            self.embedding.word_embeddings.weight = self.output_layer.weight

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Describe the chunk to checkpoints, as megatron-core does; a second embedding is a copy of the first one."""
        found: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        name = f"{prefix}embedding.word_embeddings.weight"
        if name in found and not self.pre_process:
            found[name] = replace(found[name], replica_id=(1, *found[name].replica_id[1:]))
        return found

    def forward(
        self,
        input_ids: Any,
        position_ids: torch.Tensor | None,
        attention_mask: AttentionPattern | torch.Tensor | None,
        token_weights: torch.Tensor | None = None,
        later_tokens: LaterTokens | None = None,
        **rest: Any,
    ) -> Any:
        """Run the chunk, as megatron-core's ``GPTModel`` does; experts are told ``token_weights`` ``[b, s]``."""
        self._token_weights, self._later_tokens = token_weights, later_tokens
        return super().forward(input_ids, position_ids, **block_arguments(attention_mask), **rest)

    def _preprocess(self, input_ids: Any, position_ids: torch.Tensor | None, **rest: Any) -> Any:
        prepared = super()._preprocess(input_ids=input_ids, position_ids=position_ids, **rest)
        if self._token_weights is not None:  # megatron-core hands them on to the layers as its mask of padding
            prepared = (*prepared[:5], self._of_this_rank(self._token_weights), *prepared[6:])
        angles = prepared[1]
        if angles is None or rest.get("inference_context") is not None:
            return prepared  # a text that is written counts its own tokens, and the cache its places
        if position_ids is not None:
            angles = angles_of(self.rotary_pos_emb, position_ids)
        if self.rotates_by_table:
            angles = cosines_and_sines(angles, self.config.rotary_interleaved, self.config.params_dtype)
        return (prepared[0], angles, *prepared[2:])

    def _postprocess(self, hidden_states: torch.Tensor, labels: Any = None, **rest: Any) -> torch.Tensor:
        if not self.post_process:
            return hidden_states
        if labels is None:
            return super()._postprocess(hidden_states, labels=None, **rest)
        losses = self._losses(hidden_states, labels)
        if self._later_tokens is None:
            return losses
        later = self.weight_of_later_tokens * self._loss_of_later_tokens(hidden_states, self._later_tokens, rest)
        later = later - later.detach()  # has a gradient, and no value: what is logged is the loss of the next tokens
        if losses.dim():  # an own loss sums them up, and has the later ones in its mean
            later = later / (labels.numel() if rest.get("loss_mask") is None else rest["loss_mask"].sum().clamp(min=1))
        return losses + later

    def _losses(self, hidden: torch.Tensor, labels: torch.Tensor | WeightedLabels) -> torch.Tensor:
        """The losses ``[b, s]`` of labels, or the weighted sum."""
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        if getattr(self.output_layer, "gives_losses", False):
            return self.output_layer(hidden, weight=weight, labels=labels)[0]
        # Losses are of shards of the vocabulary, whatever predictions are.
        logits, _ = self.output_layer(hidden, weight=weight, runtime_gather_output=False)
        if isinstance(labels, WeightedLabels):
            return (self.compute_language_model_loss(labels.ids, logits).float() * labels.weights).sum()
        return self.compute_language_model_loss(labels, logits)

    def _loss_of_later_tokens(self, hidden: torch.Tensor, later: LaterTokens, rest: dict[str, Any]) -> torch.Tensor:
        names = ("attention_mask", "rotary_pos_emb", "rotary_pos_cos", "rotary_pos_sin", "packed_seq_params")
        attention = {name: rest[name] for name in names}
        if self._token_weights is not None:
            attention["padding_mask"] = self._of_this_rank(self._token_weights)
        return loss_of_depths(self.mtp_block.layers, hidden, later, self._embedded, self._losses, **attention)

    def _embedded(self, ids: torch.Tensor) -> torch.Tensor:
        """``[s/tp, b, h]`` of ``[b, s]``, by an embedding that knows no positions."""
        embedded: torch.Tensor = self.embedding(input_ids=ids, position_ids=None)
        return embedded

    def _of_this_rank(self, weights: torch.Tensor) -> torch.Tensor:
        """``[b, s/tp]`` of ``[b, s]``, as sequence parallelism divides the hidden states."""
        if not self.config.sequence_parallel:
            return weights
        group = process_groups.tensor_parallel()
        return weights.chunk(group.size(), dim=1)[group.rank()]

"""BERT, chunk by chunk, from megatron-core's parts; a class for each kind of head.

Parameters have the names of megatron-core's ``BertModel``. That class is not used: its head refuses sequence
parallelism, its mask leaves padded queries with nothing to attend to, and it takes no positions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from megatron.core.models.bert.pooler import Pooler
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.utils import get_linear_layer

from lightning_megatron.distributed import process_groups
from lightning_megatron.distributed.collectives import sum_with_gradients
from lightning_megatron.distributed.parameter_names import WholeModelNames
from lightning_megatron.distributed.sequence_shards import SequenceShards
from lightning_megatron.models.bert.config import BertConfig, BertTaskName
from lightning_megatron.models.bert.layer_spec import bert_block_spec, bert_embedding
from lightning_megatron.models.heads.layers import label_layer, whole_sequence
from lightning_megatron.models.heads.question_answering import AnswerLogits
from lightning_megatron.models.layers.attention_pattern import AttentionPattern, block_arguments
from lightning_megatron.models.layers.chunked_cross_entropy import WeightedLabels
from lightning_megatron.models.layers.fused.rotary import can_rotate, cosines_and_sines
from lightning_megatron.models.layers.norm import TorchNorm
from lightning_megatron.models.layers.window_rotary import angles_of


class BertPretrainingLogits(NamedTuple):
    """What the two heads of pre-training give.

    Args:
        prediction_logits: ``[b, s, vocab]``, of each token; or the sum of their losses.
        seq_relationship_logits: ``[b, 2]``, of each pair of sentences; class 1 is "random" or "swapped".
    """

    prediction_logits: torch.Tensor
    seq_relationship_logits: torch.Tensor


class BertModel(WholeModelNames, LanguageModule):
    """One chunk of an encoder: the embedding, layers, and on the last stage a subclass's head.

    Args:
        config: Megatron's transformer configuration.
        shape: The model's shape: its embeddings, where its norms are, and its head.
        padded_vocab_size: Rows of the embedding.
        pre_process: Whether the chunk holds the embedding.
        post_process: Whether it holds the head.
        vp_stage: Number of the chunk on this pipeline stage under interleaving, else None.
        fused_layers: Whether operations between matrix products are joined.
    """

    share_embeddings_and_output_weights = False
    sharded_state_dict = MegatronModule.sharded_state_dict  # a language module's own wants an output layer

    def __init__(
        self,
        config: TransformerConfig,
        shape: BertConfig,
        *,
        padded_vocab_size: int,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
        fused_layers: bool = False,
    ) -> None:
        super().__init__(config)
        self.shape, self.padded_vocab_size = shape, padded_vocab_size
        self.pre_process = pre_process
        self.post_process = post_process
        self.vp_stage = vp_stage
        self.model_type = ModelType.encoder_or_decoder
        rotates = shape.position_embedding == "rope"
        self.rotates_by_table = rotates and fused_layers and can_rotate(config)
        if rotates:
            self.rotary_pos_emb = RotaryEmbedding(
                config.kv_channels,
                1.0,
                rotary_base=shape.rotary_base,
                use_cpu_initialization=config.use_cpu_initialization,
                cp_group=process_groups.context_parallel(),
            )
        if pre_process:
            self.embedding = bert_embedding(shape.norm_placement)(
                config,
                padded_vocab_size,
                shape.positions,
                position_embedding_type="rope" if rotates else "learned_absolute",
                num_tokentypes=shape.num_token_types,
            )
        self.encoder = TransformerBlock(
            config,
            bert_block_spec(config, shape.norm_placement, vp_stage, fused_layers, self.rotates_by_table),
            post_layer_norm=shape.norm_placement != "post",
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        if post_process:
            self.build_head()
        if self.share_embeddings_and_output_weights and (pre_process or post_process):
            self.setup_embeddings_and_output_layer()

    def build_head(self) -> None:
        """Make the layers that ``head`` uses."""
        raise NotImplementedError

    def pool(self, hidden: torch.Tensor, mask: AttentionPattern | torch.Tensor | None) -> torch.Tensor:
        """What ``head`` reads of the encoder's hidden states ``[s/tp, b, h]``: all of them."""
        return hidden

    def head(self, hidden: torch.Tensor, **labels: WeightedLabels) -> Any:
        """Logits, batch first, from what ``pool`` gives; or the sum of ``labels``' losses."""
        raise NotImplementedError

    @property
    def transformer_layers(self) -> list[Any]:
        """The transformer layers of the chunk."""
        return list(self.encoder.layers)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take the hidden states of the stage before; the schedules call it."""
        self.encoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: AttentionPattern | torch.Tensor | None,
        token_type_ids: torch.Tensor,
        position_ids: torch.Tensor,
        labels: torch.Tensor | WeightedLabels | None = None,
        **_: torch.Tensor,
    ) -> Any:
        """Run the chunk.

        Args:
            input_ids: ``[b, s]``.
            attention_mask: ``[b, 1, 1, s]``, True where nobody may look; a pattern where texts share rows; None where
                nothing is padded.
            token_type_ids: ``[b, s]``.
            position_ids: ``[b, s]``; or ``[1, s]`` where all rows have the same.
            labels: Those of tokens with weights, ``[b, s]``, ask for the weighted sum of their losses.
            **_: Inputs that only the loss reads.

        Returns:
            Hidden states ``[s/tp, b, h]``, or on the last stage the head's logits.
        """
        types = token_type_ids if self.shape.num_token_types else None
        hidden = self.embedding(input_ids, position_ids, types) if self.pre_process else None
        rotation = self._rotation(position_ids)
        hidden = self.encoder(hidden_states=hidden, rotary_pos_emb=rotation, **block_arguments(attention_mask))
        if not self.post_process:
            return hidden
        hidden = self.pool(hidden, attention_mask)
        return self.head(hidden, labels=labels) if isinstance(labels, WeightedLabels) else self.head(hidden)

    def _rotation(self, positions: torch.Tensor) -> torch.Tensor | None:
        """By what queries and keys rotate: angles ``[s, b or 1, 1, head]``, or of fused layers a table of them."""
        if self.shape.position_embedding != "rope":
            return None
        angles = angles_of(self.rotary_pos_emb, positions)
        if not self.rotates_by_table:
            return angles
        return cosines_and_sines(angles, self.config.rotary_interleaved, self.config.params_dtype)

    def pooler_layer(self) -> Pooler:
        """The dense layer and tanh over the first token."""
        config = self.config
        return Pooler(config.hidden_size, config.init_method, config, config.sequence_parallel)


class Transform(torch.nn.Module):
    """Dense, activation and norm before the last layer of a head.

    Args:
        config: Megatron's transformer configuration.
        has_bias: Whether the dense layer has one.
        of_parts: Whether each rank transforms its part of the sequence, under sequence parallelism; else all do alike.
    """

    def __init__(self, config: TransformerConfig, has_bias: bool, of_parts: bool = True) -> None:
        super().__init__()
        width = config.hidden_size
        self.dense = get_linear_layer(width, width, config.init_method, config.perform_initialization)
        if not has_bias:
            self.dense.register_parameter("bias", None)
        self.activation = config.activation_func
        self.layer_norm = TorchNorm(config, width, config.layernorm_epsilon)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel and of_parts  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., h]`` to the same shape."""
        return self.layer_norm(self.activation(self.dense(hidden)))


class BertForMaskedLM(BertModel):
    """Logits ``[b, s, vocab/tp]`` of each token; the output layer's weight is the embedding's."""

    share_embeddings_and_output_weights = True
    sharded_state_dict = LanguageModule.sharded_state_dict

    def build_head(self) -> None:
        """Make the transform and the vocabulary-parallel output layer."""
        config = self.config
        self.lm_head = Transform(config, self.shape.bias)
        self.output_layer = ColumnParallelLinear(
            config.hidden_size,
            self.padded_vocab_size,
            config=config,
            init_method=config.init_method,
            bias=True,
            skip_bias_add=False,
            gather_output=False,
            skip_weight_param_allocation=self.pre_process,
        )

    def head(self, hidden: torch.Tensor, **labels: WeightedLabels) -> torch.Tensor:
        """Logits ``[b, s, vocab/tp]`` over this rank's shard of the vocabulary; or the sum of ``labels``' losses."""
        weight = self.shared_embedding_or_output_weight()
        output: torch.Tensor = self.output_layer(self.lm_head(hidden), weight=weight, **labels)[0]
        return output if labels else output.transpose(0, 1)


class BertForPretraining(BertForMaskedLM):
    """As ``BertForMaskedLM``, and a binary head over the first token."""

    def build_head(self) -> None:
        """Make the output layer of tokens and the binary head."""
        super().build_head()
        self.pooler = self.pooler_layer()
        self.binary_head = label_layer(self.config, 2)

    def head(self, hidden: torch.Tensor, **labels: WeightedLabels) -> BertPretrainingLogits:  # type: ignore[override]
        """Logits of both heads; or the sum of ``labels``' losses, and the binary head's logits."""
        return BertPretrainingLogits(super().head(hidden, **labels), self.binary_head(self.pooler(hidden)))


class BertForSequenceClassification(BertModel):
    """Logits ``[b, num_labels]`` from the first token, or from the mean of all."""

    def build_head(self) -> None:
        """Make what is before the classifier, and the classifier."""
        if self.shape.classifier_head == "transform":
            self.transform = Transform(self.config, self.shape.bias, of_parts=False)
        else:
            self.pooler = self.pooler_layer()
        self.classification_dropout = torch.nn.Dropout(self.config.hidden_dropout)
        self.classification_head = label_layer(self.config, self.shape.num_labels)

    def pool(self, hidden: torch.Tensor, mask: AttentionPattern | torch.Tensor | None) -> torch.Tensor:
        """``[b, h]``, the same on every tensor-parallel rank."""
        if self.shape.classifier_head == "transform":
            whole = whole_sequence(self.config, hidden)
            return self.transform(mean_of_tokens(whole, mask) if self.shape.classifier_pooling == "mean" else whole[0])
        if self.shape.pooler_dropout:  # of each rank's first token, of which the pooler takes the first rank's
            hidden = self.classification_dropout(hidden[:1])
        return self.pooler(hidden)

    def head(self, hidden: torch.Tensor, **_: WeightedLabels) -> torch.Tensor:
        """Logits of ``[b, h]``, the same on every tensor-parallel rank."""
        return self.classification_head(self.classification_dropout(hidden))


def mean_of_tokens(hidden: torch.Tensor, mask: AttentionPattern | torch.Tensor | None) -> torch.Tensor:
    """The mean of the tokens of each row that are looked at, ``[b, h]``, over all context-parallel ranks.

    Args:
        hidden: This rank's tokens ``[s/cp, b, h]``.
        mask: Who looks at whom in whole rows, as ``BertModel.forward`` has it; each row is one text.
    """
    shards = SequenceShards.here(zigzag=False)
    kept = torch.ones(hidden.size(1), hidden.size(0) * shards.size, dtype=torch.bool, device=hidden.device)
    if isinstance(mask, AttentionPattern):
        if mask.keep is not None:
            kept = kept & mask.keep
        if mask.documents is not None:  # behind the text there may be padding, a document of its own
            kept = kept & (mask.documents == mask.documents[:, :1])
    elif mask is not None:
        kept = kept & ~mask[:, 0, 0]
    own = (hidden * shards.take(kept, 1).t()[:, :, None]).sum(dim=0)
    total = sum_with_gradients(own, process_groups.context_parallel()) if shards.size > 1 else own
    return total / kept.sum(dim=1, keepdim=True)


class BertForTokenClassification(BertModel):
    """Logits ``[b, s, num_labels]`` of each token."""

    def build_head(self) -> None:
        """Make the classifier, and a transform before it."""
        if self.shape.classifier_head == "transform":
            self.transform = Transform(self.config, self.shape.bias)
        self.classification_dropout = torch.nn.Dropout(self.config.hidden_dropout)
        self.classification_head = label_layer(self.config, self.shape.num_labels)

    def head(self, hidden: torch.Tensor, **_: WeightedLabels) -> torch.Tensor:
        """Logits, the same on every tensor-parallel rank."""
        whole = whole_sequence(self.config, self.transform(hidden) if hasattr(self, "transform") else hidden)
        return self.classification_head(self.classification_dropout(whole)).transpose(0, 1)


class BertForQuestionAnswering(BertModel):
    """Logits ``[b, s]`` of each token as an answer's first one, and as its last one."""

    def build_head(self) -> None:
        """Make the linear layer, and with a transform before it ModernBERT's."""
        if self.shape.classifier_head == "transform":
            self.transform = Transform(self.config, self.shape.bias)
            self.classification_dropout = torch.nn.Dropout(self.config.hidden_dropout)
        self.qa_outputs = label_layer(self.config, self.shape.num_labels)

    def head(self, hidden: torch.Tensor, **_: WeightedLabels) -> AnswerLogits:
        """Logits, the same on every tensor-parallel rank."""
        if self.shape.classifier_head == "transform":
            hidden = self.classification_dropout(self.transform(hidden))
        return AnswerLogits.of(self.qa_outputs(whole_sequence(self.config, hidden)))


MODELS: dict[BertTaskName, type[BertModel]] = {
    "masked_lm": BertForMaskedLM,
    "pretraining": BertForPretraining,
    "sequence_classification": BertForSequenceClassification,
    "token_classification": BertForTokenClassification,
    "question_answering": BertForQuestionAnswering,
}

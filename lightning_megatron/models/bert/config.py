"""``BertConfig``: the shape of a BERT and what it is trained for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lightning_megatron.checkpoint.plain_classes import formerly_in, plain_class
from lightning_megatron.distributed.argument_names import answer_wrong_names
from lightning_megatron.distributed.arguments import Arguments
from lightning_megatron.distributed.layout import ParallelLayout
from lightning_megatron.models.heads import settings as heads
from lightning_megatron.models.heads.settings import ProblemType
from lightning_megatron.models.model_config import ModelConfig

BertTaskName = Literal[
    "masked_lm", "pretraining", "sequence_classification", "token_classification", "question_answering"
]
NormPlacement = Literal["post", "pre"]

_TASKS = ("masked_lm", "pretraining", "sequence_classification", "token_classification", "question_answering")


@answer_wrong_names
@plain_class
@formerly_in("lightning_megatron.modules.bert_config")
@dataclass(kw_only=True)
class BertConfig(ModelConfig):
    """The shape of a BERT and what it is trained for.

    Args:
        num_layers: Transformer layers.
        hidden_size: Width of the hidden states.
        num_attention_heads: Attention heads.
        vocab_size: Token ids that occur; the embedding is padded to a multiple of
            ``make_vocab_size_divisible_by · tp``. None: the data module's.
        seq_length: Longest sequence, in tokens. None: the data module's.
        task: "masked_lm"; "pretraining": masked language modelling and the binary head (next sentence or sentence
            order); "sequence_classification", regression included; "token_classification"; or "question_answering":
            at which tokens of a row the answer begins and ends.
        num_labels: Outputs of a classification head; question answering has two, the begin and the end.
        problem_type: Loss of sequence classification, by transformers' names. None: "regression" for one label, else
            "single_label_classification" for integer labels and "multi_label_classification" for floating ones.
        norm_placement: "post": after each residual sum, as in the BERT that was published and in transformers'. "pre":
            before each block, as in Megatron's and transformers' ``MegatronBert``.
        num_token_types: Values of ``token_type_ids``.
        position_padding_id: The token of padding, where positions are counted from one beyond it and over other tokens
            only, as in RoBERTa. None: they are counted from 0, over all tokens.
        pooler_dropout: Whether sequence classification has dropout before the pooler too, as in RoBERTa.
        ffn_hidden_size: Width of the feed-forward layer. None: four times ``hidden_size``.
        kv_channels: Size of a head. None: ``hidden_size / num_attention_heads``.
        layernorm_epsilon: Added to the variance.
        activation: Activation of the feed-forward layer and of the head.
        hidden_dropout: Dropout after the embedding, attention and feed-forward, and before a classification head.
        attention_dropout: Dropout of attention weights.
        init_method_std: Standard deviation of the initial weights.
        make_vocab_size_divisible_by: Unit of the padded vocabulary, see ``vocab_size``.
        layers: "torch"; Transformer Engine's are not built for BERT.
        extra: Further fields of megatron-core's ``TransformerConfig``, by its names; they win over what is above.

    Raises:
        LayoutError: Sizes that fit no layout, such as heads that do not divide ``hidden_size``.
        ValueError: An unknown choice or key of ``extra``; a number that is out of range.
    """

    kind: ClassVar[str] = "Bert"
    stack_names: ClassVar[tuple[str, ...]] = ("encoder",)
    rare: ClassVar[tuple[str, ...]] = ("position_padding_id", "pooler_dropout")

    task: BertTaskName = "masked_lm"
    num_labels: int = 2
    problem_type: ProblemType | None = None
    norm_placement: NormPlacement = "post"
    num_token_types: int = 2
    position_padding_id: int | None = None
    pooler_dropout: bool = False
    layernorm_epsilon: float = 1e-12

    def __post_init__(self) -> None:
        """Refuse choices that do not exist."""
        self._one_of("task", self.task, _TASKS)
        self._one_of("norm_placement", self.norm_placement, ("post", "pre"))
        heads.check(self)
        arguments = Arguments("BertConfig")
        arguments.whole(num_token_types=self.num_token_types)
        arguments.whole(0, optional=True, position_padding_id=self.position_padding_id)
        arguments.flag(pooler_dropout=self.pooler_dropout)
        if self.layers != "torch":
            raise ValueError(f"BertConfig(layers={self.layers!r}): BERT has PyTorch's layers only. Use layers='torch'.")
        if "gated_linear_unit" in self.extra or self.activation in ("swiglu", "geglu"):
            raise ValueError(
                f"BertConfig(activation={self.activation!r}): BERT's head uses the activation too, and cannot gate it."
                " Use 'gelu'."
            )
        super().__post_init__()

    @property
    def final_norms(self) -> int:  # type: ignore[override]
        """None behind post-LayerNorm layers."""
        return int(self.norm_placement == "pre")

    @property
    def outputs_are_sharded(self) -> bool:  # type: ignore[override]
        """Whether there are logits of the vocabulary."""
        return self.task in ("masked_lm", "pretraining")

    @property
    def share_of_counted_tokens(self) -> float:  # type: ignore[override]
        """About one token in seven is masked; of a sequence's class, one token counts."""
        if self.task == "sequence_classification":
            return 1 / self.seq_length
        return 0.15 if self.outputs_are_sharded else 1.0

    def outputs(self, padded_vocab_size: int) -> int:
        """The width of the output layer: the vocabulary, or the labels."""
        return padded_vocab_size if self.outputs_are_sharded else self.num_labels

    @property
    def positions(self) -> int:
        """Rows of the position embedding."""
        return self.seq_length + (0 if self.position_padding_id is None else self.position_padding_id + 1)

    def embedding_parameters(self, layout: ParallelLayout) -> int:
        """The embeddings of tokens, positions and token types, and a norm behind them in post-LayerNorm models."""
        tables = (self.positions + self.num_token_types) * self.hidden_size
        return super().embedding_parameters(layout) + tables + (2 * self.hidden_size if not self.final_norms else 0)

    def head_parameters(self, layout: ParallelLayout, embeds: bool) -> int:
        """The transform and the output layer's biases; a pooler; labels."""
        dense = self.hidden_size * (self.hidden_size + 1)
        if not self.outputs_are_sharded:
            pooler = dense if self.task == "sequence_classification" else 0
            return pooler + self.num_labels * (self.hidden_size + 1)
        biases = layout.padded_vocab_size(self.vocab_size, self.make_vocab_size_divisible_by) // layout.tp
        binary = dense + 2 * (self.hidden_size + 1) if self.task == "pretraining" else 0
        return super().head_parameters(layout, embeds) + dense + 2 * self.hidden_size + biases + binary

    def head_activations(self, hidden: float) -> float:
        """The inputs of the transform's activation and norm, and of the output layer."""
        return 3 * hidden if self.outputs_are_sharded else 0.0

    @property
    def peft_task(self) -> str:
        """peft's ``task_type`` of an adapter of the model."""
        return heads.PEFT_TASKS.get(self.task, super().peft_task)

    def family_arguments(self) -> dict[str, Any]:
        """LayerNorm, and biases everywhere."""
        return {"normalization": "LayerNorm", "add_bias_linear": True, "add_qkv_bias": True}

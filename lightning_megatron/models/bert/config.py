"""``BertConfig``: the shape of a BERT and what it is trained for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from lightning_megatron.checkpoint.plain_classes import formerly_in, plain_class
from lightning_megatron.distributed.argument_names import answer_wrong_names
from lightning_megatron.distributed.arguments import Arguments
from lightning_megatron.distributed.layout import ParallelLayout
from lightning_megatron.models import attention_windows, parameter_counts
from lightning_megatron.models.heads import settings as heads
from lightning_megatron.models.heads.settings import ProblemType
from lightning_megatron.models.model_config import ROPE_TYPES, LayerStack, ModelConfig

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

    from lightning_megatron.models.build_settings import BuildSettings

BertTaskName = Literal[
    "masked_lm", "pretraining", "sequence_classification", "token_classification", "question_answering"
]
NormPlacement = Literal["post", "pre", "embedding_pre"]

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
            before each block, as in Megatron's and transformers' ``MegatronBert``. "embedding_pre": the same, with the
            norm before the first attention on the embedding instead, as in ModernBERT.
        num_token_types: Values of ``token_type_ids``. 0: no token has a type.
        position_embedding: Learned absolute positions, or rotary ones.
        rotary_base: Base period of the rotary frequencies.
        window_rotary_base: Base period in the layers that have a window, whose frequencies are not stretched. None:
            those layers are as all others.
        rope_scaling: How the rotary frequencies are stretched for long sequences, see ``GPTConfig``.
        sliding_window: How many tokens away a token looks, before it and behind it. None: at all tokens.
        sliding_window_layers: Numbers, from 0, of the layers that have the window. None: all.
        bias: Whether the layers' linear layers have biases, and the first one of a head that has a norm.
        norm_bias: Whether norms have biases.
        classifier_head: What a classifier reads: "pooler": a dense layer and tanh over the first token, of sequences,
            and tokens as they are. "transform": the dense layer, activation and norm that masked language modelling
            has, as in ModernBERT.
        classifier_pooling: "cls": a sequence's transform is of its first token. "mean": of the mean of its tokens.
        position_padding_id: The token of padding, where positions are counted from one beyond it and over other tokens
            only, as in RoBERTa. None: they are counted from 0, over all tokens.
        pooler_dropout: Whether sequence classification has dropout before the pooler too, as in RoBERTa.
        ffn_hidden_size: Width of the feed-forward layer. None: four times ``hidden_size``.
        kv_channels: Size of a head. None: ``hidden_size / num_attention_heads``.
        layernorm_epsilon: Added to the variance.
        activation: Activation of the feed-forward layer and of the head, in which it has no gate.
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
    rare: ClassVar[tuple[str, ...]] = (
        "position_padding_id", "pooler_dropout", "position_embedding", "rotary_base", "window_rotary_base",
        "rope_scaling", "sliding_window", "sliding_window_layers", "bias", "norm_bias", "classifier_head",
        "classifier_pooling",
    )  # fmt: skip

    task: BertTaskName = "masked_lm"
    num_labels: int = 2
    problem_type: ProblemType | None = None
    norm_placement: NormPlacement = "post"
    num_token_types: int = 2
    position_embedding: Literal["learned", "rope"] = "learned"
    rotary_base: float = 10000
    window_rotary_base: float | None = None
    rope_scaling: dict[str, Any] | None = None
    sliding_window: int | None = None
    sliding_window_layers: list[int] | None = None
    bias: bool = True
    norm_bias: bool = True
    classifier_head: Literal["pooler", "transform"] = "pooler"
    classifier_pooling: Literal["cls", "mean"] = "cls"
    position_padding_id: int | None = None
    pooler_dropout: bool = False
    layernorm_epsilon: float = 1e-12

    def __post_init__(self) -> None:
        """Refuse choices that do not exist."""
        self._one_of("task", self.task, _TASKS)
        self._one_of("norm_placement", self.norm_placement, get_args(NormPlacement))
        self._one_of("position_embedding", self.position_embedding, ("learned", "rope"))
        self._one_of("classifier_head", self.classifier_head, ("pooler", "transform"))
        self._one_of("classifier_pooling", self.classifier_pooling, ("cls", "mean"))
        heads.check(self)
        arguments = Arguments("BertConfig")
        arguments.whole(0, num_token_types=self.num_token_types)
        arguments.whole(0, optional=True, position_padding_id=self.position_padding_id)
        arguments.whole(optional=True, sliding_window=self.sliding_window)
        arguments.number(above=0, rotary_base=self.rotary_base)
        arguments.number(above=0, optional=True, window_rotary_base=self.window_rotary_base)
        arguments.kind(dict, "a dictionary with rope_type, factor, ...", optional=True, rope_scaling=self.rope_scaling)
        arguments.flag(pooler_dropout=self.pooler_dropout, bias=self.bias, norm_bias=self.norm_bias)
        if self.layers != "torch":
            raise ValueError(f"BertConfig(layers={self.layers!r}): BERT has PyTorch's layers only. Use layers='torch'.")
        if "gated_linear_unit" in self.extra:
            raise ValueError("BertConfig(extra={'gated_linear_unit': ...}): use BertConfig(activation='geglu').")
        super().__post_init__()
        attention_windows.check_layers(self, "sliding_window_layers", "sliding_window", "how far it reaches")
        self._check_positions()
        if self.classifier_pooling == "mean" and self.classifier_head != "transform":
            raise ValueError(
                "BertConfig(classifier_pooling='mean') needs classifier_head='transform': the pooler reads the first"
                " token alone."
            )

    def _check_positions(self) -> None:
        """Refuse settings of positions that the model does not have."""
        if self.rope_scaling is not None:
            self._one_of("rope_type", str(self.rope_scaling.get("rope_type")), ROPE_TYPES)
        rotates, has_windows = self.position_embedding == "rope", self.sliding_window is not None
        for name, fits, needed in (
            ("rope_scaling", rotates, "position_embedding='rope'"),
            ("window_rotary_base", rotates and has_windows, "position_embedding='rope' and sliding_window"),
            ("position_padding_id", not rotates, "position_embedding='learned'"),
        ):
            if getattr(self, name) is not None and not fits:
                raise ValueError(
                    f"BertConfig({name}={getattr(self, name)!r}) needs {needed}. Give that, or leave it out."
                )

    def stacks(self, lengths: tuple[int, ...]) -> list[LayerStack]:
        """One stack; what a query sees is the mean over its layers, of which some may have a window."""
        (length,) = lengths
        seen = sum(self._seen(length, number) for number in range(self.num_layers)) / self.num_layers
        return [LayerStack(self.num_layers, length, [(length, seen)])]

    def layer_work(self, stack: LayerStack, number: int) -> tuple[float | None, int]:
        """The keys that a query of the layer sees, where layers may differ in that; and the feed-forward weights."""
        seen, weights = super().layer_work(stack, number)
        return seen if self.sliding_window is None else self._seen(stack.tokens, number), weights

    def _seen(self, length: int, number: int) -> int:
        if self.sliding_window is None or not attention_windows.has_window(self, number):
            return length
        return min(length, 2 * self.sliding_window + 1)

    @property
    def final_norms(self) -> int:  # type: ignore[override]
        """None behind post-LayerNorm layers."""
        return int(self.norm_placement != "post")

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
        if self.position_embedding != "learned":
            return 0
        return self.seq_length + (0 if self.position_padding_id is None else self.position_padding_id + 1)

    def embedding_parameters(self, layout: ParallelLayout) -> int:
        """The embeddings of tokens, positions and token types, and a norm behind them in post-LayerNorm models.

        With "embedding_pre" that norm is counted as the one that the first layer lacks.
        """
        tables = (self.positions + self.num_token_types) * self.hidden_size
        return super().embedding_parameters(layout) + tables + (0 if self.final_norms else parameter_counts.norm(self))

    def head_parameters(self, layout: ParallelLayout, embeds: bool) -> int:
        """The transform and the output layer's biases; a pooler; labels."""
        pooler = self.hidden_size * (self.hidden_size + 1)
        transform = self.hidden_size * (self.hidden_size + self.bias) + parameter_counts.norm(self)
        if not self.outputs_are_sharded:
            before = pooler if self.task == "sequence_classification" else 0
            before = transform if self.classifier_head == "transform" else before
            return before + self.num_labels * (self.hidden_size + 1)
        biases = layout.padded_vocab_size(self.vocab_size, self.make_vocab_size_divisible_by) // layout.tp
        binary = pooler + 2 * (self.hidden_size + 1) if self.task == "pretraining" else 0
        return super().head_parameters(layout, embeds) + transform + biases + binary

    def head_activations(self, hidden: float) -> float:
        """The inputs of the transform's activation and norm, and of the output layer."""
        of_tokens = self.classifier_head == "transform" and self.task != "sequence_classification"
        return 3 * hidden if self.outputs_are_sharded or of_tokens else 0.0

    @property
    def peft_task(self) -> str:
        """peft's ``task_type`` of an adapter of the model."""
        return heads.PEFT_TASKS.get(self.task, super().peft_task)

    def family_arguments(self) -> dict[str, Any]:
        """LayerNorm, biases, and the window."""
        biases = {"add_bias_linear": self.bias, "add_qkv_bias": self.bias}
        reach = self.sliding_window
        window = {} if reach is None else attention_windows.core_fields(self, reach, reach)
        return {"normalization": "LayerNorm", **biases, **window}

    def transformer_config(self, settings: BuildSettings, **stack: Any) -> TransformerConfig:
        """megatron-core's configuration, which says beside its own fields whether norms have biases."""
        made = super().transformer_config(settings, **stack)
        made.norm_bias = self.norm_bias
        return made

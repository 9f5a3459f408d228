"""``GPTConfig``: the shape of a GPT, in the field's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lightning_megatron.checkpoint import plain_class
from lightning_megatron.modules.model_config import ModelConfig

_POSITIONS = {"learned": "learned_absolute", "rope": "rope", "none": "none"}


@plain_class
@dataclass(kw_only=True)
class GPTConfig(ModelConfig):
    """The shape of a GPT.

    Args:
        num_layers: Transformer layers.
        hidden_size: Width of the hidden states.
        num_attention_heads: Query heads.
        vocab_size: Token ids that occur; the embedding is padded to a multiple of
            ``make_vocab_size_divisible_by · tp``.
        seq_length: Longest sequence, in tokens.
        ffn_hidden_size: Width of the feed-forward layer. None: four times ``hidden_size``.
        num_query_groups: Key and value heads (grouped-query attention). None: one per query head.
        kv_channels: Size of a head. None: ``hidden_size / num_attention_heads``.
        position_embedding: Learned absolute positions, rotary ones, or none.
        rotary_base: Base period of the rotary frequencies.
        rotary_percent: Share of a head's channels that is rotated.
        normalization: LayerNorm or RMSNorm.
        layernorm_epsilon: Added to the variance.
        activation: Of the feed-forward layer; "swiglu", "geglu" and "geglu_tanh" are gated.
        bias: Whether linear layers have biases.
        qkv_bias: Whether the query, key and value projection has one. None: as ``bias``.
        tie_embeddings: Whether the output layer's weight is the embedding's.
        hidden_dropout: Dropout after the embedding, attention and feed-forward.
        attention_dropout: Dropout of attention weights.
        init_method_std: Standard deviation of the initial weights.
        make_vocab_size_divisible_by: See ``vocab_size``.
        layers: "torch", or "transformer_engine" where it is installed.
        extra: Further fields of megatron-core's ``TransformerConfig``, by its names; they win over what is above.

    Raises:
        LayoutError: Sizes that fit no layout, such as heads that do not divide ``hidden_size``.
        ValueError: An unknown activation, normalization, position embedding, or key of ``extra``; a probability that is
            none.
    """

    num_query_groups: int | None = None
    position_embedding: Literal["learned", "rope", "none"] = "learned"
    rotary_base: int = 10000
    rotary_percent: float = 1.0
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    bias: bool = True
    qkv_bias: bool | None = None
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        """Refuse choices that do not exist."""
        self._one_of("position_embedding", self.position_embedding, _POSITIONS)
        self._one_of("normalization", self.normalization, ("LayerNorm", "RMSNorm"))
        super().__post_init__()

    def sizes(self) -> dict[str, Any]:
        """What a layout has to divide."""
        groups = self.num_query_groups or self.num_attention_heads
        return {**super().sizes(), "num_query_groups": groups, "seq_length": self.seq_length}

    def family_arguments(self) -> dict[str, Any]:
        """Normalization, biases and query groups."""
        return {
            "num_query_groups": self.num_query_groups,
            "normalization": self.normalization,
            "add_bias_linear": self.bias,
            "add_qkv_bias": self.bias if self.qkv_bias is None else self.qkv_bias,
        }

    @property
    def megatron_position_embedding(self) -> str:
        """megatron-core's name of the position embedding."""
        return _POSITIONS[self.position_embedding]

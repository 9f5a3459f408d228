"""``T5Config``: the shape of a T5."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron.core.transformer import TransformerConfig

from lightning_megatron.checkpoint import plain_class
from lightning_megatron.layout import LayoutError, ParallelLayout
from lightning_megatron.modules.model_config import Activation, ModelConfig
from lightning_megatron.modules.settings import BuildSettings

_NORMS = ("RMSNorm", "LayerNorm")


@plain_class
@dataclass(kw_only=True)
class T5Config(ModelConfig):
    """The shape of a T5: relative position bias, norms before the blocks, attention scores that are not scaled.

    Args:
        num_layers: Layers of the encoder, and of the decoder.
        hidden_size: Width of the hidden states.
        num_attention_heads: Attention heads.
        vocab_size: Token ids that occur; the embedding is padded to a multiple of
            ``make_vocab_size_divisible_by · tp``.
        seq_length: Longest sequence of the encoder, in tokens.
        decoder_seq_length: Longest of the decoder. None: ``seq_length``.
        encoder_num_layers: Layers of the encoder. None: ``num_layers``.
        decoder_num_layers: Layers of the decoder. None: ``num_layers``.
        ffn_hidden_size: Width of the feed-forward layer. None: four times ``hidden_size``.
        kv_channels: Size of a head. None: ``hidden_size / num_attention_heads``.
        relative_attention_num_buckets: Distances that the position bias tells apart.
        relative_attention_max_distance: Distances from here on share the last bucket.
        normalization: RMSNorm, as in T5, or LayerNorm.
        layernorm_epsilon: Added to the variance.
        activation: Of the feed-forward layer: "relu" in T5, "geglu_tanh" in T5 1.1; "swiglu", "geglu" and "geglu_tanh"
            are gated.
        tie_embeddings: Whether the output layer's weight is the embedding's, as in T5; not in T5 1.1.
        decoder_start_id: First input of the decoder where labels are shifted; also stands in for ignored labels.
        hidden_dropout: Dropout after the embedding, attention and feed-forward.
        attention_dropout: Dropout of attention weights.
        init_method_std: Standard deviation of the initial weights.
        make_vocab_size_divisible_by: See ``vocab_size``.
        layers: "torch"; Transformer Engine's are not built for T5.
        extra: Further fields of megatron-core's ``TransformerConfig``, by its names; they win over what is above.

    Raises:
        LayoutError: Sizes that fit no layout, such as heads that do not divide ``hidden_size``.
        ValueError: An unknown choice or key of ``extra``; a number that is out of range.
    """

    decoder_seq_length: int | None = None
    encoder_num_layers: int | None = None
    decoder_num_layers: int | None = None
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    layernorm_epsilon: float = 1e-6
    activation: Activation = "relu"
    tie_embeddings: bool = True
    decoder_start_id: int = 0

    def __post_init__(self) -> None:
        """Refuse choices that do not exist."""
        self._one_of("normalization", self.normalization, _NORMS)
        if self.layers != "torch":
            raise ValueError(f"T5Config(layers={self.layers!r}): T5 has layers='torch' only.")
        for name in ("decoder_seq_length", "encoder_num_layers", "decoder_num_layers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"T5Config({name}={value}): use a whole number from 1.")
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 4 or buckets % 4 or distance <= buckets // 2:
            raise ValueError(
                f"T5Config(relative_attention_num_buckets={buckets}, relative_attention_max_distance={distance}): use a"
                " multiple of 4, half for each direction and half of these for distances one by one, and a distance"
                " above half of it."
            )
        if not 0 <= self.decoder_start_id < self.vocab_size:
            raise ValueError(f"T5Config(decoder_start_id={self.decoder_start_id}): not below vocab_size.")
        super().__post_init__()

    def check(self, layout: ParallelLayout) -> None:
        """Refuse sizes that the layout cannot divide, and pipelines."""
        if layout.pp > 1:
            raise LayoutError(
                f"T5Module runs whole on each pipeline stage, and the layout has pp={layout.pp}: its pipeline is not"
                " built yet. Use pp=1, with tp and data parallelism."
            )
        super().check(layout)

    def encoder_config(self, settings: BuildSettings) -> TransformerConfig:
        """megatron-core's configuration of the encoder."""
        return replace(self, num_layers=self.encoder_num_layers or self.num_layers).transformer_config(settings)

    def decoder_config(self, settings: BuildSettings) -> TransformerConfig:
        """megatron-core's configuration of the decoder."""
        return replace(self, num_layers=self.decoder_num_layers or self.num_layers).transformer_config(settings)

    def family_arguments(self) -> dict[str, Any]:
        """No biases, and scores as they are."""
        return {
            "normalization": self.normalization,
            "add_bias_linear": False,
            "add_qkv_bias": False,
            "softmax_scale": 1.0,
        }

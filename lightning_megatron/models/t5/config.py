"""``T5Config``: the shape of a T5."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lightning_megatron.checkpoint.plain_classes import formerly_in, plain_class
from lightning_megatron.distributed.argument_names import answer_wrong_names
from lightning_megatron.distributed.arguments import Arguments
from lightning_megatron.distributed.layout import ParallelLayout
from lightning_megatron.distributed.model_fit import check_model
from lightning_megatron.models.layer_times import layer_times
from lightning_megatron.models.model_config import Activation, LayerStack, ModelConfig
from lightning_megatron.models.parameter_counts import Part
from lightning_megatron.models.recompute import Recompute
from lightning_megatron.models.t5 import pipeline_split

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

    from lightning_megatron.models.build_settings import BuildSettings

PositionEmbedding = Literal["relative", "learned"]
_NORMS = ("RMSNorm", "LayerNorm")


@answer_wrong_names
@plain_class
@formerly_in("lightning_megatron.modules.t5_config")
@dataclass(kw_only=True)
class T5Config(ModelConfig):
    """The shape of a T5: an encoder and a decoder with norms before the blocks.

    Args:
        num_layers: Layers of the encoder, and of the decoder.
        hidden_size: Width of the hidden states.
        num_attention_heads: Attention heads.
        vocab_size: Token ids that occur; the embedding is padded to a multiple of
            ``make_vocab_size_divisible_by · tp``. None: the data module's.
        seq_length: Longest sequence of the encoder, in tokens. None: the data module's.
        decoder_seq_length: Longest of the decoder. None: ``seq_length``.
        encoder_num_layers: Layers of the encoder. None: ``num_layers``.
        decoder_num_layers: Layers of the decoder. None: ``num_layers``.
        ffn_hidden_size: Width of the feed-forward layer. None: four times ``hidden_size``.
        kv_channels: Size of a head. None: ``hidden_size / num_attention_heads``.
        position_embedding: "relative": T5's bias, which the layers of a stack share, on attention scores that are not
            scaled. "learned": Megatron's table of positions, which both stacks share; scores are then scaled by one
            over the root of the head's size.
        relative_attention_num_buckets: Distances that the position bias tells apart.
        relative_attention_max_distance: Distances from here on share the last bucket.
        normalization: RMSNorm, as in T5, or LayerNorm.
        layernorm_epsilon: Added to the variance.
        activation: Activation of the feed-forward layer: "relu" in T5, "geglu_tanh" in T5 1.1; "swiglu", "geglu" and
            "geglu_tanh" are gated.
        tie_embeddings: Whether the output layer's weight is the embedding's, as in T5; not in T5 1.1.
        decoder_start_id: First input of the decoder where labels are shifted; also stands in for ignored labels.
        hidden_dropout: Dropout after the embedding, attention and feed-forward.
        attention_dropout: Dropout of attention weights.
        init_method_std: Standard deviation of the initial weights.
        make_vocab_size_divisible_by: Unit of the padded vocabulary, see ``vocab_size``.
        layers: "torch"; Transformer Engine's are not built for T5.
        extra: Further fields of megatron-core's ``TransformerConfig``, by its names; they win over what is above.

    Raises:
        LayoutError: Sizes that fit no layout, such as heads that do not divide ``hidden_size``.
        ValueError: An unknown choice or key of ``extra``; a number that is out of range.
    """

    kind: ClassVar[str] = "T5"
    stack_names: ClassVar[tuple[str, ...]] = ("encoder", "decoder")

    decoder_seq_length: int | None = None
    encoder_num_layers: int | None = None
    decoder_num_layers: int | None = None
    position_embedding: PositionEmbedding = "relative"
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
        self._one_of("position_embedding", self.position_embedding, ("relative", "learned"))
        arguments = Arguments("T5Config")
        if self.layers != "torch":
            raise ValueError(f"T5Config(layers={self.layers!r}): T5 has PyTorch's layers only. Use layers='torch'.")
        for name in ("vocab_size", "decoder_seq_length", "encoder_num_layers", "decoder_num_layers"):
            arguments.whole(optional=True, **{name: getattr(self, name)})
        for name in ("relative_attention_num_buckets", "relative_attention_max_distance", "decoder_start_id"):
            arguments.whole(0, **{name: getattr(self, name)})
        arguments.flag(tie_embeddings=self.tie_embeddings)
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 4 or buckets % 4 or distance <= buckets // 2:
            raise ValueError(
                f"T5Config(relative_attention_num_buckets={buckets}, relative_attention_max_distance={distance}): use a"
                " multiple of 4, half for each direction and half of these for distances one by one, and a distance"
                " above half of it."
            )
        if self.decoder_start_id < 0 or (self.vocab_size is not None and self.decoder_start_id >= self.vocab_size):
            raise ValueError(f"T5Config(decoder_start_id={self.decoder_start_id}): use a token id of the vocabulary.")
        arguments.kind(dict, "a dictionary of TransformerConfig's fields", extra=self.extra)
        pipeline = [key for key in self.extra if "pipeline" in key]
        if pipeline:
            raise ValueError(
                f"T5Config(extra={{{pipeline[0]!r}: ...}}): a T5's layers are shared out evenly on each side of"
                " MegatronStrategy(pipeline_split_rank=), or as layers_per_stage says. Leave it out."
            )
        super().__post_init__()

    def stacks(self, lengths: tuple[int, ...]) -> list[LayerStack]:
        """The encoder, and the decoder, whose queries look back and at the encoder's whole output."""
        encoder, decoder = lengths
        return [
            LayerStack(self.encoder_layers, encoder, [(encoder, encoder)]),
            LayerStack(self.decoder_layers, decoder, [(decoder, decoder / 2), (encoder, encoder)]),
        ]

    @property
    def lengths(self) -> tuple[int, ...]:
        """The longest sequences of the encoder and the decoder, in tokens."""
        return self.seq_length, self.decoder_seq_length or self.seq_length

    def chunks(self, layout: ParallelLayout) -> list[list[Part]]:
        """The layers of each chunk: both stacks' without a pipeline, else the encoder's and then the decoder's."""
        encoder, decoder = self.encoder_layers, self.decoder_layers
        if layout.pp == 1:
            return [[Part(0, encoder, embeds=True, ends_stack=True), Part(1, decoder, False, True, ends_model=True)]]
        layout = self.complete_layout(layout)
        sides = ((encoder, True), (decoder, False))
        shares = [pipeline_split.side(layout, layers, encodes=encodes) for layers, encodes in sides]
        found = [
            Part(stack, layers, ends_stack=number == len(shares[stack]) - 1)
            for stack in (0, 1)
            for number, layers in enumerate(shares[stack])
        ]
        return [[replace(part, embeds=part is found[0], ends_model=part is found[-1])] for part in found]

    def parameters(self, layout: ParallelLayout, chunk: list[Part]) -> int:
        """As elsewhere, and a table of position biases for each stack that has layers in the chunk."""
        biases = self.relative_attention_num_buckets * self.num_attention_heads
        return super().parameters(layout, chunk) + (len(chunk) * biases if self.position_embedding == "relative" else 0)

    def embedding_parameters(self, layout: ParallelLayout) -> int:
        """The embedding of tokens and, where they are learned, of positions."""
        positions = self.longest * self.hidden_size if self.position_embedding == "learned" else 0
        return super().embedding_parameters(layout) + positions

    @property
    def peft_task(self) -> str:
        """peft's ``task_type`` of an adapter of the model."""
        return "SEQ_2_SEQ_LM"

    def depths(self) -> dict[str, Any]:
        """How many layers there are, by the arguments' names; both sides' own need no common number."""
        sides = (self.encoder_num_layers, self.decoder_num_layers)
        return super().depths() if None in sides else {}

    @property
    def encoder_layers(self) -> int:
        """The number of layers of the encoder."""
        return self.encoder_num_layers or self.num_layers

    @property
    def decoder_layers(self) -> int:
        """The number of layers of the decoder."""
        return self.decoder_num_layers or self.num_layers

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, of either side."""
        return max(self.seq_length, self.decoder_seq_length or 0)

    def check(self, layout: ParallelLayout) -> None:
        """Refuse sizes that the layout cannot divide; stages may differ in their number of layers."""
        check_model(layout, **self.sizes(), uneven_stages=True)

    def complete_layout(
        self, layout: ParallelLayout, recompute: Recompute | None = None, trains_every_stage: bool = False
    ) -> ParallelLayout:
        """The layout with a split between encoder and decoder, and the layers of each stage where "auto" says them.

        Raises:
            LayoutError: A stage would have no layer, or layers of both sides.
        """
        times = partial(layer_times, self, recompute)
        return pipeline_split.with_split(layout, self.encoder_layers, self.decoder_layers, self.layer_costs(), times)

    def encoder_config(self, settings: BuildSettings) -> TransformerConfig:
        """megatron-core's configuration of the encoder."""
        layers = self.encoder_layers
        stages = pipeline_split.encoder_stages(settings.layout, layers)
        return self.transformer_config(settings, num_layers=layers, pipeline_model_parallel_layout=stages)

    def decoder_config(self, settings: BuildSettings) -> TransformerConfig:
        """megatron-core's configuration of the decoder."""
        layers = self.decoder_layers
        stages = pipeline_split.decoder_stages(settings.layout, layers)
        return self.transformer_config(settings, num_layers=layers, pipeline_model_parallel_layout=stages)

    def family_arguments(self) -> dict[str, Any]:
        """No biases, and with relative positions scores as they are."""
        return {
            "normalization": self.normalization,
            "add_bias_linear": False,
            "add_qkv_bias": False,
            "softmax_scale": {"relative": 1.0, "learned": None}[self.position_embedding],
        }

    def keeps_scores(self, settings: BuildSettings) -> bool:
        """Whether the core attention keeps the scores: as elsewhere, and with a position bias in short rows."""
        from lightning_megatron.models.layers.attention import AT_ONCE

        biased = self.position_embedding == "relative" and self.longest <= AT_ONCE
        return biased or super().keeps_scores(settings)

    def layer_costs(self) -> tuple[int, int]:
        """Multiplications of one sequence in a layer of the encoder, and in one of the decoder."""
        heads = (self.kv_channels or self.hidden_size // self.num_attention_heads) * self.num_attention_heads
        projection = self.hidden_size * heads  # each of query, key, value and output, a token
        feed_forward = (3 if self.is_gated else 2) * self.hidden_size * (self.ffn_hidden_size or 4 * self.hidden_size)
        source, target = self.seq_length, self.decoder_seq_length or self.seq_length

        def layer(tokens: int) -> int:
            return tokens * (4 * projection + feed_forward + 2 * tokens * heads)

        crossing = 2 * projection * (source + target) + 2 * source * target * heads
        return layer(source), layer(target) + crossing

"""``GPTConfig``: the shape of a GPT, in the field's names, and its translation to megatron-core's configuration."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Literal

import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.transformer import TransformerConfig

from lightning_megatron.checkpoint import plain_class
from lightning_megatron.layers import LayerKind
from lightning_megatron.layout import ParallelLayout
from lightning_megatron.modules.settings import BuildSettings

Activation = Literal["gelu", "gelu_tanh", "relu", "squared_relu", "silu", "swiglu", "geglu"]

# function, and whether the first projection is doubled and gates the other half
_ACTIVATIONS: dict[str, tuple[Any, bool]] = {
    "gelu": (F.gelu, False),
    "gelu_tanh": (partial(F.gelu, approximate="tanh"), False),
    "relu": (F.relu, False),
    "squared_relu": (squared_relu, False),
    "silu": (F.silu, False),
    "swiglu": (F.silu, True),
    "geglu": (F.gelu, True),
}
_POSITIONS = {"learned": "learned_absolute", "rope": "rope", "none": "none"}
# Kernels that compile or need CUDA extensions; plain PyTorch runs everywhere and `extra` turns them on.
_PLAIN_KERNELS = dict.fromkeys(
    ("bias_activation_fusion", "bias_dropout_fusion", "masked_softmax_fusion", "persist_layer_norm",
     "gradient_accumulation_fusion", "apply_rope_fusion"),
    False,
)  # fmt: skip


@plain_class
@dataclass(kw_only=True)
class GPTConfig:
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
        activation: Of the feed-forward layer; "swiglu" and "geglu" are gated.
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

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    vocab_size: int
    seq_length: int
    ffn_hidden_size: int | None = None
    num_query_groups: int | None = None
    kv_channels: int | None = None
    position_embedding: Literal["learned", "rope", "none"] = "learned"
    rotary_base: int = 10000
    rotary_percent: float = 1.0
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    layernorm_epsilon: float = 1e-5
    activation: Activation = "gelu"
    bias: bool = True
    qkv_bias: bool | None = None
    tie_embeddings: bool = True
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    init_method_std: float = 0.02
    make_vocab_size_divisible_by: int = 128
    layers: LayerKind = "torch"
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse choices that do not exist."""
        _one_of("activation", self.activation, _ACTIVATIONS)
        _one_of("position_embedding", self.position_embedding, _POSITIONS)
        _one_of("normalization", self.normalization, ("LayerNorm", "RMSNorm"))
        _one_of("layers", self.layers, ("torch", "transformer_engine"))
        known = [f.name for f in fields(TransformerConfig) if f.init]
        for key in self.extra:
            _one_of("extra key", key, known)
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"GPTConfig({name}={getattr(self, name)}): use a probability, from 0 to below 1.")
        self.check(ParallelLayout(world_size=1))

    def check(self, layout: ParallelLayout) -> None:
        """Refuse sizes that the run's layout cannot divide, before a process group exists.

        Raises:
            LayoutError: One line per broken rule, with the nearest values that work.
        """
        layout.check_model(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size or 4 * self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_query_groups or self.num_attention_heads,
            vocab_size=self.vocab_size,
            seq_length=self.seq_length,
            uneven_stages=any("pipeline" in key for key in self.extra),
        )

    def transformer_config(self, settings: BuildSettings) -> TransformerConfig:
        """megatron-core's configuration of this model in that run."""
        function, gated = _ACTIVATIONS[self.activation]
        arguments: dict[str, Any] = {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "num_query_groups": self.num_query_groups,
            "ffn_hidden_size": self.ffn_hidden_size,
            "kv_channels": self.kv_channels,
            "normalization": self.normalization,
            "layernorm_epsilon": self.layernorm_epsilon,
            "activation_func": function,
            "gated_linear_unit": gated,
            "add_bias_linear": self.bias,
            "add_qkv_bias": self.bias if self.qkv_bias is None else self.qkv_bias,
            "hidden_dropout": self.hidden_dropout,
            "attention_dropout": self.attention_dropout,
            "init_method_std": self.init_method_std,
            **_PLAIN_KERNELS,
            **settings.transformer_config_arguments(),
        }
        return TransformerConfig(**{**arguments, **self.extra})

    @property
    def megatron_position_embedding(self) -> str:
        """megatron-core's name of the position embedding."""
        return _POSITIONS[self.position_embedding]


def _one_of(name: str, value: str, known: Any) -> None:
    if value in known:
        return
    near = difflib.get_close_matches(str(value), list(known), n=1, cutoff=0.0)
    choices = f" Choose from: {', '.join(sorted(known))}." if len(known) < 20 else ""
    raise ValueError(f"GPTConfig: unknown {name} {value!r}. Did you mean {near[0]!r}?{choices}")

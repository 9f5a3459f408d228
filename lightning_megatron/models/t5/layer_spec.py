"""T5's layer specs, with or without a relative position bias that the layers of a stack share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.models.common.embeddings.relative_pos_embedding import RelativePositionEmbedding
from megatron.core.models.T5.t5_spec import decoder_model_with_local_spec, encoder_model_with_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import CrossAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)

from lightning_megatron.models.generation.cached_layers import (
    CachedColumnParallelLinear,
    CachedLayer,
    CachedRowParallelLinear,
    generate_quickly,
)
from lightning_megatron.models.layers.attention import TorchAttention
from lightning_megatron.models.layers.fused.layer_spec import fuse
from lightning_megatron.models.layers.norm import TorchNorm
from lightning_megatron.models.layers.recomputation import use_recomputed_mlp
from lightning_megatron.models.t5.position_bias import DistanceBias


class RelativeAttention(TorchAttention):
    """Self-attention that adds its stack's position bias; each layer makes it anew, and keeps none of it."""

    position_bias: RelativePositionEmbedding
    biased = True

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        *args: Any,
        attention_bias: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As ``TorchAttention``, with this rank's heads of the bias; in generation all layers are given one."""
        bias = DistanceBias.here(self.position_bias) if attention_bias is None else attention_bias.to(query.dtype)
        return super().forward(query, key, *args, **{**kwargs, "attention_bias": bias})


@dataclass
class EncoderStates:
    """The encoder's output, in generation, and what each layer's cross-attention has made of it.

    Args:
        hidden: ``[se, b, h]``.
        projected: Keys and values ``[se, b, heads/tp, head]`` by the layer's number.
    """

    hidden: torch.Tensor
    projected: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


class CachingCrossAttention(CrossAttention):
    """megatron-core's cross-attention, which projects ``EncoderStates`` once.

    megatron-core's cache has one place for a layer, which is the self-attention's.

    Attributes:
        packed_seq_params: Who looks at whom, as patterns say it; ``DecoderLayer`` sets it for each call.
    """

    packed_seq_params: PackedSeqParams | None = None

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: Any, key_value_states: Any = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend to the encoder's output, as it is or as ``EncoderStates``."""
        states = key_value_states
        if not isinstance(states, EncoderStates):
            params = self.packed_seq_params
            return super().forward(hidden_states, attention_mask, states, packed_seq_params=params, **kwargs)
        if self.layer_number not in states.projected:
            _, *new = self.get_query_key_value_tensors(hidden_states, states.hidden)
            states.projected[self.layer_number] = tuple(new)
        key, value = states.projected[self.layer_number]
        query = self.linear_q(hidden_states)[0].unflatten(-1, (-1, key.size(-1)))
        attended = self.core_attention(query, key, value, attention_mask, attn_mask_type=self.attn_mask_type)
        return self.linear_proj(attended)


class DecoderLayer(CachedLayer):
    """megatron-core's layer, whose cross-attention is told of patterns, too."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer with megatron-core's arguments."""
        self.cross_attention.packed_seq_params = kwargs.get("packed_seq_params")
        return super().__call__(*args, **kwargs)


def t5_encoder_spec(
    config: TransformerConfig, attention: type[TorchAttention], vp_stage: int | None, fused_layers: bool = False
) -> TransformerBlockSubmodules:
    """Self-attention in both directions, on this pipeline stage (and virtual stage)."""
    return _block(encoder_model_with_local_spec(), config, attention, vp_stage, fused_layers)


def t5_decoder_spec(
    config: TransformerConfig, attention: type[TorchAttention], vp_stage: int | None, fused_layers: bool = False
) -> TransformerBlockSubmodules:
    """Self-attention, and attention to the encoder's output."""
    layer = decoder_model_with_local_spec()
    layer.submodules.pre_cross_attn_layernorm = TorchNorm
    layer.submodules.cross_attention.module = CachingCrossAttention
    cross = layer.submodules.cross_attention.submodules
    cross.core_attention = TorchAttention
    cross.linear_q, cross.linear_proj = CachedColumnParallelLinear, CachedRowParallelLinear
    return _block(layer, config, attention, vp_stage, fused_layers)


def share_position_bias(block: TransformerBlock, bias: RelativePositionEmbedding) -> None:
    """Have every layer of the stack add ``bias``, which stays the model's own."""
    for layer in block.layers:
        layer.self_attention.core_attention.__dict__["position_bias"] = bias  # not registered once per layer


@torch.no_grad()
def start_queries_small(block: TransformerBlock) -> None:
    """Divide the queries' first weights by the root of a head's size, as T5 does, whose scores are not scaled.

    Otherwise attention looks at one token from the start, and learns nothing for long; Mesh TensorFlow's
    ``attention_kv_heads_combined`` initialisation, which transformers' T5 has too.
    """
    size = block.config.kv_channels**0.5
    for layer in block.layers:
        heads = layer.self_attention.linear_qkv.weight.unflatten(0, (-1, 3, block.config.kv_channels))
        heads[:, 0].div_(size)  # each head's query, key and value lie one behind the other
        cross = getattr(layer.cross_attention, "linear_q", None)
        if cross is not None:
            cross.weight.div_(size)


def _block(
    layer: ModuleSpec,
    config: TransformerConfig,
    attention: type[TorchAttention],
    vp_stage: int | None,
    fused_layers: bool,
) -> TransformerBlockSubmodules:
    generate_quickly(layer)
    parts = layer.submodules
    if parts.cross_attention is not IdentityOp:
        layer.module = DecoderLayer
    parts.input_layernorm = parts.pre_mlp_layernorm = TorchNorm
    parts.self_attention.submodules.core_attention = attention
    use_recomputed_mlp(layer, config)
    parts.sharded_state_dict_keys_map = {}  # megatron-core's renames fuse norms into linears, as TE does
    if fused_layers:
        fuse(layer)
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, vp_stage), layer_norm=TorchNorm
    )

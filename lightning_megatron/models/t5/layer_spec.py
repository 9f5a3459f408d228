"""T5's layer specs, with or without a relative position bias that the layers of a stack share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.models.common.embeddings.relative_pos_embedding import RelativePositionEmbedding
from megatron.core.models.T5.t5_spec import decoder_model_with_local_spec, encoder_model_with_local_spec
from megatron.core.tensor_parallel import scatter_to_tensor_model_parallel_region
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import CrossAttention
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)

from lightning_megatron.distributed.sequence_shards import SequenceShards
from lightning_megatron.models.generation.cached_layers import (
    CachedColumnParallelLinear,
    CachedRowParallelLinear,
    generate_quickly,
)
from lightning_megatron.models.layers.attention import TorchAttention
from lightning_megatron.models.layers.fused.layer_spec import fuse
from lightning_megatron.models.layers.norm import TorchNorm
from lightning_megatron.models.layers.recomputation import use_recomputed_mlp


class RelativeAttention(TorchAttention):
    """Self-attention that adds its stack's position bias; each layer computes it anew, recomputed layers too."""

    position_bias: RelativePositionEmbedding
    biased = True

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        *args: Any,
        attention_bias: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As ``TorchAttention``, with this rank's heads of the bias; in generation all layers are given one."""
        if attention_bias is None:
            attention_bias = self._bias(query.size(0), key.size(0))
        return super().forward(query, key, *args, **{**kwargs, "attention_bias": attention_bias.to(query.dtype)})

    def _bias(self, queries: int, keys: int) -> torch.Tensor:
        """That of this rank's queries and all keys; or of some of its heads in whole rows, where ranks take those."""
        if self.way is None or self.has_whole_rows:
            return heads_of_bias(self.position_bias, queries, keys)
        shards = self.shards_of_queries
        if self.way != "all_to_all":
            return heads_of_part_of_bias(self.position_bias, shards, queries)
        length = queries * shards.size
        whole = heads_of_bias(self.position_bias, length, length)
        return whole.chunk(shards.size, dim=1)[shards.rank].clone()  # a copy does not keep the other ranks' heads


def heads_of_bias(position_bias: RelativePositionEmbedding, queries: int, keys: int) -> torch.Tensor:
    """This rank's heads of a stack's position bias, ``[1, heads/tp, queries, keys]``.

    A query without the keys before it, in generation, is the last of as many as there are keys.
    """
    # It depends on the distance alone, so that a last query's is the first key's column, from the other side.
    bias = position_bias(queries, keys) if queries == keys else position_bias(keys, 1).flip(2).transpose(2, 3)
    return _heads(bias.permute(0, 2, 3, 1))


def heads_of_part_of_bias(position_bias: RelativePositionEmbedding, shards: SequenceShards, own: int) -> torch.Tensor:
    """This rank's heads of the bias of its ``own`` queries of each row to all keys, ``[1, heads/tp, own, keys]``."""
    weight, length = position_bias.relative_attention_bias.weight, own * shards.size
    keys = torch.arange(length, device=weight.device)
    distances = keys - shards.take(keys, 0)[:, None]
    buckets = position_bias._relative_position_bucket(
        distances,
        bidirectional=position_bias.bidirectional,
        num_buckets=position_bias.relative_attention_num_buckets,
        max_distance=position_bias.relative_attention_max_distance,
    )
    return _heads(position_bias.relative_attention_bias(buckets)[None])


def _heads(bias: torch.Tensor) -> torch.Tensor:
    """``[1, heads/tp, queries, keys]`` of ``[1, queries, keys, heads]``."""
    return scatter_to_tensor_model_parallel_region(bias).permute(0, 3, 1, 2)


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
    """

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: Any, key_value_states: Any = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend to the encoder's output, as it is or as ``EncoderStates``."""
        states = key_value_states
        if not isinstance(states, EncoderStates):
            return super().forward(hidden_states, attention_mask, states, **kwargs)
        if self.layer_number not in states.projected:
            _, *new = self.get_query_key_value_tensors(hidden_states, states.hidden)
            states.projected[self.layer_number] = tuple(new)
        key, value = states.projected[self.layer_number]
        query = self.linear_q(hidden_states)[0].unflatten(-1, (-1, key.size(-1)))
        attended = self.core_attention(query, key, value, attention_mask, attn_mask_type=self.attn_mask_type)
        return self.linear_proj(attended)


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
    parts.input_layernorm = parts.pre_mlp_layernorm = TorchNorm
    parts.self_attention.submodules.core_attention = attention
    use_recomputed_mlp(layer, config)
    parts.sharded_state_dict_keys_map = {}  # megatron-core's renames fuse norms into linears, as TE does
    if fused_layers:
        fuse(layer)
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, vp_stage), layer_norm=TorchNorm
    )

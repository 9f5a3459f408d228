"""Layers that read and fill the cache in generation, without what megatron-core does for training at each call.

In a pass with a cache there is one new token, so that a layer's operations take no longer than the Python around them.
With a cache these classes compute what megatron-core's do, in the same order and to the bit, and leave out what only
training needs: autograd functions, recomputation, offloading and ranges for a profiler. Without one they are
megatron-core's. Each part of a layer is still called as a module, so that hooks (of LoRA, of scaled outputs) run.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import GraphableMegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer

from lightning_megatron.distributed.megatron_versions import dense_mlp_submodules
from lightning_megatron.models.generation.kv_cache import KeyValueCache, Rotation
from lightning_megatron.models.layers.recomputation import activated


def generate_quickly(layer: ModuleSpec) -> None:
    """Use the classes below in the spec of a layer that has megatron-core's own."""
    layer.module = CachedLayer
    parts = layer.submodules
    parts.self_attention.module = CachedSelfAttention
    parts.self_attention.submodules.linear_qkv = CachedColumnParallelLinear
    parts.self_attention.submodules.linear_proj = CachedRowParallelLinear
    if (mlp := dense_mlp_submodules(layer)) is not None:
        mlp.linear_fc1, mlp.linear_fc2 = CachedColumnParallelLinear, CachedRowParallelLinear


class CachedLayer(TransformerLayer):
    """megatron-core's transformer layer."""

    mlp_beside = False  # whether the feed-forward layer reads what attention reads, not what comes behind it

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shares_norm = self.mlp_beside and isinstance(self.pre_mlp_layernorm, IdentityOp)
        if type(self.mlp) is MLP:  # megatron-core warns of specs of a feed-forward layer that it does not know
            self.mlp.__class__ = CachedMLP

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer and its hooks; with a cache, without a look at megatron-core's CUDA graphs."""
        if kwargs.get("inference_context") is None:
            return super().__call__(*args, **kwargs)
        return super(GraphableMegatronModule, self).__call__(*args, **kwargs)

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, inference_context: KeyValueCache | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, Any]:
        """Run the layer on ``[s/tp, b, h]``."""
        if inference_context is None:
            return super().forward(hidden_states, *args, **kwargs)
        return self._forward_cached(hidden_states, inference_context, **kwargs)

    def _forward_cached(
        self,
        hidden: torch.Tensor,
        cache: KeyValueCache,
        attention_mask: torch.Tensor | None = None,
        context: Any = None,
        context_mask: torch.Tensor | None = None,
        rotary_pos_emb: torch.Tensor | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> tuple[torch.Tensor, Any]:
        normed = self.input_layernorm(hidden)
        attended = self.self_attention(
            normed,
            attention_mask,
            inference_context=cache,
            rotary_pos_emb=rotary_pos_emb,
            attention_bias=attention_bias,
            packed_seq_params=packed_seq_params,
        )
        between = added(attended, hidden)
        if context is not None:
            normed = self.pre_cross_attn_layernorm(between)
            between = added(self.cross_attention(normed, context_mask, key_value_states=context), between)
        if not self.shares_norm:
            normed = self.pre_mlp_layernorm(hidden if self.mlp_beside else between)
        return added(self.mlp(normed), between), context


class CachedSelfAttention(SelfAttention):
    """megatron-core's self-attention, but that a cached key is rotated once, when it is new.

    megatron-core rotates all of them again for each token written.
    """

    rotary_table = 0  # which of several tables of angles ``rotary_pos_emb`` is

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plain = not any(getattr(self.config, name) for name in ("attention_output_gate", "flash_decode"))
        without = self.config.no_rope_freq
        self.rotates = not (without and without[self.layer_number - 1])
        self.joined = (
            self.plain
            and self.q_layernorm is self.k_layernorm is None
            and not self.config.test_mode
            and self.config.num_query_groups >= self.world_size  # else ranks share a group
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        inference_context: KeyValueCache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the layer on ``[s/tp, b, h]``."""
        if inference_context is None or not self.plain:
            return super().forward(hidden_states, attention_mask, *args, inference_context=inference_context, **kwargs)
        return self._forward_cached(hidden_states, attention_mask, inference_context, **kwargs)

    def _forward_cached(
        self,
        hidden: torch.Tensor,
        mask: torch.Tensor | None,
        cache: KeyValueCache,
        rotary_pos_emb: torch.Tensor | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        rotation = None
        if rotary_pos_emb is not None and self.rotates:
            rotation = cache.rotation(rotary_pos_emb, hidden, self.config.rotary_interleaved, self.rotary_table)
        query, key, value = self._query_key_value(hidden, rotation)
        mask_type = AttnMaskType.no_mask if cache.sequence_len_offset else self.attn_mask_type
        key, value = cache.add(self.layer_number, key, value)
        attended = self.core_attention(
            query,
            key,
            value,
            mask,
            attn_mask_type=mask_type,
            attention_bias=attention_bias,
            packed_seq_params=packed_seq_params,
        )
        return self.linear_proj(attended)

    def _query_key_value(self, hidden: torch.Tensor, rotation: Rotation | None) -> tuple[torch.Tensor, ...]:
        """Queries ``[new, b, heads/tp, head]``, and keys and values ``[new, b, groups/tp, head]``."""
        if not self.joined:
            query, key, value = self.get_query_key_value_tensors(hidden)
            return (query, key, value) if rotation is None else (rotation(query), rotation(key), value)
        mixed, _ = self.linear_qkv(hidden)  # of each group its queries, its key and its value
        new, rows, _ = mixed.shape
        size = self.hidden_size_per_attention_head
        heads = mixed.view(new, rows, self.num_query_groups_per_partition, -1, size)
        value = heads.select(3, -1)
        if rotation is not None:  # queries and keys at once
            heads = rotation(heads.flatten(2, 3)).view(heads.shape)
        return heads[:, :, :, :-2].reshape(new, rows, -1, size), heads.select(3, -2), value


class CachedMLP(MLP):
    """megatron-core's feed-forward layer."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the layer on ``[s/tp, b, h]``; without gradients, without a look at megatron-core's joined kernels."""
        config = self.config
        if torch.is_grad_enabled() or config.use_te_activation_func or config.bias_activation_fusion or args or kwargs:
            return super().forward(hidden_states, *args, **kwargs)
        inner, bias = self.linear_fc1(hidden_states)  # [s, b, ffn/tp], of gated layers twice as wide
        if bias is not None:
            inner.add_(bias)
        return self.linear_fc2(activated(config, inner))


class CachedColumnParallelLinear(ColumnParallelLinear):
    """megatron-core's linear layer whose output is divided over the tensor-parallel ranks."""

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the layer on ``[s/tp, b, in]``; without gradients, by torch's product alone."""
        if torch.is_grad_enabled() or self.sequence_parallel or self.gather_output or args or kwargs:
            return super().forward(input_, *args, **kwargs)
        output = F.linear(input_, self.weight)
        if self.skip_bias_add or self.bias is None:
            return output, self.bias
        return output.add_(self.bias), None


class CachedRowParallelLinear(RowParallelLinear):
    """megatron-core's linear layer whose input is divided over the tensor-parallel ranks."""

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the layer on ``[s, b, in/tp]``; without gradients, by torch's product and the sum over the ranks."""
        if torch.is_grad_enabled() or self.sequence_parallel or not (self.input_is_parallel and self.skip_bias_add):
            return super().forward(input_)
        output = F.linear(input_, self.weight)
        if self.tp_group.size() > 1:
            dist.all_reduce(output, group=self.tp_group)
        return output, self.bias


def added(output_and_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor) -> torch.Tensor:
    """A block's output, its bias and its input, summed in place in megatron-core's order."""
    output, bias = output_and_bias
    if bias is not None:
        output.add_(bias)
    return output.add_(residual.to(output.dtype))

"""``LatentSelfAttention``: megatron-core's multi-latent attention, with the model's positions and torch's kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.models.common.embeddings import apply_rotary_pos_emb
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from typing_extensions import override

from lightning_megatron.distributed.megatron_versions import let_latent_attention_run
from lightning_megatron.models.generation.cached_layers import CachedColumnParallelLinear, CachedRowParallelLinear
from lightning_megatron.models.generation.kv_cache import KeyValueCache
from lightning_megatron.models.gpt.latent.absorbed import attend_to_latents
from lightning_megatron.models.layers.attention import TorchAttention
from lightning_megatron.models.layers.norm import TorchNorm
from lightning_megatron.models.layers.recomputation import recomputes

let_latent_attention_run()
Turn = Callable[[torch.Tensor], torch.Tensor]


def use_latent_attention(layer: ModuleSpec) -> None:
    """Give a layer's spec multi-latent attention; ``layer`` has causal attention of another kind."""
    up = CachedColumnParallelLinear
    layer.submodules.self_attention = ModuleSpec(
        module=LatentSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=up,
            linear_q_down_proj=ColumnParallelLinear,
            linear_q_up_proj=up,
            linear_kv_down_proj=ColumnParallelLinear,
            linear_kv_up_proj=up,
            core_attention=TorchAttention,
            linear_proj=CachedRowParallelLinear,
            q_layernorm=IdentityOp,  # the layer makes its own: megatron-core 0.19 takes norms with both latents alone
            kv_layernorm=IdentityOp,
        ),
    )


class LatentSelfAttention(MLASelfAttention):
    """megatron-core's layer, which takes the rotary angles of its model as other attention does.

    megatron-core's own layer counts places from the beginning of a row, whatever the batch says of positions, takes a
    row at a time for one without a batch, and leaves the gradients of the shared key on each tensor-parallel rank as
    its own heads have them.

    Attributes:
        rotary_factor: Factor on the rotated channels, as YaRN may have it.
    """

    rotary_factor = 1.0
    _angles: torch.Tensor | None = None

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        del self.rotary_pos_emb
        latent = config.latent_attention
        self.recompute_up_proj = recomputes(config, "latent_up")
        without = config.no_rope_freq
        self.rotates = not (without and without[self.layer_number - 1])
        epsilon = config.layernorm_epsilon if latent.norm_epsilon is None else latent.norm_epsilon
        self.kv_layernorm = TorchNorm(config, latent.kv_lora_rank, epsilon)
        if latent.q_lora_rank is not None:
            self.q_layernorm = TorchNorm(config, latent.q_lora_rank, epsilon)

    @override
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        inference_context: KeyValueCache | None = None,
        rotary_pos_emb: torch.Tensor | None = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the layer on ``[s/tp, b, h]``."""
        if inference_context is not None:
            return self._forward_cached(
                hidden_states, attention_mask, inference_context, rotary_pos_emb, packed_seq_params
            )
        self._angles = rotary_pos_emb
        try:
            return super().forward(hidden_states, attention_mask, *args, packed_seq_params=packed_seq_params, **kwargs)
        finally:
            self._angles = None

    @override
    def get_query_key_value_tensors(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Queries and keys ``[s, b, heads/tp, qk_head_dim]``, values ``[s, b, heads/tp, v_head_dim]``, both latents."""
        latents = self._latents(hidden_states)
        turn: Turn | None = None
        if self._angles is not None and self.rotates:
            turn = partial(
                apply_rotary_pos_emb, freqs=self._angles, config=self.config, mscale=self.rotary_factor,
                cp_group=self.pg_collection.cp,
            )  # fmt: skip
        heads = partial(self._heads, turn=turn)
        if self.recompute_up_proj:
            self.qkv_up_checkpoint = CheckpointWithoutOutput(fp8=None)  # its default asks for Transformer Engine
            return *self.qkv_up_checkpoint.checkpoint(heads, *latents), *latents[:2]
        return *heads(*latents), *latents[:2]

    def _latents(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What queries are made of, the normalised latent ``[s/tp, b, rank]``, and the shared key ``[s, b, channels]``.

        Each tensor-parallel rank computes some channels of all tokens, which are then gathered.
        """
        config: Any = self.config
        of_queries = hidden
        if config.q_lora_rank is not None:
            narrow = gather_from_tensor_model_parallel_region(self.linear_q_down_proj(hidden)[0])
            of_queries = self.q_layernorm(self._own_tokens(narrow))
        whole = gather_from_tensor_model_parallel_region(self.linear_kv_down_proj(hidden)[0])
        latent, shared_key = whole.split([config.kv_lora_rank, config.qk_pos_emb_head_dim], dim=-1)
        latent = self.kv_layernorm(self._own_tokens(latent))
        return of_queries, latent, copy_to_tensor_model_parallel_region(shared_key)  # which each rank's heads read

    def _own_tokens(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's part of a sequence under sequence parallelism."""
        return scatter_to_sequence_parallel_region(tensor) if self.config.sequence_parallel else tensor.contiguous()

    def _heads(
        self, of_queries: torch.Tensor, latent: torch.Tensor, shared_key: torch.Tensor, turn: Turn | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        config: Any = self.config
        here, shared_key = self.num_attention_heads_per_partition, shared_key.unsqueeze(2)  # [s, b, 1, channels]
        query = self._query(of_queries, turn)
        wide = self.linear_kv_up_proj(latent)[0].unflatten(-1, (here, -1))
        key, value = wide.split([config.qk_head_dim, config.v_head_dim], dim=-1)
        shared_key = shared_key if turn is None else turn(shared_key)
        key = torch.cat((key, shared_key.expand(-1, -1, here, -1)), dim=-1)
        return query, key, value.contiguous()

    def _query(self, of_queries: torch.Tensor, turn: Turn | None) -> torch.Tensor:
        """Queries ``[s, b, heads/tp, channels]``, the last of which are rotated."""
        config: Any = self.config
        up = self.linear_q_proj if config.q_lora_rank is None else self.linear_q_up_proj
        query = up(of_queries)[0].unflatten(-1, (self.num_attention_heads_per_partition, -1))
        if turn is None:
            return query
        plain = config.qk_head_dim
        return torch.cat((query[..., :plain], turn(query[..., plain:])), dim=-1)

    def _forward_cached(
        self,
        hidden: torch.Tensor,
        mask: torch.Tensor | None,
        cache: KeyValueCache,
        angles: torch.Tensor | None,
        packed_seq_params: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        turn: Turn | None = None
        if angles is not None and self.rotates:
            rotation, factor = cache.rotation(angles, hidden, self.config.rotary_interleaved), self.rotary_factor
            turn = rotation if factor == 1.0 else lambda x: rotation(x) * factor
        of_queries, latent, shared_key = self._latents(hidden)
        rotated = shared_key.unsqueeze(2)  # [new, b, 1, channels]
        kept = torch.cat((latent.unsqueeze(2), rotated if turn is None else turn(rotated)), dim=-1)
        (latents,) = cache.add(self.layer_number, kept)
        if cache.sequence_len_offset:
            attended = self._written(self._query(of_queries, turn), latents, mask, cache)
        else:
            heads = self._heads(of_queries, latent, shared_key, turn=turn)
            attended = self.core_attention(*heads, mask, packed_seq_params=packed_seq_params)
        return self.linear_proj(attended)

    def _written(
        self, query: torch.Tensor, latents: torch.Tensor, mask: torch.Tensor | None, cache: KeyValueCache
    ) -> torch.Tensor:
        """The attention of one new token, whose mask is that of its keys."""
        if window := self.core_attention.window:
            latents, mask = latents[-window:], None if mask is None else mask[..., -window:]
        up = self._up(cache).unflatten(0, (self.num_attention_heads_per_partition, -1))
        return attend_to_latents(query, latents, up, mask, self.softmax_scale)

    def _up(self, cache: KeyValueCache) -> torch.Tensor:
        """The matrix that makes keys and values of latents, with what hooks (of LoRA) add to the layer's own."""
        layer: Any = self.linear_kv_up_proj
        if not layer._forward_hooks:
            return layer.weight

        def made() -> torch.Tensor:
            own = layer.weight
            return layer(torch.eye(own.size(1), dtype=own.dtype, device=own.device).unsqueeze(1))[0].squeeze(1).mT

        return cache.once(self.layer_number, made)

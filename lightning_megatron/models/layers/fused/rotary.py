"""Splits queries, keys and values and rotates the first two, in one kernel and back in another."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention

from lightning_megatron.models.layers.fused.compiled import compiled

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def cosines_and_sines(angles: torch.Tensor, interleaved: bool, dtype: torch.dtype) -> torch.Tensor:
    """The table by which ``rotated_heads`` rotates, made once for all layers.

    Args:
        angles: megatron-core's ``[s, 1 or b, 1, rotated channels]``, each angle twice.
        interleaved: Whether an angle's two channels are neighbours; else they are half of the channels apart.
        dtype: Type of the queries, to which megatron-core rounds cosines and sines.

    Returns:
        ``[s, 1 or b, 1, rotated channels]``: the cosine of each angle, then its sine.
    """
    once = angles[..., ::2] if interleaved else angles[..., : angles.size(-1) // 2]
    return torch.cat((once.cos(), once.sin()), dim=-1).to(dtype)


def rotated_heads(mixed: torch.Tensor, table: torch.Tensor, head: int, interleaved: bool) -> Heads:
    """Queries, keys and values of each head, the first channels of queries and keys rotated.

    Args:
        mixed: ``[s, b, groups, (queries + 2) · head]``: of each group its queries, its key and its value.
        table: From ``cosines_and_sines``.
        head: Channels of a head.
        interleaved: As in ``cosines_and_sines``.

    Returns:
        ``[s, b, groups · queries, head]``, and twice ``[s, b, groups, head]``.
    """
    return _Rotation.apply(mixed, table, head, interleaved)  # type: ignore[no-untyped-call]


class FusedRotation(SelfAttention):
    """megatron-core's self-attention, whose ``rotary_pos_emb`` is a table from ``cosines_and_sines`` unless it caches.

    Queries and keys come rotated from ``get_query_key_value_tensors``.
    """

    _table: torch.Tensor | None = None

    def forward(self, *args: Any, inference_context: Any = None, rotary_pos_emb: Any = None, **rest: Any) -> Any:
        """Run the layer on ``[s/tp, b, h]``."""
        if inference_context is not None:
            return super().forward(*args, inference_context=inference_context, rotary_pos_emb=rotary_pos_emb, **rest)
        without = self.config.no_rope_freq and self.config.no_rope_freq[self.layer_number - 1]
        self._table = None if without else rotary_pos_emb
        try:
            return super().forward(*args, **rest)
        finally:
            self._table = None

    def get_query_key_value_tensors(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Queries ``[s, b, heads/tp, head]``, keys and values ``[s, b, groups/tp, head]``."""
        if self._table is None:
            return super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        mixed, _ = super().get_query_key_value_tensors(hidden_states, split_qkv=False)
        return rotated_heads(mixed, self._table, self.hidden_size_per_attention_head, self.config.rotary_interleaved)


def can_rotate(config: TransformerConfig) -> bool:
    """Whether ``FusedRotation`` computes this model's attention: nothing comes between the product and the rotation."""
    return not (
        config.qk_layernorm
        or hasattr(config, "latent_attention")
        or config.attention_output_gate
        or config.num_query_groups < config.tensor_model_parallel_size  # a rank takes its queries from a larger group
        or hasattr(config, "yarn_rotary_scaling_factor")
    )


class _Rotation(torch.autograd.Function):
    """Saves nothing but the table; the gradient is rotated back."""

    @staticmethod
    def forward(ctx: Any, mixed: torch.Tensor, table: torch.Tensor, head: int, interleaved: bool) -> Heads:
        ctx.save_for_backward(table)
        ctx.interleaved = interleaved
        s, b, groups, _ = mixed.shape
        query, key, value = _rotate(_merged(mixed.unflatten(-1, (-1, head)), table), table, interleaved)
        return tuple(x.view(s, b, -1, head) for x in (query, key, value))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (table,) = ctx.saved_tensors
        query, key, value = gradients
        s, b, groups, head = key.shape
        parts = [x.reshape(s, b, groups, -1, head) for x in (query, key, value)]
        mixed = _rotate_back(*(_merged(x, table) for x in parts), table, ctx.interleaved)
        return mixed.view(s, b, groups, -1), None, None, None


def _merged(heads: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """``[s, b · groups, queries + 2, head]`` where all rows are rotated alike, else ``[s · b, groups, ...]``.

    That is one dimension less that changes, and none that may be 1.
    """
    return heads.flatten(1, 2) if table.size(1) == 1 else heads.flatten(0, 1)


@compiled
def _rotate(heads: torch.Tensor, table: torch.Tensor, interleaved: bool) -> Any:
    table = _of_rows(table)
    query, key, value = heads[..., :-2, :], heads[..., -2:-1, :], heads[..., -1:, :]
    return _turn(query, table, interleaved), _turn(key, table, interleaved), value.contiguous()


@compiled
def _rotate_back(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, table: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    cosine, sine = _of_rows(table).chunk(2, dim=-1)
    table = torch.cat((cosine, -sine), dim=-1)
    return torch.cat((_turn(query, table, interleaved), _turn(key, table, interleaved), value), dim=-2)


def _of_rows(table: torch.Tensor) -> torch.Tensor:
    """``[s, 1, 1, channels]`` as it is, else ``[s · b, 1, 1, channels]``."""
    return table if table.size(1) == 1 else table.flatten(0, 1).unsqueeze(1)


def _turn(x: torch.Tensor, table: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotate the first channels by the angles of the table, and leave the others as they are."""
    rotated = table.size(-1)
    cosine, sine = table.chunk(2, dim=-1)
    turning = x[..., :rotated]
    if interleaved:
        first, second = turning[..., ::2], turning[..., 1::2]
        turned = torch.stack((first * cosine - second * sine, second * cosine + first * sine), dim=-1).flatten(-2)
    else:
        first, second = turning.chunk(2, dim=-1)
        turned = torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
    return turned if rotated == x.size(-1) else torch.cat((turned, x[..., rotated:]), dim=-1)

"""Rotary angles of given positions, of which layers with an attention window may have others, as in Gemma 3."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding


class WindowRotary(RotaryEmbedding):
    """megatron-core's table of angles, and behind it that of layers with a window: ``[2, s, 1, 1, channels]``.

    Attributes:
        of_windows: Makes the second table.
    """

    of_windows: RotaryEmbedding

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The tables, of as many places as megatron-core asks for."""
        return torch.stack((super().forward(*args, **kwargs), self.of_windows(*args, **kwargs)))


def angles_of(rotary: RotaryEmbedding, positions: torch.Tensor) -> torch.Tensor:
    """The angles of positions ``[b, s]``, ``[s, b, 1, rotated channels]``; a ``WindowRotary`` has two such tables.

    megatron-core's own table is of places in the row, which all rows have in common.
    """
    if isinstance(rotary, WindowRotary):
        return torch.stack([_angles(rotary, positions), _angles(rotary.of_windows, positions)])
    return _angles(rotary, positions)


def _angles(rotary: RotaryEmbedding, positions: torch.Tensor) -> torch.Tensor:
    frequencies = rotary.inv_freq.to(positions.device)
    angles = positions.t()[:, :, None, None].float() * frequencies  # [s, b, 1, half]
    if rotary.rotary_interleaved:
        return torch.stack((angles, angles), dim=-1).flatten(-2)
    return torch.cat((angles, angles), dim=-1)


def give_windows_a_base(model: Any, base: float, share: float) -> None:
    """Have a model's layers with a window rotate by frequencies of their own.

    Each layer's self-attention is then given its own of the two tables, whatever hands them on.

    Args:
        model: A ``PositionedGPT`` or ``BertModel``, whose frequencies are not stretched yet.
        base: Base period of those layers.
        share: Share of a head's channels that is rotated.
    """
    rotary = model.rotary_pos_emb
    rotary.__class__ = WindowRotary
    rotary.of_windows = RotaryEmbedding(
        model.config.kv_channels,
        share,
        rotary_interleaved=rotary.rotary_interleaved,
        rotary_base=base,
        cp_group=rotary.cp_group,
    )
    rotary.of_windows.inv_freq = rotary.of_windows.inv_freq.to(rotary.inv_freq.device)
    for layer in model.transformer_layers:
        attention = layer.self_attention
        attention.rotary_table = int(attention.core_attention.window is not None)
        attention.register_forward_pre_hook(_own_table, with_kwargs=True)


def _own_table(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    tables = kwargs.get("rotary_pos_emb")
    return args, kwargs if tables is None else {**kwargs, "rotary_pos_emb": tables[attention.rotary_table]}

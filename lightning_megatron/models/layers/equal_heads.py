"""Gives queries, keys and values heads of one size, by channels that are zero, for kernels that take no others."""

from __future__ import annotations

import torch
import torch.nn.functional as F

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def equal_heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
) -> tuple[Heads, float | None]:
    """The tensors with heads ``[..., head]`` of the larger size, and the factor on the scores, which are the same.

    The result of attention then has channels behind those of the values, which are zero.

    Args:
        query: The queries.
        key: The keys.
        value: The values.
        scale: Factor on the scores; None is one over the root of the size of a query's head.
    """
    if query.size(-1) == value.size(-1):
        return (query, key, value), scale
    size = max(query.size(-1), value.size(-1))
    scale = query.size(-1) ** -0.5 if scale is None else scale
    return (widened(query, size), widened(key, size), widened(value, size)), scale


def widened(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """``[..., size]``: zeros behind the channels that there are."""
    return tensor if tensor.size(-1) == size else F.pad(tensor, (0, size - tensor.size(-1)))

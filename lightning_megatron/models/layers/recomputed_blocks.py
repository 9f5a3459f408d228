"""Attention block by block, each computed again in the backward pass: nothing as large as the square of a row stays.

For what torch's kernels keep scores or masks of: a bias that is learnt, and masks in which not only distances count.
"""

from __future__ import annotations

from typing import Protocol, Self, runtime_checkable

import torch

from lightning_megatron.models.layers.recomputed_call import call_again_in_backward
from lightning_megatron.models.layers.sdpa import Kernel
from lightning_megatron.models.layers.visible_blocks import Visible

_BLOCK = 256  # queries of a block


@runtime_checkable
class ScoreBias(Protocol):
    """A bias on the scores, made for some queries and keys from a table that is learnt."""

    @property
    def table(self) -> torch.Tensor:
        """The table that is learnt, and gets the gradient."""
        ...

    def of_heads(self, part: int, parts: int) -> Self:
        """The bias of one of equally many heads each."""
        ...

    def of(self, table: torch.Tensor, queries: range, keys: range) -> torch.Tensor:
        """``[1, heads, queries, keys]``, added to the scores, from ``table``."""
        ...


def attend_again_in_backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    places: range,
    visible: Visible,
    bias: ScoreBias | None,
    kernel: Kernel,
) -> torch.Tensor:
    """Attention of queries to whole rows.

    Args:
        query: ``[q, b, heads, head]``.
        key: ``[s, b, groups, head]``.
        value: As ``key``.
        places: The places of the queries in their rows.
        visible: Who looks at whom.
        bias: What is added to the scores, or None.
        kernel: Computes a block.

    Returns:
        As ``query``.
    """
    found = []
    for first in range(0, len(places), _BLOCK):
        block = places[first : first + _BLOCK]
        keys = visible.reach(block, range(key.size(0)))
        part = query[first : first + len(block)]
        if not keys:
            found.append(part * 0.0)
            continue
        inputs = (part, key[keys.start : keys.stop], value[keys.start : keys.stop])
        found.append(_Block(block, keys, visible, bias, kernel).attend(*inputs))
    return torch.cat(found)


class _Block:
    """One block of queries, and the keys that it may look at."""

    def __init__(self, queries: range, keys: range, visible: Visible, bias: ScoreBias | None, kernel: Kernel) -> None:
        self.queries, self.keys, self.visible, self.bias, self.kernel = queries, keys, visible, bias, kernel

    def attend(self, *tensors: torch.Tensor) -> torch.Tensor:
        """Attention of queries to keys and values."""
        tables = () if self.bias is None else (self.bias.table,)  # given, so that its gradient comes once
        return call_again_in_backward(self._attend, *tensors, *tables)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, table: torch.Tensor | None = None
    ) -> torch.Tensor:
        mask = self.visible.seen(self.queries, self.keys)
        if self.bias is not None and table is not None:
            bias = self.bias.of(table, self.queries, self.keys).to(query.dtype)
            mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        return self.kernel(q, k, v, mask, False).permute(2, 0, 1, 3)

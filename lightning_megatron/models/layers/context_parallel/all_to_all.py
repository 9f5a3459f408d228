"""Exchanges parts of rows for parts of heads: each rank then has whole rows, and as many heads fewer."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist

from lightning_megatron.distributed import process_groups
from lightning_megatron.distributed.sequence_shards import SequenceShards


def whole_rows(tensor: torch.Tensor, shards: SequenceShards) -> torch.Tensor:
    """``[s, b, heads/cp, head]`` in the order of the rows, of this rank's shard ``[s/cp, b, heads, head]``."""
    found: torch.Tensor = _Exchange.apply(tensor, shards, True)  # type: ignore[no-untyped-call]
    return found


def own_places(tensor: torch.Tensor, shards: SequenceShards) -> torch.Tensor:
    """``[s/cp, b, heads, head]`` of ``[s, b, heads/cp, head]``; the opposite of ``whole_rows``."""
    found: torch.Tensor = _Exchange.apply(tensor, shards, False)  # type: ignore[no-untyped-call]
    return found


def divisible(tensor: torch.Tensor, ranks: int) -> torch.Tensor:
    """Keys or values ``[s, b, groups, head]``, their groups repeated, each behind itself, until ``ranks`` divide them.

    Where ``ranks`` divide the heads of the queries, each rank's heads then belong to its groups.
    """
    groups = tensor.size(2)
    times = math.lcm(groups, ranks) // groups
    return tensor if times == 1 else tensor.repeat_interleave(times, dim=2)


class _Exchange(torch.autograd.Function):
    """An all-to-all, which is turned round in the backward pass."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, shards: SequenceShards, to_rows: bool) -> torch.Tensor:
        ctx.shards, ctx.to_rows = shards, to_rows
        return _to_rows(tensor, shards) if to_rows else _to_heads(tensor, shards)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        back = _to_heads if ctx.to_rows else _to_rows
        return back(gradients[0], ctx.shards), None, None


def _to_rows(tensor: torch.Tensor, shards: SequenceShards) -> torch.Tensor:
    of_ranks = tensor.unflatten(2, (shards.size, -1)).permute(2, 0, 1, 3, 4)  # [cp, s/cp, b, heads/cp, head]
    return shards.join(list(_all_to_all(of_ranks).unbind()), 0)


def _to_heads(tensor: torch.Tensor, shards: SequenceShards) -> torch.Tensor:
    received = _all_to_all(shards.split(tensor))  # [cp, s/cp, b, heads/cp, head], of each rank its heads
    return received.permute(1, 2, 0, 3, 4).flatten(2, 3)


def _all_to_all(each: torch.Tensor) -> torch.Tensor:
    """Send entry ``n`` to rank ``n``; entry ``n`` of the result is what came from there."""
    each = each.contiguous()
    received = torch.empty_like(each)
    dist.all_to_all_single(received, each, group=process_groups.context_parallel())
    return received

"""Collects the keys and values of whole rows for the queries of this rank, and frees them until the backward pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from lightning_megatron.distributed import process_groups
from lightning_megatron.distributed.sequence_shards import SequenceShards


class GatheredKeys:
    """Keys and values of whole rows, ``[s, b, groups, head]``.

    Between the forward and the backward pass only this rank's shards stay: after the layer's result is there, what was
    gathered is freed, and it is gathered again when the result's gradient comes, as Transformer Engine does.

    Args:
        key: This rank's shard ``[s/cp, b, groups, head]``.
        value: As ``key``, with heads of any size.
        shards: Which places the ranks hold.

    Attributes:
        key: The keys of whole rows.
        value: The values of whole rows.
    """

    def __init__(self, key: torch.Tensor, value: torch.Tensor, shards: SequenceShards) -> None:
        self._shards = shards
        self._own = torch.cat((key, value), dim=-1)
        self._whole: torch.Tensor = _Gathering.apply(self._own, shards)  # type: ignore[no-untyped-call]
        self.key, self.value = self._whole.split([key.size(-1), value.size(-1)], dim=-1)

    def free_until_gradient_of(self, result: torch.Tensor) -> None:
        """Free the rows until the gradient of ``result``, which was computed from them, is there."""
        in_backward = torch._C._current_graph_task_id() != -1  # recomputed: the gradient comes at once
        if in_backward or not (torch.is_grad_enabled() and result.requires_grad):
            return
        own, shards, storage = self._own.detach(), self._shards, self._whole.untyped_storage()

        def gather_again(_: torch.Tensor) -> None:
            again = _gathered(own, shards).untyped_storage()
            storage.resize_(again.nbytes())
            storage.copy_(again)

        result.register_hook(gather_again)
        storage.resize_(0)


class _Gathering(torch.autograd.Function):
    """Whole rows of shards; a shard's gradient is the sum of all ranks' gradients of its part of the rows."""

    @staticmethod
    def forward(ctx: Any, shard: torch.Tensor, shards: SequenceShards) -> torch.Tensor:
        ctx.shards = shards
        ctx.save_for_backward(shard)  # kept to be gathered again, and so it is counted among what is saved
        return _gathered(shard, shards)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        shards = ctx.shards
        summed = gradients[0].new_empty(gradients[0].size(0) // shards.size, *gradients[0].shape[1:])
        ordered = shards.split(gradients[0])
        dist.reduce_scatter_tensor(summed, ordered.flatten(0, 1), group=process_groups.context_parallel())
        return summed, None


def _gathered(shard: torch.Tensor, shards: SequenceShards) -> torch.Tensor:
    each = shard.new_empty(shards.size, *shard.shape)
    dist.all_gather_into_tensor(each.flatten(0, 1), shard.contiguous(), group=process_groups.context_parallel())
    return shards.join(list(each.unbind()), 0)

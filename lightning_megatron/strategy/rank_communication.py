"""The strategy's barrier, broadcast, reduce and gather, which Lightning calls on all ranks together."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ParallelStrategy
from typing_extensions import override

from lightning_megatron.distributed import collectives, lightning_private, process_groups


class RankCommunication(ParallelStrategy):
    """The part of the strategy that reduces values over replicas, and makes decisions on all ranks."""

    @override
    def barrier(self, name: str | None = None) -> None:
        if dist.is_initialized():
            dist.barrier(device_ids=None if self.root_device.type == "cpu" else [self.root_device.index])

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if not dist.is_initialized():
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src)
        return box[0]

    @override
    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """Reduce over the data-parallel replicas: model-parallel ranks hold copies, which a sum would count again."""
        if not isinstance(tensor, torch.Tensor) or group == process_groups.REDUCED or not dist.is_initialized():
            return tensor
        return lightning_private.reduce(tensor, group or process_groups.replicas(), reduce_op=reduce_op)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Decide over all ranks, so that every rank decides the same."""
        if not dist.is_initialized():
            return decision
        return not collectives.on_any_rank(not decision)[0] if all else collectives.on_any_rank(decision)[0]

    @override
    def all_gather(self, tensor: torch.Tensor, group: Any | None = None, sync_grads: bool = False) -> torch.Tensor:
        """Gather over the data-parallel replicas, also where ``LightningModule.all_gather`` asks for the world."""
        if group in (None, dist.group.WORLD):
            group = process_groups.replicas()
        if sync_grads:
            return collectives.gather_with_gradients(tensor, group)
        return super().all_gather(tensor, group, sync_grads)

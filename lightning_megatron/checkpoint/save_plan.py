"""Plans which rank writes which shards of a checkpoint, so that each is written once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, mcore_to_pyt_state_dict
from torch.distributed.checkpoint.metadata import Metadata

from lightning_megatron.distributed import process_groups


@dataclass
class Plan:
    """What this rank writes.

    Args:
        items: The index in the checkpoint and the tensor of each shard; the tensor is a view of live memory.
        metadata: The metadata of the whole checkpoint on rank 0; None on other ranks.
    """

    items: list[tuple[Any, torch.Tensor]]
    metadata: Metadata | None


class Planner:
    """Plans which rank writes what; a plan is kept as long as every rank's tensors are the same memory."""

    def __init__(self) -> None:
        self.last: Plan | None = None
        self._seen: Any = None

    def knows(self, tensors: list[tuple[str, Any]]) -> bool:
        """Whether the last plan is for these tensors of this rank; remembers the tensors."""
        seen = [(name, _memory(value)) for name, value in tensors]
        if seen != self._seen:
            self.last = None
        self._seen = seen
        return self.last is not None

    def plan(self, shards: list[ShardedTensor]) -> Plan:
        """Distribute the shards over their replicas and plan this rank's writes; all ranks call this.

        Raises:
            ValueError: The shards of all ranks overlap, or do not cover a tensor.
        """
        self.last = None
        named = {f"{s.key}/{number}": s for number, s in enumerate(_one_copy(shards))}
        distribution = determine_main_replica_uniform_distribution(named, process_groups.data_parallel())
        distribute_main_replicas_with_precomputed_distribution(named, process_groups.data_parallel(), distribution)
        mine: dict[str, list[ShardedTensor]] = {}
        for shard in shards:
            if is_main_replica(shard.replica_id):
                mine.setdefault(shard.key, []).append(shard)
        planner = MCoreSavePlanner(flatten_state_dict=False)
        planner.set_up_planner(mcore_to_pyt_state_dict(mine), is_coordinator=dist.get_rank() == 0)
        local = planner.create_local_plan()
        metadata = _whole_metadata(planner, local)
        self.last = Plan([(item.index, planner.resolve_data(item).detach()) for item in local.items], metadata)
        return self.last


def _memory(value: Any) -> Any:
    """What identifies a tensor: its memory, dtype, shape and strides; a number identifies itself."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr(), value.dtype, value.shape, value.stride()
    return value


def _one_copy(shards: list[ShardedTensor]) -> list[ShardedTensor]:
    """Drop copies of a weight that several chunks of this rank hold; the first in the pipeline stays."""
    found: dict[Any, ShardedTensor] = {}
    for shard in shards:
        known = found.setdefault((shard.key, shard.global_offset), shard)
        if shard.replica_id < known.replica_id:
            found[shard.key, shard.global_offset] = shard
    return list(found.values())


def _whole_metadata(planner: MCoreSavePlanner, local: Any) -> Metadata | None:
    """Join and check the plans of all ranks on rank 0; an error there is raised on all ranks."""
    first = dist.get_rank() == 0
    plans: list[Any] | None = [None] * dist.get_world_size() if first else None
    dist.gather_object(local, plans, group=process_groups.gloo_world())
    metadata, problem = None, [""]
    if first:
        try:
            _, metadata = planner.create_global_plan(plans)
        except ValueError as error:
            problem = [f"The shards of all ranks together are not whole tensors: {error}"]
    dist.broadcast_object_list(problem, src=0, group=process_groups.gloo_world())
    if problem[0]:
        raise ValueError(problem[0])
    return metadata

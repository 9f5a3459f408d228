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
        items: Each shard's index in the checkpoint, and its tensor, a view of live memory.
        metadata: Of the whole checkpoint, on rank 0.
    """

    items: list[tuple[Any, torch.Tensor]]
    metadata: Metadata | None


class Planner:
    """Says who writes what; planned once, and kept while the tensors of every rank are the same memory."""

    def __init__(self) -> None:
        self.last: Plan | None = None
        self._seen: Any = None

    def knows(self, tensors: list[tuple[str, Any]]) -> bool:
        """Whether the last plan stands for these tensors of this rank; they are remembered."""
        seen = [(name, _memory(value)) for name, value in tensors]
        if seen != self._seen:
            self.last = None
        self._seen = seen
        return self.last is not None

    def plan(self, shards: list[ShardedTensor]) -> Plan:
        """Share the shards out over their replicas and plan this rank's writes; called by all ranks.

        Raises:
            ValueError: The shards of all ranks overlap, or leave a part of a tensor out.
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
    """What tells a tensor from every other; a number is its own."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr(), value.dtype, value.shape, value.stride()
    return value


def _one_copy(shards: list[ShardedTensor]) -> list[ShardedTensor]:
    """Of a weight of which several of this rank's chunks hold a copy, the one that comes first in the pipeline."""
    found: dict[Any, ShardedTensor] = {}
    for shard in shards:
        known = found.setdefault((shard.key, shard.global_offset), shard)
        if shard.replica_id < known.replica_id:
            found[shard.key, shard.global_offset] = shard
    return list(found.values())


def _whole_metadata(planner: MCoreSavePlanner, local: Any) -> Metadata | None:
    """The plans of all ranks as one, checked, on the first; an error there is one on all ranks."""
    first = dist.get_rank() == 0
    plans: list[Any] | None = [None] * dist.get_world_size() if first else None
    dist.gather_object(local, plans, group=process_groups.gloo_world())
    metadata, problem = None, [""]
    if first:
        try:
            _, metadata = planner.create_global_plan(plans)
        except ValueError as error:
            problem = [f"The shards of all ranks do not make whole tensors: {error}"]
    dist.broadcast_object_list(problem, src=0, group=process_groups.gloo_world())
    if problem[0]:
        raise ValueError(problem[0])
    return metadata

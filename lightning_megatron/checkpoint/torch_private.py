"""The private names of torch 2.13 and megatron-core 0.16.1 that sharded checkpoints need, a function each.

``tests/unit/checkpoint/test_torch_private.py`` fails when one of them changes.
"""

from __future__ import annotations

from typing import Any

from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner
from megatron.core.dist_checkpointing.utils import _sharded_tensor_shard_id
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.utils.data import DataLoader


def place_in_file(name: str, start: int, length: int) -> Any:
    """Torch's record of where a shard is: ``length`` bytes of the file ``name`` from ``start`` on."""
    return _StorageInfo(name, start, length)


def load_into(tensors: dict[str, Any], reader: FileSystemReader, *, alone: bool = False) -> None:
    """Read from a checkpoint into tensors.

    Args:
        tensors: The tensors to fill, or their shards in torch's own form, by their names in the checkpoint.
        reader: The reader of the checkpoint.
        alone: Whether this process reads by itself; otherwise all ranks call this together.
    """
    _load_state_dict(tensors, reader, no_dist=alone, planner=MCoreLoadPlanner())


def shard_id(shard: ShardedTensor) -> Any:
    """megatron-core's id of a shard, by which its distribution of reads over the replicas is indexed."""
    return _sharded_tensor_shard_id(shard)


def stop_persistent_workers(loader: DataLoader[Any]) -> None:
    """Have a DataLoader start new workers for its next iterator, even with ``persistent_workers``."""
    loader._iterator = None

"""Reads tensors from a ``torch_dist`` directory, on all ranks together or one whole tensor at a time."""

from __future__ import annotations

import pickle
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.exchange_utils import (
    ShardDistribution,
    determine_main_replica_uniform_distribution,
)
from megatron.core.dist_checkpointing.strategies.torch import mcore_to_pyt_state_dict
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from lightning_megatron.checkpoint import torch_private
from lightning_megatron.checkpoint.shard_files import METADATA
from lightning_megatron.distributed import process_groups

# The classes that the pickle `.metadata` may name: torch's records of shapes and offsets, and no code.
_RECORDS = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "MetadataIndex",
        "StorageMeta", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))),
}  # fmt: skip


def stored(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Shape, dtype and shards of every tensor of a checkpoint."""
    found = _Reader(folder).read_metadata().state_dict_metadata
    return {key: value for key, value in found.items() if isinstance(value, TensorStorageMetadata)}


def read(shards: list[ShardedTensor], folder: Path) -> None:
    """Read into the shards' tensors; all ranks call this.

    Data that several data-parallel replicas need is read by one of them, each a share of it, and broadcast.

    Raises:
        CheckpointException: A rank could not read; the exception has the cause.
    """
    group = process_groups.data_parallel()
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    shared = [s for s in shards if s.data is not None and s.data.device.type == device]  # others cannot be sent
    distribution = determine_main_replica_uniform_distribution({"": shared}, group, ignore_groups=True)
    from_others = set()
    if distribution is not None:
        mine = dist.get_rank(group)
        from_others = {id(s) for s in shared if distribution.main_rank_for_shard[torch_private.shard_id(s)] != mine}
    by_key: dict[str, list[ShardedTensor]] = {}
    for shard in shards:
        if id(shard) not in from_others:
            by_key.setdefault(shard.key, []).append(shard)
    torch_private.load_into(mcore_to_pyt_state_dict(by_key, is_loading=True), _Reader(folder))
    if distribution is not None:
        _broadcast(shared, distribution, group, device)


def _broadcast(shards: list[ShardedTensor], distribution: ShardDistribution, group: Any, device: str) -> None:
    """Broadcast the shards from the replica that has read them.

    It does what megatron-core's ``FullyParallelLoadStrategyWrapper`` does, which needs CUDA.
    """
    tensors_of: dict[Any, list[torch.Tensor]] = defaultdict(list)
    for shard in shards:
        tensors_of[torch_private.shard_id(shard)].append(shard.data)
    for name, source in distribution.main_rank_for_shard.items():
        if len(distribution.all_ranks_for_shard[name]) == 1:
            continue
        about = distribution.shard_to_metadata[name]
        targets = tensors_of[name] or [torch.empty(about.local_shape, dtype=about.dtype, device=device)]
        sent = targets[0].contiguous()
        dist.broadcast(sent, src=dist.get_global_rank(group, source), group=group)
        for target in targets:
            if sent is not target:
                target.copy_(sent)


class WholeTensorReader:
    """Reads whole tensors, one at a time, without a process group.

    Args:
        folder: The ``torch_dist`` directory.
    """

    def __init__(self, folder: Path) -> None:
        self._reader = _Reader(folder)
        self.stored = stored(folder)

    def read(self, key: str) -> torch.Tensor:
        """Read the whole tensor ``key``."""
        about = self.stored[key]
        tensor = torch.empty(about.size, dtype=about.properties.dtype, device="cpu")
        torch_private.load_into({key: tensor}, self._reader, alone=True)
        return tensor


class _Reader(FileSystemReader):
    """torch's reader, except that the index may contain only records of tensors."""

    _metadata: Metadata | None = None

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Read the index at the first call, and keep it."""
        if self._metadata is not None:
            return self._metadata
        with (Path(self.path) / METADATA).open("rb") as file:
            metadata: Metadata = _RecordUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        self._metadata = metadata
        return metadata


class _RecordUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Find a class, if it is one of torch's records of tensors."""
        if name not in _RECORDS.get(module, ()):
            raise pickle.UnpicklingError(
                f"{METADATA} of a checkpoint names {module}.{name}, which is none of torch's records of tensors: the"
                " checkpoint is damaged, or made to run code, and was not loaded."
            )
        return super().find_class(module, name)

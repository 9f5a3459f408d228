"""Shards written to and read from a ``torch_dist`` directory, the format of ``megatron.core.dist_checkpointing``.

Its shards, plans and files are used as they are (its own ``load_plain_tensors`` reads what is written here); its writer
is not: that starts processes, which a script without ``if __name__ == "__main__"`` does not survive, and ends in
collectives that cannot run beside training.
"""

from __future__ import annotations

import io
import os
import pickle
import zlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.exchange_utils import (
    ShardDistribution,
    determine_main_replica_uniform_distribution,
)
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    MCoreSavePlanner,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.utils import _sharded_tensor_shard_id
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from lightning_megatron.distributed import process_groups

METADATA = ".metadata"
# What `.metadata`, a pickle, may name: torch's own records of shapes and offsets, and no code.
_RECORDS = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "MetadataIndex",
        "StorageMeta", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))),
}  # fmt: skip


class HashedFile:
    """A file opened for writing that keeps the CRC-32 and the number of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.crc32 = 0
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write, and count it in."""
        self.crc32 = zlib.crc32(data, self.crc32)
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error  # torch.save turns it into an error that says nothing of disks
            raise
        count = memoryview(data).nbytes
        self.size += count
        return count

    def flush(self) -> None:
        """Flush the file."""
        self._file.flush()


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


@dataclass
class Written:
    """One rank's file of a checkpoint.

    Args:
        name: The file's.
        size: In bytes.
        crc32: Of its content.
        where: Where in it each shard is, by its index.
        inode: Of the file, by which it is known again.
    """

    name: str
    size: int
    crc32: int
    where: dict[Any, Any]
    inode: int


def write(items: list[tuple[Any, torch.Tensor]], folder: Path, rank: int) -> Written:
    """Write this rank's file."""
    name = f"__{rank}_0.distcp"
    where: dict[Any, Any] = {}
    with (folder / name).open("wb") as raw:
        file = HashedFile(raw)
        for index, tensor in items:
            start = file.size
            whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
            # A view would take all of its storage along; one tensor's copy at a time is held.
            try:
                torch.save(tensor.cpu() if whole else tensor.cpu().clone(), file)  # type: ignore[arg-type]
            except RuntimeError:
                if file.error is None:
                    raise
                raise file.error from None
            where[index] = _StorageInfo(name, start, file.size - start)
        return Written(name, file.size, file.crc32, where, os.fstat(raw.fileno()).st_ino)


def link(written: Written, before: Path, folder: Path) -> bool:
    """Give a file of the folder ``before`` a second name in ``folder``; False where that cannot be."""
    try:
        os.link(before / written.name, folder / written.name)
    except OSError:  # it was removed meanwhile, or the file system has no second names
        return False
    if (folder / written.name).stat().st_ino != written.inode:
        (folder / written.name).unlink()
        return False
    return True


def write_index(folder: Path, metadata: Metadata, where: dict[Any, Any]) -> dict[str, HashedFile]:
    """Write what names the shards of all ranks' files, on the first rank."""
    record = Metadata(
        state_dict_metadata=metadata.state_dict_metadata, storage_data=where, storage_meta=StorageMeta(str(folder))
    )
    written = {}
    for name, content in ((METADATA, pickle.dumps(record)), ("common.pt", _nothing_in_common())):
        with (folder / name).open("wb") as raw:
            written[name] = HashedFile(raw)
            written[name].write(content)
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    config = (folder / "metadata.json").read_bytes()
    written["metadata.json"] = HashedFile(raw)
    written["metadata.json"].crc32, written["metadata.json"].size = zlib.crc32(config), len(config)
    return written


def stored(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Shape, type and pieces of every tensor of a checkpoint."""
    found = _Reader(folder).read_metadata().state_dict_metadata
    return {key: value for key, value in found.items() if isinstance(value, TensorStorageMetadata)}


def read(shards: list[ShardedTensor], folder: Path) -> None:
    """Fill the shards' tensors, on all ranks together.

    What several data-parallel replicas hold alike is read by one of them, each its share, and broadcast to the others.

    Raises:
        CheckpointException: A rank could not read, with its cause.
    """
    group = process_groups.data_parallel()
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    shared = [s for s in shards if s.data is not None and s.data.device.type == device]  # the group carries no others
    distribution = determine_main_replica_uniform_distribution({"": shared}, group, ignore_groups=True)
    from_others = set()
    if distribution is not None:
        mine = dist.get_rank(group)
        from_others = {id(s) for s in shared if distribution.main_rank_for_shard[_sharded_tensor_shard_id(s)] != mine}
    by_key: dict[str, list[ShardedTensor]] = {}
    for shard in shards:
        if id(shard) not in from_others:
            by_key.setdefault(shard.key, []).append(shard)
    _load_state_dict(mcore_to_pyt_state_dict(by_key, is_loading=True), _Reader(folder), planner=MCoreLoadPlanner())
    if distribution is not None:
        _broadcast(shared, distribution, group, device)


def _broadcast(shards: list[ShardedTensor], distribution: ShardDistribution, group: Any, device: str) -> None:
    """Give every replica the shards that one of them has read.

    As megatron-core's ``FullyParallelLoadStrategyWrapper``, which needs CUDA.
    """
    tensors_of: dict[Any, list[torch.Tensor]] = defaultdict(list)
    for shard in shards:
        tensors_of[_sharded_tensor_shard_id(shard)].append(shard.data)
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
    """Reads whole tensors, one at a time, without a process group."""

    def __init__(self, folder: Path) -> None:
        self._reader = _Reader(folder)
        self.stored = stored(folder)

    def read(self, key: str) -> torch.Tensor:
        """The whole tensor of ``key``."""
        about = self.stored[key]
        tensor = torch.empty(about.size, dtype=about.properties.dtype, device="cpu")
        _load_state_dict({key: tensor}, self._reader, no_dist=True, planner=MCoreLoadPlanner())
        return tensor


class _Reader(FileSystemReader):
    """torch's reader, but that its index may hold nothing but records."""

    _metadata: Metadata | None = None

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Read the index, once."""
        if self._metadata is not None:
            return self._metadata
        with (Path(self.path) / METADATA).open("rb") as file:
            metadata: Metadata = _RecordUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        self._metadata = metadata
        return metadata


class _RecordUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Look a name up, if it is one of a record."""
        if name not in _RECORDS.get(module, ()):
            raise pickle.UnpicklingError(
                f"{METADATA} of a checkpoint names {module}.{name}, which is none of torch's records of tensors:"
                " it is damaged, or made to run code. It was not loaded."
            )
        return super().find_class(module, name)


def _nothing_in_common() -> bytes:
    buffer = io.BytesIO()
    torch.save({}, buffer)
    return buffer.getvalue()

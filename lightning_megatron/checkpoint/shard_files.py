"""Writes the files of a ``torch_dist`` directory, the format of ``megatron.core.dist_checkpointing``.

megatron-core's shards, plans and file format are used as they are, and its ``load_plain_tensors`` reads the result. Its
writer is not used: it starts processes, which fails in a script without ``if __name__ == "__main__"``, and ends in
collectives that cannot run beside training.
"""

from __future__ import annotations

import io
import os
import pickle
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from lightning_megatron.checkpoint import torch_private

METADATA = ".metadata"


class HashedFile:
    """A file opened for writing that keeps the CRC-32 and the number of bytes written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.crc32 = 0
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write ``data``, and count it; an error is kept as well."""
        self.crc32 = zlib.crc32(data, self.crc32)
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error  # torch.save raises an error that does not mention the disk
            raise
        count = memoryview(data).nbytes
        self.size += count
        return count

    def flush(self) -> None:
        """Hand what is buffered to the system."""
        self._file.flush()


@dataclass
class Written:
    """One rank's file of a checkpoint.

    Args:
        name: Name of the file.
        size: Size in bytes.
        crc32: CRC-32 of the content.
        where: The offset and length of each shard in the file, by the shard's index.
        inode: Inode of the file, by which it is recognised.
    """

    name: str
    size: int
    crc32: int
    where: dict[Any, Any]
    inode: int


def write(items: list[tuple[Any, torch.Tensor]], folder: Path, rank: int) -> Written:
    """Write this rank's shards into its file."""
    name = f"__{rank}_0.distcp"
    where: dict[Any, Any] = {}
    with (folder / name).open("wb") as raw:
        file = HashedFile(raw)
        for index, tensor in items:
            start = file.size
            whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
            # Saving a view would save its whole storage; only one tensor is copied at a time.
            try:
                torch.save(tensor.cpu() if whole else tensor.cpu().clone(), file)  # type: ignore[arg-type]
            except RuntimeError:
                if file.error is None:
                    raise
                raise file.error from None
            where[index] = torch_private.place_in_file(name, start, file.size - start)
        return Written(name, file.size, file.crc32, where, os.fstat(raw.fileno()).st_ino)


def link(written: Written, before: Path, folder: Path) -> bool:
    """Hard-link a file of the folder ``before`` into ``folder``; whether that was possible."""
    try:
        os.link(before / written.name, folder / written.name)
    except OSError:  # the file was removed meanwhile, or the file system has no hard links
        return False
    if (folder / written.name).stat().st_ino != written.inode:
        (folder / written.name).unlink()
        return False
    return True


def write_index(folder: Path, metadata: Metadata, where: dict[Any, Any]) -> dict[str, HashedFile]:
    """Write the index of the shards in all ranks' files; called on rank 0."""
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


def _nothing_in_common() -> bytes:
    buffer = io.BytesIO()
    torch.save({}, buffer)
    return buffer.getvalue()

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

METADATA = ".metadata"


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


def _nothing_in_common() -> bytes:
    buffer = io.BytesIO()
    torch.save({}, buffer)
    return buffer.getvalue()

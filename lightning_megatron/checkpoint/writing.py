"""Writes one checkpoint from memory to disk: all ranks write their files, then rank 0 makes the checkpoint visible."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata

from lightning_megatron.checkpoint import shard_files
from lightning_megatron.checkpoint.manifest import CheckpointError, Staging, staging_folder
from lightning_megatron.distributed import collectives, process_groups

WEIGHTS = "weights"
RANKS = "ranks"


class RankShards:
    """This rank's shards, whose file is hard-linked into a later checkpoint of the same values.

    Args:
        items: The index in the checkpoint and the tensor of each shard: a view of live memory, or a copy.
    """

    def __init__(self, items: list[tuple[Any, torch.Tensor]]) -> None:
        self.items = items
        self._written: shard_files.Written | None = None
        self._folder = Path()

    def write(self, folder: Path, rank: int) -> shard_files.Written:
        """Write this rank's file into ``folder``, or hard-link the one that was written before."""
        if self._written is None or not shard_files.link(self._written, self._folder, folder):
            self._written = shard_files.write(self.items, folder, rank)
        return self._written

    def set_folder(self, folder: Path) -> None:
        """Note the folder in which the file is now."""
        self._folder = folder


@dataclass
class SaveContent:
    """What a save writes.

    Args:
        part: This rank's shards.
        metadata: The index of the shards of all ranks, on rank 0.
        rank_state: This rank's random states and position in the data, serialised.
        files: Names and contents of further files, on rank 0.
        manifest: Entries of the manifest, on rank 0.
    """

    part: RankShards
    metadata: Metadata | None
    rank_state: bytes
    files: dict[str, bytes]
    manifest: dict[str, Any]


def write(content: SaveContent, path: Path) -> None:
    """Write this rank's files; rank 0 makes the checkpoint visible when all ranks have written theirs.

    Raises:
        CheckpointError: A rank could not write. Every rank raises the first cause, and no checkpoint is visible.
    """
    staging = _prepare(path)
    rank = dist.get_rank()
    files: dict[str, tuple[int, int]] = {}
    where: dict[Any, Any] = {}
    problem = ""
    try:
        files, where = _write_part(content, staging_folder(path), rank)
    except Exception as error:
        problem = describe(error)
    parts: list[Any] = [None] * dist.get_world_size()
    dist.gather_object((problem, files, where), parts if rank == 0 else None, group=process_groups.gloo_background())
    outcome = [""]
    if staging is not None:
        outcome = [next((part[0] for part in parts if part[0]), "")]
        if not outcome[0]:
            try:
                _publish(content, staging, parts)
            except Exception as error:
                outcome = [describe(error)]
        if outcome[0]:
            staging.abandon()
    dist.broadcast_object_list(outcome, src=0, group=process_groups.gloo_background())
    if outcome[0]:
        raise CheckpointError(f"{path} was not saved; earlier checkpoints are as they were. {outcome[0]}")
    content.part.set_folder(path / WEIGHTS)


def agree(problem: str, same: bool) -> bool:
    """Raise the first rank's problem on every rank, so that no rank waits for one that has stopped.

    Args:
        problem: What went wrong on this rank; empty if nothing did.
        same: A yes or no of this rank.

    Returns:
        Whether ``same`` is True on all ranks.

    Raises:
        CheckpointError: A rank has a problem.
    """
    votes = torch.tensor([not problem, same], dtype=torch.int32, device="cpu")
    dist.all_reduce(votes, op=dist.ReduceOp.MIN, group=process_groups.gloo_world())
    if not votes[0]:
        raise CheckpointError(next(filter(None, collectives.gather(problem, process_groups.gloo_world()))))
    return bool(votes[1])


def describe(error: BaseException) -> str:
    """Describe an error of this rank."""
    return f"Rank {dist.get_rank()} failed: {type(error).__name__}: {error}"


def _prepare(path: Path) -> Staging | None:
    """Create the directory on rank 0; if that fails, every rank raises the error."""
    staging = None
    problem = [""]
    if dist.get_rank() == 0:
        staging = Staging(path)
        try:
            staging.begin()
            (staging.folder / WEIGHTS).mkdir()
            (staging.folder / RANKS).mkdir()
        except OSError as error:
            problem = [f"Nothing can be saved to {path}: {error}"]
            staging.close()
    dist.broadcast_object_list(problem, src=0, group=process_groups.gloo_background())
    if problem[0]:
        raise CheckpointError(problem[0])
    return staging


def _write_part(content: SaveContent, folder: Path, rank: int) -> tuple[dict[str, tuple[int, int]], dict[Any, Any]]:
    written = content.part.write(folder / WEIGHTS, rank)
    files = {f"{WEIGHTS}/{written.name}": (written.size, written.crc32)}
    own = {f"{RANKS}/{rank:05d}.pt": content.rank_state, **content.files}
    for other, data in own.items():
        with (folder / other).open("wb") as raw:
            hashed = shard_files.HashedFile(raw)
            hashed.write(data)
        files[other] = (hashed.size, hashed.crc32)
    for name in files:
        _sync(folder / name)
    return files, written.where


def _publish(content: SaveContent, staging: Staging, parts: list[Any]) -> None:
    files = {name: known for part in parts for name, known in part[1].items()}
    where = {index: place for part in parts for index, place in part[2].items()}
    assert content.metadata is not None
    for name, file in shard_files.write_index(staging.folder / WEIGHTS, content.metadata, where).items():
        files[f"{WEIGHTS}/{name}"] = (file.size, file.crc32)
        _sync(staging.folder / WEIGHTS / name)
    staging.publish({**content.manifest, "saved_at": time.time()}, files)


def _sync(file: Path) -> None:
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())

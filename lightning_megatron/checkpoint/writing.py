"""One save, from what is in memory to a checkpoint that is whole: the same steps before or beside training."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lightning_megatron import groups
from lightning_megatron.checkpoint import weights
from lightning_megatron.checkpoint.manifest import CheckpointError, Staging, staging_folder

WEIGHTS = "weights"
RANKS = "ranks"


@dataclass
class Content:
    """What a save writes.

    Args:
        plan: This rank's shards, views of live tensors or copies of them.
        rank_state: This rank's random states and the like, serialised.
        files: Of the first rank: names and contents of further files.
        manifest: Of the first rank: what the manifest says.
    """

    plan: weights.Plan
    rank_state: bytes
    files: dict[str, bytes]
    manifest: dict[str, Any]


def prepare(path: Path) -> Staging | None:
    """Make the directory to write into, on the first rank; its failure is every rank's.

    Raises:
        CheckpointError: It cannot be made.
    """
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
    dist.broadcast_object_list(problem, src=0, group=groups.on_host())
    if problem[0]:
        raise CheckpointError(problem[0])
    return staging


def write(content: Content, path: Path, staging: Staging | None) -> None:
    """Write this rank's part; the first rank makes the checkpoint visible when all have written theirs.

    Raises:
        CheckpointError: A rank could not write; the first cause, on every rank. Nothing is visible then.
    """
    rank = dist.get_rank()
    files: dict[str, tuple[int, int]] = {}
    where: dict[Any, Any] = {}
    problem = ""
    try:
        files, where = _write_part(content, staging_folder(path), rank)
    except Exception as error:
        problem = _describe(error, rank)
    parts: list[Any] = [None] * dist.get_world_size()
    dist.gather_object((problem, files, where), parts if rank == 0 else None, group=groups.on_host())
    outcome = [""]
    if staging is not None:
        outcome = [next((part[0] for part in parts if part[0]), "")]
        if not outcome[0]:
            try:
                _publish(content, staging, parts)
            except Exception as error:
                outcome = [_describe(error, rank)]
        if outcome[0]:
            staging.abandon()
    dist.broadcast_object_list(outcome, src=0, group=groups.on_host())
    if outcome[0]:
        raise CheckpointError(f"{path} was not saved; earlier checkpoints are as they were. {outcome[0]}")


def _write_part(content: Content, folder: Path, rank: int) -> tuple[dict[str, tuple[int, int]], dict[Any, Any]]:
    name, file, where = weights.write(content.plan.items, folder / WEIGHTS, rank)
    files = {f"{WEIGHTS}/{name}": (file.size, file.crc32)}
    own = {f"{RANKS}/{rank:05d}.pt": content.rank_state, **content.files}
    for other, data in own.items():
        with (folder / other).open("wb") as raw:
            hashed = weights.HashedFile(raw)
            hashed.write(data)
        files[other] = (hashed.size, hashed.crc32)
    for written in files:
        _sync(folder / written)
    return files, where


def _publish(content: Content, staging: Staging, parts: list[Any]) -> None:
    files = {name: known for part in parts for name, known in part[1].items()}
    where = {index: place for part in parts for index, place in part[2].items()}
    assert content.plan.metadata is not None
    for name, file in weights.write_index(staging.folder / WEIGHTS, content.plan.metadata, where).items():
        files[f"{WEIGHTS}/{name}"] = (file.size, file.crc32)
        _sync(staging.folder / WEIGHTS / name)
    staging.publish({**content.manifest, "saved_at": time.time()}, files)


def _sync(file: Path) -> None:
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def _describe(error: Exception, rank: int) -> str:
    return f"Rank {rank} failed: {type(error).__name__}: {error}"


class HostCopies:
    """Copies of tensors in host memory, which is kept from one save to the next."""

    def __init__(self) -> None:
        self._kept: list[torch.Tensor] = []

    def of(self, items: list[tuple[Any, torch.Tensor]]) -> list[tuple[Any, torch.Tensor]]:
        """Copy the tensors; from then on training may change them."""
        if [_kind(t) for t in self._kept] != [_kind(t) for _, t in items]:
            on_gpu = any(tensor.is_cuda for _, tensor in items)
            self._kept = [torch.empty(t.shape, dtype=t.dtype, pin_memory=on_gpu) for _, t in items]
        for kept, (_, tensor) in zip(self._kept, items, strict=True):
            kept.copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return [(index, kept) for (index, _), kept in zip(items, self._kept, strict=True)]


class Background:
    """Runs one job at a time in a thread, and hands its failure to whoever waits."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._afterwards: list[Callable[[], None]] = []

    @property
    def busy(self) -> bool:
        """Whether a job was started that nobody has waited for."""
        return self._thread is not None

    def start(self, job: Callable[[], None]) -> None:
        """Run ``job``; the last one must have been waited for."""

        def run() -> None:
            try:
                job()
            except BaseException as error:
                self._error = error

        # A daemon: a run that is torn down without a wait must not be held by it.
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def after(self, action: Callable[[], None]) -> None:
        """Do something once the job has succeeded; dropped if it fails."""
        self._afterwards.append(action)

    def wait(self) -> None:
        """Wait for the job, then raise what it raised."""
        if self._thread is None:
            return
        self._thread.join()
        error, actions = self._error, self._afterwards
        self._thread, self._error, self._afterwards = None, None, []
        if error is not None:
            raise error
        for action in actions:
            action()


def _kind(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype

"""A checkpoint is a directory: Lightning's own state once, and each rank's weights and optimizer state in its file.

It loads into the layout that wrote it; any other is refused by name.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lightning_megatron.layout import ParallelLayout

_TRAINER = "trainer.pt"
_SHARDED = ("state_dict", "optimizer_states")


def save(checkpoint: dict[str, Any], path: Path, layout: ParallelLayout) -> None:
    """Write this rank's shard, and on rank 0 the rest; visible under ``path`` when all of it is written.

    Args:
        checkpoint: What Lightning collected on this rank.
        path: The same on every rank.
        layout: The sizes it belongs to.
    """
    rank = dist.get_rank()
    unfinished = path.with_name(path.name + ".unfinished")
    if rank == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    dist.barrier()
    torch.save({key: checkpoint[key] for key in _SHARDED if key in checkpoint}, unfinished / _shard_name(rank))
    if rank == 0:
        rest = {key: value for key, value in checkpoint.items() if key not in _SHARDED}
        torch.save({**rest, "layout": asdict(layout)}, unfinished / _TRAINER)
    dist.barrier()
    if rank == 0:
        _remove(path)
        unfinished.rename(path)
    dist.barrier()


def load(path: Path, layout: ParallelLayout, weights_only: bool | None) -> dict[str, Any]:
    """Read what ``save`` wrote for this rank.

    Raises:
        FileNotFoundError: No such checkpoint.
        ValueError: It was written by another layout.
    """
    if not (path / _TRAINER).is_file():
        raise FileNotFoundError(f"{path} is no checkpoint of MegatronStrategy: it has no {_TRAINER}.")
    # Lightning's own state holds plain classes; torch's default for a file that the user names.
    checkpoint: dict[str, Any] = torch.load(path / _TRAINER, map_location="cpu", weights_only=bool(weights_only))
    written = checkpoint.pop("layout")
    if written != asdict(layout):
        raise ValueError(
            f"{path} was written by the layout {_short(written)}, and this run has {_short(asdict(layout))}."
            " Resume with the sizes that wrote it."
        )
    checkpoint.update(torch.load(path / _shard_name(dist.get_rank()), map_location="cpu", weights_only=False))
    return checkpoint


def remove(path: Path) -> None:
    """Delete a checkpoint; called by every rank, done by the first."""
    if dist.get_rank() == 0:
        _remove(path)


def _shard_name(rank: int) -> str:
    return f"rank_{rank:05d}.pt"


def _short(layout: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in layout.items() if value not in (None, 1, False))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

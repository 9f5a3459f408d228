"""Reads a checkpoint: on failure every rank raises the same error, and nothing of the module has changed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from megatron.core.dist_checkpointing import ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException

from lightning_megatron.checkpoint import manifest, mismatches, optimizer_shards, shard_reader, trainer_state, writing
from lightning_megatron.checkpoint.manifest import CheckpointError
from lightning_megatron.checkpoint.tensor_shards import ShardSpec, shard_specs, specs_by_parameter
from lightning_megatron.distributed import collectives, process_groups
from lightning_megatron.training.optimizer import ShardedOptimizer
from lightning_megatron.training.whole_optimizer import WholeOptimizer

T = TypeVar("T")


def choose(path: Path, trainer: pl.Trainer) -> tuple[Path, dict[str, Any]]:
    """Return the checkpoint to load and its manifest: ``path``, or the newest complete one if ``last`` is damaged.

    Raises:
        CheckpointError: There is no complete checkpoint.
    """
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        answer = [_choose(path, trainer)]
    dist.broadcast_object_list(answer, src=0, group=process_groups.gloo_world())
    if answer[0] is None:
        raise manifest.NoCheckpointError(path)
    if isinstance(answer[0], str):
        raise CheckpointError(answer[0])
    return answer[0]


def is_one_file(path: Path) -> bool:
    """Whether a checkpoint is a single file, as rank 0 sees it."""
    answer = [path.is_file()]
    dist.broadcast_object_list(answer, src=0, group=process_groups.gloo_world())
    return answer[0]


def check(path: Path, about: dict[str, Any], checksums: bool) -> None:
    """Check the files, each rank its share; all ranks raise what any of them finds.

    Raises:
        CheckpointError: A file is damaged; the text lists all that are.
    """
    names = sorted(about["files"])[dist.get_rank() :: dist.get_world_size()]
    every = collectives.gather(manifest.find_damage(path, about, names, checksums), process_groups.gloo_world())
    found = [line for lines in every for line in lines]
    if found:
        raise CheckpointError(f"{path} is damaged, and nothing of it was loaded:\n{mismatches.as_list(found)}")


def on_each_rank(path: Path, verified: bool, read: Callable[[], T]) -> T:
    """Return what ``read`` returns; if it fails on one rank, all ranks raise an error.

    Raises:
        CheckpointError: The text has the first cause.
    """
    problem = ""
    try:
        found = read()
    except CheckpointError as error:
        problem = str(error)
    except (Exception, CheckpointException) as error:  # torch's CheckpointException is no Exception
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        hint = (
            "" if verified else " With Checkpointing(verify_checksums=True) the error names the file that has changed."
        )
        told = writing.describe(cause).split(". ")[0]  # torch goes on to advise running the code in the file
        problem = f"{path} could not be read, and nothing of it was loaded. {told}.{hint}"
    writing.agree(problem, True)
    return found


def trainer_state_of(path: Path, about: dict[str, Any], trust: bool) -> dict[str, Any]:
    """Read what Lightning and its callbacks keep of a run."""
    objects = path / trainer_state.OBJECTS
    return trainer_state.join(
        (path / trainer_state.STATE).read_bytes(),
        objects.read_bytes() if objects.is_file() else None,
        about["objects"],
        trust,
    )


def read(
    path: Path, module: pl.LightningModule, optimizer: ShardedOptimizer | WholeOptimizer | None
) -> tuple[dict[str, torch.Tensor], Callable[[], None] | None]:
    """Read this rank's tensors into buffers, so that nothing has changed if a file turns out to be unreadable.

    Args:
        path: The directory of the checkpoint.
        module: The module that takes the weights.
        optimizer: The optimizer that takes the state; None reads no state.

    Returns:
        The weights by their names in the module's ``state_dict``, and a function that gives the optimizer its state.

    Raises:
        CheckpointError: The architectures differ, and the module's ``strict_loading`` is set.
    """
    where, stored = shard_specs(module), shard_reader.stored(path / writing.WEIGHTS)
    tensors, shards = _buffers(path, module, where, stored)
    finish, problem = None, ""
    try:
        if optimizer is not None:
            loading = optimizer_shards.Loading(optimizer, specs_by_parameter(module, where), stored)
            shards += loading.shards
            finish = loading.finish
    except CheckpointError as error:
        problem = f"{path} was not loaded. {error}"
    writing.agree(problem, True)
    shard_reader.read(shards, path / writing.WEIGHTS)
    return tensors, finish


def _buffers(
    path: Path, module: pl.LightningModule, where: dict[str, ShardSpec], stored: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], list[ShardedTensor]]:
    shapes = {key: tuple(value.size) for key, value in stored.items() if key.startswith("model.")}
    held = {f"model.{where[n].key}": where[n].shape for n in module.state_dict() if n in where}
    lines = mismatches.differences(mismatches.of_all_ranks(held), shapes)
    if lines and module.strict_loading:
        mismatches.raise_mismatches(path, lines)
    if lines:
        rank_zero_warn(f"Not loaded from {path}, since the model differs:\n{mismatches.as_list(lines.values())}")
    tensors: dict[str, torch.Tensor] = {}
    shards = []
    for name, tensor in module.state_dict().items():
        if not isinstance(tensor, torch.Tensor) or f"model.{where[name].key}" in lines:
            continue
        tensors[name] = torch.zeros_like(tensor) if where[name].is_padded else torch.empty_like(tensor)
        shards += where[name].shards(tensors[name], _source(where[name], tensor, stored))
    return tensors, shards


def _source(spec: ShardSpec, tensor: torch.Tensor, stored: dict[str, Any]) -> str:
    """The stored tensor for a weight: fp32 runs read the fp32 main weights of a run in low precision."""
    main = f"optimizer.{optimizer_shards.MAIN_WEIGHT}.{spec.key}"
    return main if tensor.dtype == torch.float32 and main in stored else f"model.{spec.key}"


def _choose(path: Path, trainer: pl.Trainer) -> tuple[Path, dict[str, Any]] | str | None:
    left = manifest.leftovers(path.parent)
    if left:
        names = ", ".join(sorted(p.name for p in left))
        rank_zero_warn(f"{path.parent}: a killed save left {names}. It is skipped now, and removed by the next save.")
    try:
        about = manifest.read(path)
        wrong = manifest.find_damage(path, about, list(about["files"]), checksums=False)
        if wrong:
            raise CheckpointError(f"{path} is damaged, and nothing of it was loaded:\n{mismatches.as_list(wrong)}")
        return path, about
    except CheckpointError as error:
        other = manifest.newest(path.parent) if _is_last(path, trainer) else None
        if other is None:
            return None if isinstance(error, manifest.NoCheckpointError) else str(error)
        rank_zero_warn(f"{error}\nIt is skipped; the newest complete checkpoint in its folder is {other}.")
        rank_zero_info(f"Resuming from {other}.")
        return other, manifest.read(other)


def _is_last(path: Path, trainer: pl.Trainer) -> bool:
    """Whether a name is ``last``, or a numbered one of ModelCheckpoint, such as ``last-v1``."""
    names = {"last", *(getattr(callback, "CHECKPOINT_NAME_LAST", "last") for callback in trainer.checkpoint_callbacks)}
    return any(re.fullmatch(rf"{re.escape(name)}(-v\d+)?", path.stem) for name in names)

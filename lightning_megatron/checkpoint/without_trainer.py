"""Loads a checkpoint into a module without a Trainer."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_megatron.checkpoint import consolidate, mismatches, shard_reader, upcycling, writing
from lightning_megatron.checkpoint.tensor_shards import ShardSpec, shard_specs

M = TypeVar("M", bound=pl.LightningModule)


def construct(cls: type[M], path: Path, trust: bool, changes: dict[str, Any]) -> M:
    """Construct the module with the arguments of the run that saved it, except for ``changes``."""
    consolidate.verified_manifest(path)
    saved = dict(consolidate.state_of(path, trust).get("hyper_parameters", {}))
    parameters = inspect.signature(cls.__init__).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    known = {name: value for name, value in saved.items() if takes_all or name in parameters}
    module = cls(**{**known, **changes})
    module.hparams.update({name: value for name, value in saved.items() if name not in {**known, **changes}})
    return module


def verified(path: Path) -> Path:
    """Return ``path`` after checking that all files of the checkpoint are as they were written.

    Raises:
        CheckpointError: The checkpoint is incomplete or damaged.
    """
    consolidate.verified_manifest(path)
    return path


def fill(module: pl.LightningModule, path: Path, strict: bool, upcycle: bool = False) -> None:
    """Load the checkpoint's weights into a built module, one tensor at a time; fp32 main weights are preferred.

    Each rank takes its shards, and all ranks call this.

    Args:
        module: The module.
        path: The checkpoint.
        strict: Whether every tensor must be in both.
        upcycle: Whether experts are copies of the checkpoint's dense layers; then it need not have their routers.

    Raises:
        CheckpointError: The architectures differ, and ``strict`` is set; or there is nothing to upcycle.
    """
    where: dict[str, list[tuple[str, ShardSpec]]] = {}
    for name, spec in shard_specs(module).items():
        where.setdefault(spec.key, []).append((name, spec))
    sizes = {key: tuple(value.size) for key, value in shard_reader.stored(path / writing.WEIGHTS).items()}
    stored = {key: size for key, size in sizes.items() if key.startswith("model.")}
    wanted = mismatches.of_all_ranks({f"model.{key}": held[0][1].shape for key, held in where.items()})
    dense = upcycling.sources(wanted, stored, path) if upcycle else {}
    for key, source in dense.items():
        stored[key] = (wanted[key][0], *stored.pop(source))
    lines = mismatches.differences(wanted, stored)
    routers = {key for key in lines if upcycle and upcycling.is_of_router(key)}
    lacking, lines = lines.keys(), {key: line for key, line in lines.items() if key not in routers}
    if lines and strict:
        mismatches.raise_mismatches(path, lines)
    if lines:
        rank_zero_warn(f"Not loaded from {path}, since the model differs:\n{mismatches.as_list(lines.values())}")
    state = module.state_dict()
    copied = {key.removeprefix("model."): source.removeprefix("model.") for key, source in dense.items()}
    keys = {copied.get(key, key): key for key in where.keys() - _without_model(lacking)}
    with torch.no_grad():
        for source, tensor in consolidate.tensors(path, prefer_main=True, only=keys.keys()):
            key = keys[source]
            for name, spec in where[key]:
                tensor = tensor.expand(spec.shape) if key in copied else tensor
                if spec.is_padded:
                    state[name].zero_()
                for shard in spec.shards(state[name], key):
                    shard.data.copy_(tensor[shard.global_slice()])


def _without_model(keys: Iterable[str]) -> set[str]:
    return {key.removeprefix("model.") for key in keys}

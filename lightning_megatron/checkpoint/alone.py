"""A module from a checkpoint on a plain process: no Trainer, no launcher, the whole model here."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch

from lightning_megatron.checkpoint import comparison, export
from lightning_megatron.checkpoint.places import places

M = TypeVar("M", bound=pl.LightningModule)


def construct(cls: type[M], path: Path, trust: bool, changes: dict[str, Any]) -> M:
    """Make the module as it was made for the run, but for ``changes``."""
    export.checked(path)
    saved = dict(export.state_of(path, trust).get("hyper_parameters", {}))
    parameters = inspect.signature(cls.__init__).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    known = {name: value for name, value in saved.items() if takes_all or name in parameters}
    return cls(**{**known, **changes})


def fill(module: pl.LightningModule, path: Path, strict: bool) -> None:
    """Give the built module the checkpoint's weights, the fp32 ones where there are any.

    Raises:
        CheckpointError: The architectures differ, and ``strict`` is set.
    """
    where = {place.key: (name, place) for name, place in places(module).items()}
    state = module.state_dict()
    found = dict(export.tensors(path, prefer_main=True))
    wanted = {f"model.{key}": place.shape for key, (_, place) in where.items()}
    lines = comparison.differences(wanted, {f"model.{key}": tuple(tensor.shape) for key, tensor in found.items()})
    if lines and strict:
        comparison.refuse(path, lines)
    for key, (name, place) in where.items():
        if f"model.{key}" not in lines:
            if place.is_padded:
                state[name].zero_()
            with torch.no_grad():
                for shard in place.shards(state[name], key):
                    shard.data.copy_(found[key][shard.global_slice()])

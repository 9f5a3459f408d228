"""Compares the tensors of a model and a checkpoint, and lists the names and shapes that differ."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist

from lightning_megatron.checkpoint.manifest import CheckpointError
from lightning_megatron.distributed import process_groups

_SHOWN = 20


def of_all_ranks(wanted: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of the whole model's tensors, the same on every rank.

    Args:
        wanted: Those of which this rank holds a part.
    """
    every: list[dict[str, tuple[int, ...]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(every, wanted, group=process_groups.gloo_world())
    return {key: tuple(shape) for shapes in every for key, shape in shapes.items()}


def differences(model: dict[str, tuple[int, ...]], stored: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """Compare the model of all ranks together with a checkpoint.

    Args:
        model: The shapes of the whole model's tensors, as ``of_all_ranks`` returns them.
        stored: The shapes of the checkpoint's tensors.

    Returns:
        A line for each key that differs, the same on every rank.
    """
    lines = {}
    for key in model.keys() | stored.keys():
        if key not in stored:
            lines[key] = f"{key} {list(model[key])} is in the model and not in the checkpoint"
        elif key not in model:
            lines[key] = f"{key} {list(stored[key])} is in the checkpoint and not in the model"
        elif model[key] != tuple(stored[key]):
            lines[key] = f"{key} is {list(model[key])} in the model and {list(stored[key])} in the checkpoint"
    return lines


def as_list(lines: Iterable[str]) -> str:
    """Write the lines as a list, shortest first, and no more than twenty."""
    ordered = sorted(lines, key=lambda line: (len(line), line))
    more = [f"  ... and {len(ordered) - _SHOWN} more"] if len(ordered) > _SHOWN else []
    return "\n".join([*(f"  {line}" for line in ordered[:_SHOWN]), *more])


def raise_mismatches(path: object, lines: dict[str, str]) -> None:
    """Raise an error that lists the differences.

    Raises:
        CheckpointError: Always.
    """
    dense = any(".mlp.experts." in key and "not in the checkpoint" in line for key, line in lines.items())
    upcycle = " load_weights(upcycle=True) copies dense layers into experts." if dense else ""
    raise CheckpointError(
        f"{path} is of another architecture; {len(lines)} tensors differ:\n{as_list(lines.values())}\n"
        "Build the model with the configuration of the run that saved it; or load only the tensors that agree, with"
        f" strict_loading=False on the module, or load_weights(strict=False).{upcycle}"
    )

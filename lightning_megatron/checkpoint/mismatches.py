"""A model and a checkpoint held against each other: names and shapes that differ, the shortest first."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist

from lightning_megatron.checkpoint.manifest import CheckpointError
from lightning_megatron.distributed import process_groups

_SHOWN = 20


def differences(wanted: dict[str, tuple[int, ...]], stored: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """What differs, by key, on all ranks together.

    Args:
        wanted: Shapes of this rank's whole tensors.
        stored: Shapes of the checkpoint's.

    Returns:
        A line for each key, the same on every rank.
    """
    every: list[dict[str, tuple[int, ...]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(every, wanted, group=process_groups.gloo_world())
    model = {key: tuple(shape) for shapes in every for key, shape in shapes.items()}
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
    """The lines as a list, shortest first, cut off after twenty."""
    ordered = sorted(lines, key=lambda line: (len(line), line))
    more = [f"  ... and {len(ordered) - _SHOWN} more"] if len(ordered) > _SHOWN else []
    return "\n".join([*(f"  {line}" for line in ordered[:_SHOWN]), *more])


def raise_mismatches(path: object, lines: dict[str, str]) -> None:
    """Raise an error that lists what differs.

    Raises:
        CheckpointError: Always.
    """
    raise CheckpointError(
        f"{path} is of another architecture; {len(lines)} tensors differ:\n{as_list(lines.values())}\n"
        "Build the model that wrote it, or load the rest: strict_loading=False on the module, or in load_weights"
        " strict=False."
    )

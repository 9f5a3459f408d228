"""Finds the dense feed-forward layers of a checkpoint of which the experts of a mixture start as copies."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_megatron.checkpoint.manifest import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]


def sources(model: Shapes, stored: Shapes, path: object) -> dict[str, str]:
    """For each tensor of experts that the checkpoint lacks, the dense layer's that it has.

    Args:
        model: The shapes of the whole model's tensors.
        stored: The shapes of the checkpoint's.
        path: The checkpoint, for errors.

    Raises:
        CheckpointError: There is none, since the model has no experts, or the checkpoint no dense layers for them.
    """
    dense = {key: key.replace(".mlp.experts.", ".mlp.") for key in model if ".mlp.experts." in key}
    found = {key: source for key, source in dense.items() if key not in stored and source in stored}
    if not found:
        lacks = "the checkpoint has no dense feed-forward layers in their places" if dense else "the model has none"
        raise CheckpointError(f"{path}: upcycle=True copies dense layers into experts, and {lacks}. Leave it out.")
    return found


def is_of_router(key: str) -> bool:
    """Whether a tensor is a router's, which no dense layer has."""
    return ".mlp.router." in key

"""Moves batches to a GPU beside its computations: from pinned memory, and on a stream of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection


def move_beside_computation(batch: Any, device: torch.device, move: Callable[[Any], Any], hooks: bool) -> Any:
    """Move a batch while the device still computes the step before; on the CPU, just move it.

    The host is ahead of the device, so a batch arrives before the step that it is for. Nothing is read from a loader
    any earlier, so the position in the data is that of the steps.

    Args:
        batch: The batch, on the host.
        device: Where it goes.
        move: Moves it.
        hooks: Whether ``move`` runs hooks of the user's, whose computations stay on the stream of all others.

    Returns:
        The batch on the device; what the current stream does from now on finds it complete.
    """
    if device.type != "cuda":
        return move(batch)
    batch = apply_to_collection(batch, torch.Tensor, _pinned, allow_frozen=True)
    if hooks:
        return move(batch)
    copies, computations = _stream_for_copies(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(copies):
        moved = move(batch)
    computations.wait_stream(copies)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_cuda:
            tensor.record_stream(computations)  # its memory is not given away before these have used it
        return tensor

    return apply_to_collection(moved, torch.Tensor, keep, allow_frozen=True)


@cache
def _stream_for_copies(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in pinned memory, from which a copy does not stop the host; torch keeps that memory for the next."""
    fits = tensor.device.type == "cpu" and tensor.layout is torch.strided and tensor.numel() > 0
    return tensor.pin_memory() if fits and not tensor.is_pinned() else tensor

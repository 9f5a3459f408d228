"""The gradient norm of the whole model, and clipping by it, computed on the device without the host seeing a number."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import MegatronOptimizer

from lightning_megatron.distributed.megatron_versions import gradients_counted_here


@torch.no_grad()
def gradient_norm(inner: MegatronOptimizer, device: torch.device) -> torch.Tensor:
    """The 2-norm of the gradients of all ranks, each counted once; a float64 scalar, the same on every rank.

    megatron-core's own function brings the norm of each tensor to the host, where Apex and Transformer Engine
    are missing; this one chooses the same gradients and sums over the same ranks.

    Args:
        inner: megatron-core's optimizer, whose gradients are ready.
        device: The device of the gradients, for a rank that has none.
    """
    gradients = gradients_counted_here(inner)
    norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device=device)
    squares = norm.float().square()
    dist.all_reduce(squares, group=inner.get_grad_stats_parallel_group())
    return squares.double().sqrt()


@torch.no_grad()
def clip_gradients(inner: MegatronOptimizer, largest: float, norm: torch.Tensor) -> None:
    """Scale the gradients so that their norm, which is ``norm`` now, is at most ``largest``."""
    torch.nn.utils.clip_grads_with_norm_(inner.get_parameters(), largest, norm.float())

"""The gradient norm of the whole model, and clipping by it, computed on the device without the host seeing a number."""

from __future__ import annotations

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer

from lightning_megatron.training import counted_once


@torch.no_grad()
def gradient_norm(inner: MegatronOptimizer, device: torch.device) -> torch.Tensor:
    """The 2-norm of the gradients of all ranks, each counted once; a float64 scalar, the same on every rank.

    megatron-core's own function brings the norm of each tensor to the host, where Apex and Transformer Engine
    are missing, and knows one group of ranks for all weights.

    Args:
        inner: megatron-core's optimizer, whose gradients are ready.
        device: The device of the gradients, for a rank that has none.
    """

    def squares(weights: list[torch.Tensor]) -> torch.Tensor:
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device=device)
        return norm.float().square()

    return counted_once.total(inner, inner.get_parameters(), squares).double().sqrt()


def zeros_in_gradients(inner: MegatronOptimizer, device: torch.device) -> torch.Tensor:
    """How many gradients of the whole model are exactly 0; a float64 scalar, the same on every rank.

    Args:
        inner: megatron-core's optimizer, whose gradients are ready.
        device: The device of the gradients, for a rank that has none.
    """

    def zeros(weights: list[torch.Tensor]) -> torch.Tensor:
        counts = [(weight.grad == 0).sum() for weight in weights if weight.grad is not None]
        return torch.stack(counts).sum().double() if counts else torch.zeros((), dtype=torch.float64, device=device)

    return counted_once.total(inner, inner.get_parameters(), zeros)


@torch.no_grad()
def clip_gradients(inner: MegatronOptimizer, largest: float, norm: torch.Tensor) -> None:
    """Scale the gradients so that their norm, which is ``norm`` now, is at most ``largest``."""
    torch.nn.utils.clip_grads_with_norm_(inner.get_parameters(), largest, norm.float())

"""Looks whether losses and the gradient norm are finite, in one read from the device, and words what is not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist

# What happens when a loss or the gradient norm is NaN or infinite.
OnNonfinite = Literal["raise", "skip", "ignore"]


class NonFiniteLossError(RuntimeError):
    """A loss or a gradient norm that is NaN or infinite, raised on every rank."""


def are_finite(values: Sequence[torch.Tensor]) -> bool:
    """Whether all ``values``, scalars of one device, are finite. The host waits once, for the last of them."""
    return not values or bool(torch.isfinite(torch.stack([value.double().reshape(()) for value in values])).all())


def stop_on_bad_loss(loss: torch.Tensor, local_loss: torch.Tensor, step: int) -> None:
    """Stop every rank when the loss of the global batch is NaN or infinite.

    Args:
        loss: The loss of the global batch, the same on every rank.
        local_loss: This rank's part of the loss.
        step: The number of the optimizer step.

    Raises:
        NonFiniteLossError: The loss is not finite. The message names the step, the ranks and the last good step.
    """
    if bool(torch.isfinite(loss).all()):
        return
    # The global loss is NaN on every rank, so all ranks come here; find out which of them computed it.
    finite: list[bool] = [True] * dist.get_world_size()
    dist.all_gather_object(finite, bool(torch.isfinite(local_loss).all()))
    seen = ", ".join(str(rank) for rank, is_finite in enumerate(finite) if not is_finite)
    where = f"computed on rank {seen}" if seen else "finite on each rank; only the sum over them is not"
    last_good = f"the last good step was {step - 1}" if step else "there was no good step before it"
    raise NonFiniteLossError(
        f"The loss of step {step} is {loss.item()} ({where}); {last_good}."
        " Lower the learning rate, clip gradients (gradient_clip_val=1.0), look at the batch with"
        " Trainer(detect_anomaly=True), or go on regardless with MegatronStrategy(on_nonfinite='ignore')."
    )


def stop_on_bad_norm(norm: torch.Tensor) -> None:
    """Stop every rank when the gradient norm, the same on every rank, is NaN or infinite.

    Raises:
        NonFiniteLossError: The norm is not finite; the message has it.
    """
    if bool(torch.isfinite(norm)):
        return
    raise NonFiniteLossError(
        f"The gradient norm is {norm.item()}. The weights are as the last step left them. Lower the learning rate,"
        " inspect the batch, or skip such steps with MegatronStrategy(on_nonfinite='skip')."
    )

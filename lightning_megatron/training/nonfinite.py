"""Looks whether losses and the gradient norm are finite, in one read, withholds steps, and words what is not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
import torch.distributed as dist

# What happens when a loss or the gradient norm is NaN or infinite.
OnNonfinite = Literal["raise", "skip", "ignore"]


class NonFiniteLossError(RuntimeError):
    """A loss or a gradient norm that is NaN or infinite, raised on every rank."""


class Unfit:
    """Whether any of several scalars of one device is NaN or infinite; it is on its way to the host.

    Asked for its truth value, it waits for the scalars, but not for what the device does afterwards.

    Args:
        values: The scalars; of none, none is unfit.
    """

    def __init__(self, values: Sequence[torch.Tensor]) -> None:
        self.number: torch.Tensor | None = None  # 1.0 or 0.0, on the device
        self._ready: torch.cuda.Event | None = None
        if not values:
            return
        together = torch.stack([value.double().reshape(()) for value in values])
        self._here = self.number = (~torch.isfinite(together).all()).float()
        if self.number.is_cuda:
            self._here = torch.empty((), device="cpu", pin_memory=True).copy_(self.number, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()

    def __bool__(self) -> bool:
        if self._ready is not None:
            self._ready.synchronize()
        return self.number is not None and bool(self._here)


def can_withhold(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its step can leave everything as it is by what the device knows, as torch's fused optimizers can."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


@contextmanager
def withheld(optimizer: torch.optim.Optimizer, unfit: Unfit) -> Iterator[None]:
    """Have a step inside change nothing where ``unfit`` is true; by the two attributes that torch's GradScaler sets."""
    if unfit.number is None or not can_withhold(optimizer):
        yield
        return
    optimizer.grad_scale, optimizer.found_inf = None, unfit.number  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]


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

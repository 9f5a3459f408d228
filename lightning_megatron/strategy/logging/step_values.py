"""Logs the strategy's own values after a step (loss scale, skipped steps), and stops at a loss that is not finite."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from lightning_megatron.distributed import lightning_private
from lightning_megatron.training.engine import NonFiniteLossError
from lightning_megatron.training.optimizer import ShardedOptimizer


def log_step(
    module: pl.LightningModule,
    optimizer: ShardedOptimizer,
    *,
    loss_scale: bool,
    skipped_steps: bool,
) -> None:
    """Log what is known only after the optimizer has stepped, under the same step as what ``training_step`` logged.

    Args:
        module: The module whose ``log`` is called.
        optimizer: The optimizer that has stepped.
        loss_scale: Whether to log the loss scale of fp16.
        skipped_steps: Whether to log how many steps have been skipped.
    """
    values: dict[str, float] = {}
    if loss_scale:
        values["loss_scale"] = optimizer.loss_scale
    if skipped_steps:
        values["skipped_steps"] = float(optimizer.skipped_steps)
    if not values:
        return
    with lightning_private.logging_in(module, "training_step"):
        module.log_dict(values, batch_size=1)


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

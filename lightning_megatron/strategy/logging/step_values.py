"""What is said of a step after it: its gradient norm and loss scale, or that its loss was no number."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from lightning_megatron.distributed import lightning_private
from lightning_megatron.training.engine import NonFiniteLossError, Outcome
from lightning_megatron.training.optimizer import ShardedOptimizer


def log_step(
    module: pl.LightningModule,
    optimizer: ShardedOptimizer,
    *,
    grad_norm: bool,
    loss_scale: bool,
    skipped: bool,
    position: bool,
) -> None:
    """Log what is known of a step only after it, beside what ``training_step`` logged.

    Args:
        module: Whose ``log`` is used.
        optimizer: That has stepped.
        grad_norm: Whether to log the global norm before clipping.
        loss_scale: Whether to log fp16's loss scale and skipped steps.
        skipped: Whether to log the number of skipped steps under any precision.
        position: Whether to log where in the data the step's last batch was.
    """
    values: dict[str, float] = {}
    if grad_norm and optimizer.grad_norm is not None:
        values["grad_norm"] = optimizer.grad_norm
    if loss_scale:
        values.update(loss_scale=optimizer.loss_scale, skipped_steps=float(optimizer.skipped_steps))
    if skipped:
        values["skipped_steps"] = float(optimizer.skipped_steps)
    if position:
        loop = module.trainer.fit_loop
        values.update(data_epoch=float(module.trainer.current_epoch), data_batch=float(loop.epoch_loop.batch_idx))
    if not values:
        return
    with lightning_private.logging_in(module, "training_step"):
        module.log_dict(values, batch_size=1)


def stop_on_bad_loss(outcome: Outcome, local_loss: torch.Tensor, step: int) -> None:
    """Stop every rank when the loss of the global batch is NaN or infinite.

    Args:
        outcome: Of the batch, the same on every rank.
        local_loss: This rank's part of it.
        step: Number of the optimizer step.

    Raises:
        NonFiniteLossError: Names the step, the ranks that computed it and the last good step.
    """
    if bool(torch.isfinite(outcome.loss)):
        return
    # Every rank is here: the loss went through all of them. Say where it came from.
    finite: list[bool] = [True] * dist.get_world_size()
    dist.all_gather_object(finite, bool(torch.isfinite(local_loss)))
    seen = ", ".join(str(rank) for rank, is_finite in enumerate(finite) if not is_finite)
    where = f"computed on rank {seen}" if seen else "on no rank alone: only their sum is"
    last_good = f"the last good step was {step - 1}" if step else "there was no good step before it"
    raise NonFiniteLossError(
        f"The loss of step {step} is {outcome.loss.item()} ({where}); {last_good}."
        " Lower the learning rate, clip gradients (gradient_clip_val=1.0), look at the batch with"
        " Trainer(detect_anomaly=True), or go on regardless with MegatronStrategy(check_loss=False)."
    )

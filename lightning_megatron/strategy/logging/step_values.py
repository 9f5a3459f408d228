"""Logs the strategy's own values after a step: the loss scale of fp16, and how many steps have been skipped."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl
import torch

from lightning_megatron.distributed import lightning_private
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
        module.log_dict(on_host(values), batch_size=1)


def on_host(values: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """Numbers as tensors that stay on the host: Lightning would copy numbers to the device, and wait for it."""
    return {name: torch.tensor(value, dtype=torch.float32, device="cpu") for name, value in values.items()}

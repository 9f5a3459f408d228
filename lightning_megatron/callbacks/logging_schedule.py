"""The steps at which callbacks log, and how they log."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl

from lightning_megatron.distributed import lightning_private
from lightning_megatron.strategy.logging.step_values import on_host


def logs_now(trainer: pl.Trainer) -> bool:
    """Whether loggers are told of the optimizer step that has just ended; the same on every rank."""
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    ended = lightning_private.ends_accumulation(trainer)
    return ended and every > 0 and trainer.global_step > 0 and trainer.global_step % every == 0


def log(module: pl.LightningModule, values: Mapping[str, float]) -> None:
    """Log values that are equal on every rank already."""
    module.log_dict(on_host(values), on_step=True, on_epoch=False, batch_size=1)

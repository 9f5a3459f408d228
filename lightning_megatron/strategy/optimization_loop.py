"""Lightning's automatic optimization, re-ordered: zero the gradients, run the schedule, fire the hooks of backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loops.optimization.automatic import Closure, ClosureResult
from typing_extensions import override

from lightning_megatron.distributed import lightning_private
from lightning_megatron.training.optimizer import ShardedOptimizer


def update_lr_schedulers(trainer: pl.Trainer, interval: str, update_plateau_schedulers: bool) -> None:
    """Update the schedulers, except after a skipped step; it stands in for the epoch loop's method."""
    epoch_loop = trainer.fit_loop.epoch_loop
    if not (interval == "step" and (_was_skipped(trainer) or not lightning_private.ends_accumulation(trainer))):
        trainer.strategy.checkpointer.plateaus.note_update(interval, update_plateau_schedulers)  # type: ignore[attr-defined]
        type(epoch_loop).update_lr_schedulers(epoch_loop, interval, update_plateau_schedulers)


class _ScheduleClosure(Closure):
    """Zeroes the gradients before ``training_step``, in which Megatron's schedule runs forward and backward."""

    def __init__(self, step: Callable[[], ClosureResult], backward: Any, zero_grad: Any) -> None:
        super().__init__(step, backward, zero_grad)
        self._step, self._backward, self._zero_grad = step, backward, zero_grad

    @override
    @torch.enable_grad()
    def closure(self, *args: Any, **kwargs: Any) -> ClosureResult:
        if self._zero_grad is not None:
            self._zero_grad()
        output = self._step()
        if output.closure_loss is None:
            self.warning_cache.warn("`training_step` returned `None`. If this was on purpose, ignore this warning...")
        if self._backward is not None and output.closure_loss is not None:
            self._backward(output.closure_loss)
        return output


class ScheduleOptimization(lightning_private.AutomaticOptimization):
    """Stands in for the epoch loop's automatic optimization, and counts on in its progress."""

    def __init__(self, trainer: pl.Trainer) -> None:
        super().__init__(trainer)
        self.optim_progress = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress

    @override
    def make_closure(self, step: Callable[[], Any], backward: Any, zero_grad: Any) -> Closure:
        return _ScheduleClosure(step, backward, zero_grad)

    @override
    def after_step(self) -> None:
        if _was_skipped(self.trainer):  # a skipped step moves neither `global_step` nor the schedulers
            for count in (self.optim_progress.optimizer.step.total, self.optim_progress.optimizer.step.current):
                count.ready -= 1
                count.completed -= 1
            lightning_private.uncount_logged_step(self.trainer)  # Lightning counts it again after this


def _was_skipped(trainer: pl.Trainer) -> bool:
    optimizers = trainer.strategy.optimizers
    return bool(optimizers) and isinstance(optimizers[0], ShardedOptimizer) and optimizers[0].last_step_was_skipped

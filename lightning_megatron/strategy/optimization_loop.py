"""Lightning's automatic optimization, re-ordered: zero the gradients, run the schedule, fire the hooks of backward.

Leans on private names of Lightning 2.6 (``_AutomaticOptimization._make_closure`` and ``_optimizer_step``, ``Closure``,
``_TrainingEpochLoop.update_lr_schedulers``); ``tests/test_lightning_private.py`` fails when they change.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loops.optimization.automatic import Closure, ClosureResult, _AutomaticOptimization
from torch.optim import Optimizer
from typing_extensions import override

from lightning_megatron.training.optimizer import ShardedOptimizer


def install(trainer: pl.Trainer) -> None:
    """Give the Trainer's epoch loop the re-ordered optimization, once; it counts on from where the other stood."""
    epoch_loop = trainer.fit_loop.epoch_loop
    before = epoch_loop.automatic_optimization
    if isinstance(before, _ScheduleOptimization):
        return
    epoch_loop.automatic_optimization = _ScheduleOptimization(trainer)
    epoch_loop.automatic_optimization.optim_progress = before.optim_progress
    epoch_loop.update_lr_schedulers = partial(_step_schedulers, trainer)  # type: ignore[method-assign]


def _step_schedulers(trainer: pl.Trainer, interval: str, update_plateau_schedulers: bool) -> None:
    """As Lightning's, but not behind a step that was skipped."""
    epoch_loop = trainer.fit_loop.epoch_loop
    if not (interval == "step" and (_was_skipped(trainer) or epoch_loop._should_accumulate())):
        trainer.strategy.checkpointer.plateaus.note_update(interval, update_plateau_schedulers)  # type: ignore[attr-defined]
        type(epoch_loop).update_lr_schedulers(epoch_loop, interval, update_plateau_schedulers)


def remove(trainer: pl.Trainer) -> None:
    """Give the Trainer's epoch loop Lightning's own optimization back."""
    epoch_loop = trainer.fit_loop.epoch_loop
    before = epoch_loop.automatic_optimization
    if isinstance(before, _ScheduleOptimization):
        epoch_loop.automatic_optimization = _AutomaticOptimization(trainer)
        epoch_loop.automatic_optimization.optim_progress = before.optim_progress


class _ScheduleClosure(Closure):
    """Megatron's schedule runs forward and backward inside ``training_step``, so zeroing comes before it."""

    @override
    @torch.enable_grad()
    def closure(self, *args: Any, **kwargs: Any) -> ClosureResult:
        if self._zero_grad_fn is not None:
            self._zero_grad_fn()
        output = self._step_fn()
        if output.closure_loss is None:
            self.warning_cache.warn("`training_step` returned `None`. If this was on purpose, ignore this warning...")
        if self._backward_fn is not None and output.closure_loss is not None:
            self._backward_fn(output.closure_loss)
        return output


class _ScheduleOptimization(_AutomaticOptimization):
    @override
    def _make_closure(self, kwargs: OrderedDict[str, Any], optimizer: Optimizer, batch_idx: int) -> Closure:
        made = super()._make_closure(kwargs, optimizer, batch_idx)
        return _ScheduleClosure(made._step_fn, made._backward_fn, made._zero_grad_fn)

    @override
    def _optimizer_step(self, batch_idx: int, train_step_and_backward_closure: Any) -> None:
        super()._optimizer_step(batch_idx, train_step_and_backward_closure)
        if _was_skipped(self.trainer):  # it is no step: neither `global_step` nor the schedules move
            for count in (self.optim_progress.optimizer.step.total, self.optim_progress.optimizer.step.current):
                count.ready -= 1
                count.completed -= 1
            self.trainer.fit_loop.epoch_loop._batches_that_stepped -= 1  # the loggers' x-axis; raised again behind this


def _was_skipped(trainer: pl.Trainer) -> bool:
    optimizers = trainer.strategy.optimizers
    return bool(optimizers) and isinstance(optimizers[0], ShardedOptimizer) and optimizers[0].last_step_was_skipped

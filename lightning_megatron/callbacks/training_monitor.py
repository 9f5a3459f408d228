"""``TrainingMonitor``: norms, zeros, rates, scales and the place in the data of each step."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_megatron.callbacks.logging_schedule import log, logs_now
from lightning_megatron.distributed.argument_names import answer_wrong_names
from lightning_megatron.distributed.arguments import Arguments
from lightning_megatron.training import counted_once
from lightning_megatron.training.gradient_norm import zeros_in_gradients
from lightning_megatron.training.optimizer import ShardedOptimizer


@answer_wrong_names
class TrainingMonitor(pl.Callback):
    """Logs what a step did to the whole model, over all of its ranks and the same on each.

    ``grad_norm`` (before clipping), ``param_norm``, ``zeros_in_grad`` (gradients that are exactly 0, of trained
    parameters), ``learning_rate`` and ``weight_decay`` (the largest of the optimizer's groups), ``skipped_steps``,
    ``data_epoch`` and ``data_batch`` (where in the data the step's last batch was, for a rewind with
    ``Checkpointing(skip_batches=)``), and under fp16 ``loss_scale``.

    It is the home of accelerate's ``set_all_logging_options`` together with ``Throughput``, ``MemoryMonitor`` and
    ``PhaseTimes``; ``tensorboard_dir`` is ``TensorBoardLogger(save_dir=)``. Learning rates of each group are
    Lightning's ``LearningRateMonitor``'s.

    Args:
        zeros: Whether to count zeros, which reads all gradients once more.
    """

    watches_megatron = True  # so that a plain module on one rank is trained by Megatron's steps, too

    def __init__(self, zeros: bool = True) -> None:
        Arguments("TrainingMonitor", MisconfigurationException).flag(zeros=zeros)
        self.zeros = zeros

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        optimizer: ShardedOptimizer = trainer.strategy.optimizers[0]  # type: ignore[assignment]
        optimizer.always_compute_norm = True

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if not logs_now(trainer):
            return
        optimizer: ShardedOptimizer = trainer.strategy.optimizers[0]  # type: ignore[assignment]
        values = {
            "param_norm": parameter_norm(optimizer),
            "learning_rate": max(float(group["lr"]) for group in optimizer.param_groups),
            "weight_decay": max(float(group.get("weight_decay", 0.0)) for group in optimizer.param_groups),
            "skipped_steps": float(optimizer.skipped_steps),
            "data_epoch": float(trainer.current_epoch),
            "data_batch": float(trainer.fit_loop.epoch_loop.batch_idx),
        }
        if optimizer.grad_norm is not None:
            values["grad_norm"] = optimizer.grad_norm
        if self.zeros:
            values["zeros_in_grad"] = float(zeros_in_gradients(optimizer.inner, optimizer.engine.device))
        if getattr(optimizer.inner, "grad_scaler", None) is not None:
            values["loss_scale"] = optimizer.loss_scale
        log(pl_module, values)


def parameter_norm(optimizer: ShardedOptimizer) -> float:
    """The 2-norm of all trained parameters of the whole model, in fp32 main weights if there are any.

    Each is counted once, as megatron-core does for gradients: not what tensor-parallel ranks or stages hold copies of.
    """

    def squares(weights: list[torch.Tensor]) -> torch.Tensor:
        each = [weight.detach().double().square().sum() for weight in weights]
        zero = torch.zeros((), dtype=torch.float64, device=optimizer.engine.device)
        return torch.stack([zero, *each]).sum()

    mains = [part.main_param for part in optimizer.parameter_slices()]
    return math.sqrt(float(counted_once.total(optimizer.inner, mains, squares)))

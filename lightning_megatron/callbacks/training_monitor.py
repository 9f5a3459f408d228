"""``TrainingMonitor``: norms, zeros, rates, scales, experts and the place in the data of each step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_megatron.callbacks import expert_load, plots
from lightning_megatron.callbacks.expert_load import ExpertLoad
from lightning_megatron.callbacks.logging_schedule import log, logs_now
from lightning_megatron.distributed import collectives, lightning_private
from lightning_megatron.distributed.argument_names import answer_wrong_names
from lightning_megatron.distributed.arguments import Arguments
from lightning_megatron.models.gpt.multi_token_prediction import LaterTokenLayer
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

    Of a mixture of experts, means over its layers: ``experts/aux_loss`` and ``experts/z_loss`` (without their weights),
    ``experts/entropy`` (of the router's scores, in nats), ``experts/dropped`` (the share of choices beyond an expert's
    capacity); and of all experts the tokens of the busiest and the idlest as a multiple of an equal share,
    ``experts/max_load`` and ``experts/min_load``. Of multi-token prediction, the mean loss of each depth:
    ``mtp_1_loss``, ...

    It is the home of accelerate's ``set_all_logging_options`` together with ``Throughput``, ``MemoryMonitor`` and
    ``PhaseTimes``; ``tensorboard_dir`` is ``TensorBoardLogger(save_dir=)``. Learning rates of each group are
    Lightning's ``LearningRateMonitor``'s.

    Args:
        zeros: Whether to count zeros, which reads all gradients once more.
        expert_layers: Whether to log these values of each layer, too, as ``experts/layer_N/...``, and the tokens of
            each of its experts.
        expert_pictures: Numbers of the optimizer steps, from 1, whose load of experts is drawn into ``step-N.png``: a
            row for each layer, a column for each expert. None: of no step.
        directory: Directory of the pictures. None: ``experts`` in the Trainer's ``default_root_dir``.

    Attributes:
        expert_load: What the routers did in the last step that was logged or drawn; its ``draw`` writes the picture.
    """

    watches_megatron = True  # so that a plain module on one rank is trained by Megatron's steps, too

    def __init__(
        self,
        zeros: bool = True,
        expert_layers: bool = False,
        expert_pictures: int | Sequence[int] | None = None,
        directory: str | Path | None = None,
    ) -> None:
        arguments = Arguments("TrainingMonitor", MisconfigurationException)
        arguments.flag(zeros=zeros, expert_layers=expert_layers)
        steps = expert_pictures if isinstance(expert_pictures, Sequence) else [expert_pictures]
        for step in steps:
            arguments.whole(optional=expert_pictures is None, expert_pictures=step)
        self.zeros, self.expert_layers, self.directory = zeros, expert_layers, directory
        self.expert_pictures = [step for step in steps if step is not None]
        self.expert_load: ExpertLoad | None = None
        self._has_experts = False

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        optimizer: ShardedOptimizer = trainer.strategy.optimizers[0]  # type: ignore[assignment]
        optimizer.always_compute_norm = True
        self._has_experts = expert_load.watch(trainer.strategy.engine.chunks)  # type: ignore[attr-defined]
        if self._has_experts and self.expert_pictures:
            plots.check("TrainingMonitor(expert_pictures=...)")

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._read_experts(trainer)
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
        if self._has_experts and self.expert_load is not None:
            values |= self.expert_load.values(self.expert_layers)
        if getattr(getattr(pl_module, "config", None), "mtp", None):
            values |= losses_of_later_tokens(trainer.strategy.engine.chunks)  # type: ignore[attr-defined]
        log(pl_module, values)

    def _read_experts(self, trainer: pl.Trainer) -> None:
        """Ask the routers, and draw what they did, where the step is one of those."""
        step = trainer.global_step
        draws = step in self.expert_pictures and lightning_private.ends_accumulation(trainer)
        if not self._has_experts or not (draws or logs_now(trainer)):
            return
        self.expert_load = expert_load.read(trainer.strategy.engine.chunks, step)  # type: ignore[attr-defined]
        if draws and self.expert_load is not None and trainer.is_global_zero:
            folder = Path(self.directory or Path(trainer.default_root_dir) / "experts")
            folder.mkdir(parents=True, exist_ok=True)
            picture = self.expert_load.draw(folder / f"step-{step}.png")
            rank_zero_info(f"TrainingMonitor: the load of each expert in step {step} is in {picture}.")


def losses_of_later_tokens(chunks: Sequence[torch.nn.Module]) -> dict[str, float]:
    """The mean losses of the layers of multi-token prediction in the last step, which all ranks ask for together."""
    layers = [layer for chunk in chunks for layer in chunk.modules() if isinstance(layer, LaterTokenLayer)]
    own = [layer.last_seen.tolist() for layer in layers if layer.last_seen is not None]
    every = [seen for found in collectives.gather_from_stages(own) for seen in found]
    return {f"mtp_{depth}_loss": loss / max(weight, 1.0) for depth, (loss, weight) in enumerate(every, start=1)}


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

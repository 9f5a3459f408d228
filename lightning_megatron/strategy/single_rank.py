"""When Lightning's own loop trains a plain module: on one rank, where it needs what no schedule can do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BaseFinetuning, ModelPruning
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_megatron.distributed import lightning_private
from lightning_megatron.models.megatron_module import MegatronModule
from lightning_megatron.training.optimizer_factory import is_shardable

if TYPE_CHECKING:
    from torch.optim import Optimizer

CHANGES_GROUPS = (BaseFinetuning, ModelPruning)  # they change what the optimizer holds while it trains


def is_single_rank(trainer: pl.Trainer) -> bool:
    """Whether one rank holds the whole plain module, without a loss scale, so that Lightning's loop can train it."""
    strategy: Any = trainer.strategy
    if isinstance(trainer.lightning_module, MegatronModule) or strategy.precision_plugin.scales_loss:
        return False
    return bool(strategy.layout.world_size == 1)


def needs_lightnings_loop(trainer: pl.Trainer, optimizers: list[Optimizer]) -> bool:
    """Whether the module, its optimizers or a callback need something else than one optimizer step for each batch.

    Args:
        trainer: A Trainer for which ``is_single_rank`` holds.
        optimizers: The ones that ``configure_optimizers`` returned.
    """
    module, strategy = trainer.lightning_module, cast("Any", trainer.strategy)
    return (
        not module.automatic_optimization
        or is_overridden("backward", module)
        or is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True)
        or any(isinstance(callback, CHANGES_GROUPS) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        or trainer.gradient_clip_algorithm == GradClipAlgorithmType.VALUE
        or len(optimizers) != 1
        or lightning_private.is_no_optimizer(optimizers[0])  # configure_optimizers returned None
        or isinstance(optimizers[0], torch.optim.LBFGS)
        or (strategy.distributed_optimizer and not is_shardable(optimizers[0]))
        or _leaves_out(module, optimizers[0])
    )


def restore_finetuning_groups(trainer: pl.Trainer) -> None:
    """Have finetuning callbacks give the optimizers a checkpoint's groups before the optimizers load its state.

    These callbacks do so in ``on_fit_start``, but the strategy reads the checkpoint only after that hook.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, BaseFinetuning) and lightning_private.restarts(callback):
            callback.on_fit_start(trainer, trainer.lightning_module)


def _leaves_out(module: torch.nn.Module, optimizer: Optimizer) -> bool:
    """Whether parameters that require gradients are in no group of the optimizer."""
    members = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return any(parameter.requires_grad and id(parameter) not in members for parameter in module.parameters())

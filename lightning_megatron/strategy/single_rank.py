"""Decides whether Lightning's own loop trains a plain module: on one rank, if nothing asks for Megatron's schedule."""

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
from lightning_megatron.training.optimizer import ShardedOptimizer
from lightning_megatron.training.optimizer_factory import is_shardable
from lightning_megatron.training.whole_optimizer import WholeOptimizer

if TYPE_CHECKING:
    from torch.optim import Optimizer

CHANGES_GROUPS = (BaseFinetuning, ModelPruning)  # they change what the optimizer holds while it trains


def is_single_rank(trainer: pl.Trainer) -> bool:
    """Whether one rank holds the whole plain module, without a loss scale, so that Lightning's loop can train it."""
    strategy: Any = trainer.strategy
    if isinstance(trainer.lightning_module, MegatronModule) or strategy.precision_plugin.scales_loss:
        return False
    return bool(strategy.layout.world_size == 1)


def lightning_trains(trainer: pl.Trainer, optimizers: list[Optimizer]) -> bool:
    """Whether Lightning's own loop trains the module: nothing asks for a schedule, or no schedule can do what is asked.

    Args:
        trainer: The Trainer of the run.
        optimizers: The ones that ``configure_optimizers`` returned.
    """
    if not is_single_rank(trainer):
        return False
    return _needs_lightnings_loop(trainer, optimizers) or not _asks_for_schedule(trainer)


def _asks_for_schedule(trainer: pl.Trainer) -> bool:
    """Whether the strategy or a callback was given something that only Megatron's steps have."""
    strategy = cast("Any", trainer.strategy)
    return (
        strategy.micro_batching.is_chosen
        or strategy.on_nonfinite == "skip"
        or strategy.ddp is not None
        or strategy.checkpointer.asynchronous
        or strategy.precision_plugin.params_dtype == torch.bfloat16  # which has main weights in fp32 beside it
        or any(getattr(callback, "watches_megatron", False) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    )


def _needs_lightnings_loop(trainer: pl.Trainer, optimizers: list[Optimizer]) -> bool:
    """Whether the module, its optimizers or a callback need something else than one optimizer step for each batch."""
    module, strategy = trainer.lightning_module, cast("Any", trainer.strategy)
    return (
        not module.automatic_optimization
        or is_overridden("backward", module)
        or is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True)
        or _changes_groups(trainer)
        or trainer.gradient_clip_algorithm == GradClipAlgorithmType.VALUE
        or len(optimizers) != 1
        or lightning_private.is_no_optimizer(optimizers[0])  # configure_optimizers returned None
        or isinstance(optimizers[0], torch.optim.LBFGS)
        or (strategy.distributed_optimizer and not is_shardable(optimizers[0]))
        or _leaves_out(module, optimizers[0])
    )


def whole_optimizer(trainer: pl.Trainer, optimizers: list[Optimizer]) -> WholeOptimizer | None:
    """The one optimizer, as checkpoints and resumed settings see it; None where torch alone saves and loads its state.

    Args:
        trainer: A Trainer whose module Lightning's own loop trains.
        optimizers: The ones that ``configure_optimizers`` returned.
    """
    strategy = cast("Any", trainer.strategy)
    has_one = len(optimizers) == 1 and bool(optimizers[0].param_groups)
    if not has_one or _changes_groups(trainer) or strategy.checkpointer.asynchronous:
        return None
    return WholeOptimizer(optimizers[0], trainer.lightning_module)


def belong_to(optimizers: list[Optimizer], module: torch.nn.Module) -> bool:
    """Whether all weights that ``optimizers`` update belong to ``module``."""
    own = {id(parameter) for parameter in module.parameters()}
    return all(
        optimizer.trains(module)
        if isinstance(optimizer, ShardedOptimizer)
        else all(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"])
        for optimizer in optimizers
    )


def _changes_groups(trainer: pl.Trainer) -> bool:
    """Whether a callback changes what the optimizer holds while it trains."""
    return any(isinstance(callback, CHANGES_GROUPS) for callback in trainer.callbacks)  # type: ignore[attr-defined]


def _leaves_out(module: torch.nn.Module, optimizer: Optimizer) -> bool:
    """Whether parameters that require gradients are in no group of the optimizer."""
    members = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return any(parameter.requires_grad and id(parameter) not in members for parameter in module.parameters())

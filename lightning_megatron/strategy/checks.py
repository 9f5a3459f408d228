"""Refuses by name what ``MegatronStrategy`` does not do, before anything is built."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, get_args

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from megatron.core.distributed import DistributedDataParallelConfig

from lightning_megatron.checkpoint import Checkpointing, check_folders
from lightning_megatron.distributed import lightning_private
from lightning_megatron.distributed.arguments import Arguments
from lightning_megatron.distributed.layout import ContextComm, ParallelLayout
from lightning_megatron.distributed.other_names import VALUE_NAMES
from lightning_megatron.models.configured_module import ConfiguredModule
from lightning_megatron.models.kernels import Kernels
from lightning_megatron.models.layers.context_parallel import ways
from lightning_megatron.models.megatron_module import MegatronModule
from lightning_megatron.models.model_config import ModelConfig
from lightning_megatron.models.recompute import check as check_recompute
from lightning_megatron.strategy import single_rank
from lightning_megatron.training.microbatches import MicroBatching
from lightning_megatron.training.nonfinite import OnNonfinite

if TYPE_CHECKING:
    from torch.optim import Optimizer

_STRATEGY = Arguments("MegatronStrategy", MisconfigurationException)
_AVERAGING = (StochasticWeightAveraging, WeightAveraging)


def check_sizes(sizes: dict[str, Any], micro_batching: MicroBatching, recompute: object, kernels: object) -> None:
    """Refuse sizes that are wrong for any number of ranks, and sizes that contradict each other.

    Args:
        sizes: The arguments of ``ParallelLayout``, without ``world_size``.
        micro_batching: How batches are cut into micro-batches.
        recompute: Which activations are computed again.
        kernels: Which implementations compute the layers and the loss.

    Raises:
        LayoutError: ``sizes`` are wrong.
        MisconfigurationException: One of the other arguments is wrong.
    """
    layout = ParallelLayout.of_smallest_world(**sizes)
    size, count = micro_batching.size, micro_batching.count
    if size is not None and count is not None:
        raise MisconfigurationException(
            f"MegatronStrategy(micro_batch_size={size}, num_microbatches={count}): give one; the other follows from the"
            " loader's batch_size."
        )
    _STRATEGY.whole(optional=True, micro_batch_size=size, num_microbatches=count)
    if count is not None:
        layout.check_num_microbatches(count)
    check_recompute(recompute, MisconfigurationException)
    _STRATEGY.kind(Kernels, "lightning_megatron.Kernels(...)", kernels=kernels)


def check_cp_comm(cp_comm: object, cp: int) -> None:
    """Refuse another name of how attention reaches across ranks, with ours for those of other tools.

    Raises:
        MisconfigurationException: The name is unknown, or nothing is shared that it could be about.
    """
    known = get_args(ContextComm)
    if cp_comm is not None and cp_comm not in known:
        ours = VALUE_NAMES["cp_comm"].get(str(cp_comm))
        use = f"use {ours!r}" if ours else f"use one of {', '.join(map(repr, known))}, or None for the best one"
        raise MisconfigurationException(f"MegatronStrategy(cp_comm={cp_comm!r}): {use}.")
    if cp_comm is not None and cp == 1:
        raise MisconfigurationException(
            f"MegatronStrategy(cp_comm={cp_comm!r}) says how ranks that share a sequence exchange it, and with cp=1"
            " none do. Use cp=2 or more, or leave cp_comm out."
        )


def check_way(module: object, layout: ParallelLayout, cp_comm: str | None) -> None:
    """Refuse a way across ranks that cannot compute the module's attention, before a rank starts.

    Raises:
        MisconfigurationException: The message has a way that can.
    """
    config = getattr(module, "config", None)
    if layout.cp == 1 or not isinstance(config, ModelConfig) or config.layers != "torch":
        return
    try:
        ways.chosen(
            cp_comm,
            cp=layout.cp,
            tp=layout.tp,
            heads=config.num_attention_heads,
            groups=config.sizes()["num_query_groups"],
            dropout=config.attention_dropout,
            biased=getattr(config, "position_embedding", None) == "relative",
        )
    except ValueError as error:
        raise MisconfigurationException(str(error)) from None


def check_settings(
    ddp: object,
    process_group_backend: str | None,
    on_nonfinite: str,
    checkpointing: object,
    distributed_optimizer: object,
) -> None:
    """Refuse settings that would fail only once processes run, and those that contradict each other.

    Args:
        ddp: The settings of megatron-core's data parallelism, or None.
        process_group_backend: The back end of the process groups, or None for the one that fits the device.
        on_nonfinite: What happens when a loss or gradient is NaN or infinite.
        checkpointing: How checkpoints are saved and loaded.
        distributed_optimizer: Whether optimizer state is sharded.

    Raises:
        MisconfigurationException: A value is wrong; the message has it and what to use.
    """
    _STRATEGY.flag(distributed_optimizer=distributed_optimizer)
    _STRATEGY.kind(Checkpointing, "lightning_megatron.Checkpointing(...)", checkpointing=checkpointing)
    if ddp is not None and not isinstance(ddp, DistributedDataParallelConfig):
        raise MisconfigurationException(
            f"MegatronStrategy(ddp={ddp!r}): use megatron.core.distributed.DistributedDataParallelConfig(...)."
        )
    if ddp is not None:
        _check_ddp(ddp, bool(distributed_optimizer))
    _STRATEGY.one_of(get_args(OnNonfinite), on_nonfinite=on_nonfinite)
    if process_group_backend not in (None, "gloo", "nccl"):
        raise MisconfigurationException(
            f"MegatronStrategy(process_group_backend={process_group_backend!r}): use 'gloo', 'nccl', or None, which"
            " takes what fits the device."
        )


def check_timeouts(*, timeout: object, start_timeout: object) -> None:
    """Refuse what is no length of time.

    Raises:
        MisconfigurationException: A value is wrong; the message has it and what to use.
    """
    given = {"timeout": timeout} | ({} if start_timeout is None else {"start_timeout": start_timeout})
    for name, value in given.items():
        if not isinstance(value, timedelta) or value <= timedelta(0):
            raise MisconfigurationException(
                f"MegatronStrategy({name}={value!r}): use a positive datetime.timedelta, such as timedelta(minutes=30)."
            )


def _check_ddp(ddp: DistributedDataParallelConfig, distributed_optimizer: bool) -> None:
    """Refuse settings of data parallelism that would have no effect, or that need process groups that are not built."""
    told = "MegatronStrategy(ddp=DistributedDataParallelConfig("
    if ddp.overlap_param_gather and not (ddp.overlap_grad_reduce and distributed_optimizer):
        raise MisconfigurationException(
            f"{told}overlap_param_gather=True)): weights are gathered beside the forward pass only with"
            f" overlap_grad_reduce=True and distributed_optimizer=True; seen: {ddp.overlap_grad_reduce} and"
            f" {distributed_optimizer}."
        )
    if ddp.use_distributed_optimizer and not distributed_optimizer:
        raise MisconfigurationException(
            f"{told}use_distributed_optimizer=True), distributed_optimizer=False) contradict each other. Leave the"
            " first out: it follows from the second."
        )
    if ddp.average_in_collective:
        raise MisconfigurationException(
            f"{told}average_in_collective=True)): gradients are summed here, and divided once by the tokens of the"
            " whole batch. Leave it out."
        )
    for name, usual in (("num_distributed_optimizer_instances", 1), ("use_megatron_fsdp", False)):
        if getattr(ddp, name, usual) != usual:
            raise MisconfigurationException(
                f"{told}{name}={getattr(ddp, name)!r})): MegatronStrategy does not build the groups that it needs."
                " Leave it out."
            )


def check_checkpoint_io(given: CheckpointIO | None) -> None:
    """Refuse a checkpoint IO among ``Trainer(plugins=)``: it would take one rank's shard for the checkpoint.

    Args:
        given: The checkpoint IO that the user gave to the Trainer, or None.

    Raises:
        MisconfigurationException: The user gave one.
    """
    if given is not None:
        raise MisconfigurationException(
            f"MegatronStrategy writes its checkpoints itself, each rank its shard into one directory;"
            f" plugins=[{type(given).__name__}()] would write one rank's shard as if it were the whole. Leave it out."
        )


def check_some_batch(trainer: pl.Trainer) -> None:
    """Refuse a training run that has seen no batch: only at its end is a loader of unknown length known to be empty."""
    loop = trainer.fit_loop
    if loop.epoch_loop.batch_progress.total.ready == 0 and loop.epoch_progress.total.ready > 0 and loop.max_batches:
        raise MisconfigurationException(
            "MegatronStrategy: the training loader gave no batch on any rank. Look at its dataset, or at what its"
            " iterator filters out."
        )


def check_trainer(trainer: pl.Trainer) -> None:
    """Refuse arguments of the Trainer and hooks of the module that do not work here, before process groups are built.

    Raises:
        MisconfigurationException: An argument or a hook does not work here; the message names it.
    """
    _check_numbers(trainer)
    _check_callbacks(trainer)
    check_folders(trainer)
    _check_module(trainer)
    device = trainer.strategy.root_device.type
    if device not in ("cpu", "cuda"):
        raise MisconfigurationException(
            f"MegatronStrategy trains on CPU and CUDA devices; Trainer(accelerator=) gave {device!r}. Use 'cpu' or"
            " 'gpu'."
        )
    if lightning_private.converts_batch_norms(trainer.strategy):
        raise MisconfigurationException(
            "Trainer(sync_batchnorm=True): MegatronStrategy does not convert layers, and a batch norm would still see"
            " one micro-batch at a time. Leave it out; a model can convert itself in configure_model"
            " (torch.nn.SyncBatchNorm.convert_sync_batchnorm)."
        )


def _check_numbers(trainer: pl.Trainer) -> None:
    """Refuse numbers that Lightning divides by or clips with, and does not look at."""
    numbers = Arguments("Trainer", MisconfigurationException)
    numbers.whole(accumulate_grad_batches=trainer.accumulate_grad_batches)
    numbers.number(least=0, optional=True, gradient_clip_val=trainer.gradient_clip_val)
    if trainer.val_check_interval == 0 and isinstance(trainer.val_check_interval, int):
        raise MisconfigurationException(
            "Trainer(val_check_interval=0): use a number of batches from 1, a part of an epoch such as 0.25, or"
            " limit_val_batches=0 to leave validation out."
        )


def _check_callbacks(trainer: pl.Trainer) -> None:
    """Refuse callbacks that copy a model of which a rank has a shard, and those that change the optimizer in a fit."""
    ddp = trainer.strategy.ddp  # type: ignore[attr-defined]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name = type(callback).__name__
        if isinstance(callback, single_rank.CHANGES_GROUPS) and not single_rank.is_single_rank(trainer):
            raise MisconfigurationException(
                f"MegatronStrategy does not work with {name}: it changes which parameters are trained, in the middle of"
                " a run, and megatron-core's gradient buffers are laid out at its start. Freeze parameters before fit"
                " (requires_grad_(False)), and call fit again for the next phase."
            )
        if isinstance(callback, _AVERAGING) and isinstance(trainer.lightning_module, MegatronModule):
            raise MisconfigurationException(
                f"MegatronStrategy does not work with {name} and {type(trainer.lightning_module).__name__}: it copies a"
                " whole model, of which each rank has a shard. Leave the callback out; plain LightningModules take it."
            )
        if isinstance(callback, _AVERAGING) and ddp is not None and ddp.overlap_param_gather:
            raise MisconfigurationException(
                f"MegatronStrategy(ddp=DistributedDataParallelConfig(overlap_param_gather=True)) with {name}: it would"
                " average weights that the ranks are still sending. Use overlap_param_gather=False."
            )


def _check_module(trainer: pl.Trainer) -> None:
    """Refuse hooks that no schedule calls, and a logger that would have rank 0 draw the model's graph alone."""
    module, name = trainer.lightning_module, type(trainer.lightning_module).__name__
    fits = trainer.state.fn == TrainerFn.FITTING and not single_rank.is_single_rank(trainer)
    if fits and is_overridden("backward", module):
        raise MisconfigurationException(
            f"{name}.backward would never be called: MegatronStrategy's schedule runs forward and backward of all"
            " micro-batches in one go. Leave it out; on_before_backward and on_after_backward are called once a batch."
        )
    if fits and is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise MisconfigurationException(
            f"{name}.training_step(dataloader_iter): MegatronStrategy cuts a batch into micro-batches, so it needs the"
            " batch. Use training_step(batch, batch_idx)."
        )
    if isinstance(module, MegatronModule) and any(lightning_private.draws_graph(logger) for logger in trainer.loggers):
        raise MisconfigurationException(
            f"TensorBoardLogger(log_graph=True): only rank 0 would run {name}, and wait for the others' shards. Leave"
            " log_graph out."
        )


def check_experts(module: Any, layout: ParallelLayout) -> None:
    """Refuse to train experts on copies of the same tokens, whose gradients would count several times.

    Raises:
        MisconfigurationException: Tensor parallelism without sequence parallelism.
    """
    experts = [getattr(chunk.config, "experts", None) for chunk in getattr(module, "chunks", ())]
    if not any(experts):
        return
    if layout.tp > 1 and not layout.sequence_parallel:
        raise MisconfigurationException(
            f"MegatronStrategy(tp={layout.tp}): experts are trained with sequence_parallel=True, which gives each"
            " tensor-parallel rank tokens of its own. Set it, or use tp=1."
        )
    has_losses = any(each.has_losses for each in experts if each is not None)
    if has_losses and module.loss_reduction == "micro_batch" and not isinstance(module, ConfiguredModule):
        raise MisconfigurationException(
            f"{type(module).__name__}(loss_reduction='micro_batch'): the losses of its experts are weighed by tokens."
            " Use loss_reduction='token', or Experts(balancing='none') and z_weight=0."
        )


def check_optimizers(module: pl.LightningModule, optimizers: list[Optimizer]) -> None:
    """Refuse several optimizers, and manual optimization: a schedule runs forward and backward in one go."""
    if any(lightning_private.is_no_optimizer(optimizer) for optimizer in optimizers):
        raise MisconfigurationException(
            f"{type(module).__name__}.configure_optimizers returned None. MegatronStrategy trains with one optimizer;"
            " return one, such as torch.optim.AdamW(self.parameters())."
        )
    if len(optimizers) != 1 or not module.automatic_optimization:
        raise MisconfigurationException(
            "MegatronStrategy trains with one optimizer and automatic optimization; seen:"
            f" {len(optimizers)} optimizers, automatic_optimization={module.automatic_optimization}. Put the parameters"
            " into groups of one optimizer."
        )
    if isinstance(optimizers[0], torch.optim.LBFGS):
        raise MisconfigurationException(
            "MegatronStrategy does not train with LBFGS, which runs forward and backward several times in one step. Use"
            " AdamW, Adam or SGD."
        )


def check_loader(layout: ParallelLayout, loader: Any, micro_batching: MicroBatching) -> None:
    """Refuse a loader without batches, and one whose ``batch_size`` cannot be cut into the chosen micro-batches."""
    if isinstance(loader, list) and not loader:  # a data module's answer where it has none; Lightning skips it
        return
    if sized_len(loader) == 0:
        rows = sized_len(getattr(loader, "dataset", None))
        raise MisconfigurationException(
            f"MegatronStrategy: the loader has no batch on this rank (its dataset has {rows} samples, its batch_size is"
            f" {getattr(loader, 'batch_size', None)}, drop_last={getattr(loader, 'drop_last', None)}, and"
            f" dp={layout.dp} replicas share them). Give it more data, or a smaller batch_size."
        )
    rows = getattr(loader, "batch_size", None)
    size, count = micro_batching.size, micro_batching.count
    if rows is not None and size is not None:
        layout.check_batch(rows, size)
    if rows is not None and count is not None and rows % count:
        raise MisconfigurationException(
            f"MegatronStrategy(num_microbatches={count}) does not divide the loader's batch_size={rows}. Use a"
            f" batch_size that is a multiple of {count}."
        )

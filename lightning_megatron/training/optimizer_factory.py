"""Wraps a torch optimizer into megatron-core's distributed or replicated optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.grad_scaler import DynamicGradScaler
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer, MegatronOptimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_megatron.distributed.parameter_names import named_shards
from lightning_megatron.training import counted_once
from lightning_megatron.training.engine import Engine
from lightning_megatron.training.nonfinite import OnNonfinite
from lightning_megatron.training.optimizer import ShardedOptimizer, group_settings
from lightning_megatron.training.optimizers import LeanAdamW

_SHARDABLE = (AdamW, Adam, SGD, LeanAdamW)


def is_shardable(optimizer: Optimizer) -> bool:
    """Whether the distributed optimizer can shard it: its update is element by element."""
    return type(optimizer) in _SHARDABLE


def shard_optimizer(
    optimizer: Optimizer,
    engine: Engine,
    *,
    params_dtype: torch.dtype,
    distributed: bool,
    initial_loss_scale: float | None,
    on_nonfinite: OnNonfinite,
) -> ShardedOptimizer:
    """Wrap a torch optimizer into megatron-core's, and keep its groups and settings.

    Args:
        optimizer: The user's optimizer.
        engine: The engine that holds the model chunks.
        params_dtype: Dtype of the weights.
        distributed: Whether optimizer state and main weights are sharded over the data-parallel group.
        initial_loss_scale: First loss scale in fp16; None without loss scaling.
        on_nonfinite: What happens when the gradient norm is NaN or infinite.

    Raises:
        TypeError: The optimizer cannot be sharded, or a weight has another dtype.
    """
    if distributed and type(optimizer) not in _SHARDABLE:
        raise TypeError(
            f"MegatronStrategy(distributed_optimizer=True) shards torch.optim.AdamW, Adam and SGD, and LeanAdamW, not"
            f" {type(optimizer).__name__}: an update that is not element by element is wrong on flat shards. Use"
            " one of these, or distributed_optimizer=False."
        )
    _check_types(engine, params_dtype)
    _choose_fused(optimizer)
    parameters = [list(group["params"]) for group in optimizer.param_groups]
    for group in optimizer.param_groups:  # torch skips frozen parameters; megatron-core refuses them
        group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
    initial_settings = group_settings(optimizer)
    known = {id(parameter): name for chunk in engine.chunks for name, parameter in named_shards(chunk.module)}
    weights = [[known[id(p)] for p in group["params"] if id(p) in known] for group in optimizer.param_groups]
    config = OptimizerConfig(
        optimizer="sgd" if isinstance(optimizer, SGD) else "adam",
        lr=optimizer.defaults["lr"],
        bf16=params_dtype == torch.bfloat16,
        fp16=initial_loss_scale is not None,
        params_dtype=params_dtype,
        use_distributed_optimizer=distributed,
        overlap_param_gather=engine.chunks[0].ddp_config.overlap_param_gather,
    )
    scaler = None if initial_loss_scale is None else _grad_scaler(initial_loss_scale)
    inner = _wrap(optimizer, config, scaler, engine)
    engine.config.grad_scale_func = inner.scale_loss if scaler is not None else None
    # The class has the name of the user's: LearningRateMonitor and progress bars show it.
    named = type(type(optimizer).__name__, (ShardedOptimizer,), {})
    sharded = named(inner, engine, on_nonfinite, initial_settings, weights, parameters)
    for part in sharded.parameter_slices():
        counted_once.mark(part.parameter, part.main_param)
    return sharded


def _choose_fused(optimizer: Optimizer) -> None:
    """Use torch's fused kernel, the fastest on the CPU and on CUDA, where the user has chosen none."""
    for group in optimizer.param_groups if type(optimizer) in _SHARDABLE else ():
        is_open = group.get("fused") is None and group.get("foreach") is None
        if is_open and not group.get("capturable") and not group.get("differentiable"):
            group["fused"] = True
    if all(group.get("fused") for group in optimizer.param_groups):
        optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]  # as torch's constructors set it


def _wrap(optimizer: Optimizer, config: OptimizerConfig, scaler: Any, engine: Engine) -> MegatronOptimizer:
    """megatron-core's optimizer around the torch optimizer, sharded or replicated as ``config`` says."""
    named = ProcessGroupCollection.setup_process_groups_for_optimizer(
        None, engine.chunks, use_gloo_process_groups=torch.distributed.get_backend() != "gloo"
    )
    if config.use_distributed_optimizer:
        with _any_elementwise_optimizer():
            inner = DistributedOptimizer(
                optimizer,
                config,
                scaler,
                _no_state_yet,
                model_chunks=engine.chunks,
                # A buffer knows over which ranks it is divided, which are others for experts; the numbers are unused.
                per_model_buffers=dict(enumerate(part for c in engine.chunks for part in _buffers(c))),
                data_parallel_group=named["intra_dp_cp_group"],
                data_parallel_group_gloo=named["intra_dp_cp_group_gloo"],
                data_parallel_group_idx=torch.distributed.get_rank(named["mp_group"]),
                distributed_optimizer_instance_id=0,
            )
    elif config.bf16 or config.fp16:
        inner = Float16OptimizerWithFloat16Params(optimizer, config, scaler, _no_state_yet)
    else:
        inner = FP32Optimizer(optimizer, config, _no_state_yet)
    counted_once.set_groups(
        inner,
        distributed=config.use_distributed_optimizer,
        experts_are_divided=engine.layout.experts_are_divided,
    )
    return inner


def _buffers(chunk: Any) -> list[list[Any]]:
    """A chunk's gradient buffers, and those of its experts if it has any."""
    return [buffers for buffers in (chunk.buffers, chunk.expert_parallel_buffers) if buffers]


def _grad_scaler(initial_loss_scale: float) -> DynamicGradScaler:
    """A loss scaler with the schedule of torch's GradScaler and Megatron's hysteresis of two overflows."""
    return DynamicGradScaler(
        initial_scale=initial_loss_scale,
        min_scale=1.0,
        growth_factor=2.0,
        backoff_factor=0.5,
        growth_interval=1000,
        hysteresis=2,
    )


@contextmanager
def _any_elementwise_optimizer() -> Iterator[None]:
    """Lift the check of ``DistributedOptimizer`` (megatron-core 0.16.1) that allows Adam only.

    It is there for its own checkpoint format, which is not used here.
    """
    allowed = distrib_optimizer.Adam
    distrib_optimizer.Adam = (allowed, *_SHARDABLE)
    try:
        yield
    finally:
        distrib_optimizer.Adam = allowed


def _no_state_yet(*_: Any) -> None:
    """Initialise no state: torch optimizers create it in their first step."""


def _check_types(engine: Engine, params_dtype: torch.dtype) -> None:
    others = [(n, p) for c in engine.chunks for n, p in c.module.named_parameters() if p.dtype != params_dtype]
    for name, parameter in others:
        if parameter.requires_grad:
            raise TypeError(
                f"{name} is {parameter.dtype}, and this run trains {params_dtype} weights: megatron-core's gradient"
                f" buffers have one dtype. Make it {params_dtype} in configure_model, freeze it, or choose another"
                " Trainer(precision=)."
            )

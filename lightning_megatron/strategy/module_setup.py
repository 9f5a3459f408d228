"""Sets a module up for a run: its step runner, its engine and its sharded optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from torch.optim import Optimizer

from lightning_megatron.distributed import lightning_private, shared_weights
from lightning_megatron.distributed.layout import ContextComm
from lightning_megatron.models.build_settings import BuildSettings
from lightning_megatron.models.kernels import Kernels
from lightning_megatron.models.megatron_module import MegatronModule
from lightning_megatron.models.recompute import Recompute
from lightning_megatron.strategy import checks, out_of_memory, single_rank
from lightning_megatron.strategy.lightning_steps import LightningSteps
from lightning_megatron.strategy.logging import hook_values
from lightning_megatron.strategy.megatron_steps import MegatronSteps
from lightning_megatron.strategy.parallel_ranks import ParallelRanks
from lightning_megatron.strategy.plain_steps import PlainSteps
from lightning_megatron.strategy.precision import MegatronPrecision
from lightning_megatron.strategy.step_runner import StepRunner
from lightning_megatron.training import gradients, weight_settings
from lightning_megatron.training.engine import Engine
from lightning_megatron.training.microbatches import MicroBatching
from lightning_megatron.training.nonfinite import OnNonfinite
from lightning_megatron.training.optimizer import ShardedOptimizer
from lightning_megatron.training.optimizer_factory import shard_optimizer
from lightning_megatron.training.whole_optimizer import WholeOptimizer


class ModuleSetup(ParallelRanks):
    """The part of the strategy that knows, from ``setup`` on, how its module is trained and evaluated."""

    recompute: Recompute | None
    cp_comm: ContextComm | None
    kernels: Kernels
    micro_batching: MicroBatching
    distributed_optimizer: bool
    ddp: DistributedDataParallelConfig | None
    on_nonfinite: OnNonfinite
    _steps: StepRunner
    _engine: Engine | None = None
    _whole_optimizer: WholeOptimizer | None = None  # in place of a sharded one, where Lightning's own loop trains

    @property
    def is_distributed(self) -> bool:
        """Lightning gives samplers and ``sync_dist`` only to strategies that say so."""
        return not self._is_plain_alone

    @property
    def engine(self) -> Engine:
        """The engine that runs the schedules; known from ``setup`` on."""
        if self._engine is None:
            raise RuntimeError("MegatronStrategy: the engine is known once trainer.fit (or validate, ...) has set up.")
        return self._engine

    def _set_build_settings(self) -> None:
        """Tell a MegatronModule the layout, precision and device that it is built for."""
        if isinstance(self.lightning_module, MegatronModule):
            self.lightning_module.settings = BuildSettings(
                layout=self.layout,
                params_dtype=self._precision.params_dtype,
                recompute=self.recompute,
                kernels=self.kernels.on(self.root_device),
                cp_comm=self.cp_comm,
                fp8=self._precision.fp8,
                device=self.root_device,
            )

    def explain_out_of_memory(self, error: BaseException) -> None:
        """Add to an out-of-memory error what the training takes, and what would take less."""
        steps: StepRunner | None = getattr(self, "_steps", None)
        out_of_memory.explain(
            error,
            getattr(self.lightning_module, "config", None),
            self.layout,
            micro_batch_size=(steps.micro_batch_size if steps else None) or self.micro_batching.size or 1,
            precision=str(self._precision.precision),
            recompute=self.recompute,
            distributed_optimizer=self.distributed_optimizer,
            kernels=self.kernels.on(self.root_device),
            cp_comm=self.cp_comm,
            optimizer=self._torch_optimizer(),
            lora=getattr(self.lightning_module, "lora", None),
            device=self.root_device.type,
        )

    def _torch_optimizer(self) -> Any:
        """The optimizer of the run, as torch has it; None before it is made."""
        optimizer = next(iter(self.optimizers), None)
        return optimizer.inner.optimizer if isinstance(optimizer, ShardedOptimizer) else optimizer

    def _set_up_training(self, trainer: pl.Trainer) -> None:
        """Choose what trains the module: a schedule and a sharded optimizer, or Lightning's own loop."""
        if single_rank.lightning_trains(trainer, self.optimizers):
            self._steps = self._make_steps(LightningSteps, None)
            self._whole_optimizer = single_rank.whole_optimizer(trainer, self.optimizers)
            lightning_private.optimizers_to_device(self.optimizers, self.root_device)
            return
        checks.check_experts(trainer.lightning_module, self.layout)
        checks.check_optimizers(trainer.lightning_module, self.optimizers)
        shared_weights.freeze_all_copies(self._named_weights())
        weight_settings.check(self._named_weights(), self.optimizers[0])
        self._steps = self._make_steps(self._kind_of_steps, self._ddp_config())
        self.optimizers = [self._shard(self.optimizers[0])]

    def _set_up_evaluation(self) -> None:
        """Keep the optimizer of a fit of this module, for a later save, and forget that of another one."""
        assert self.lightning_module is not None
        if not single_rank.belong_to(self.optimizers, self.lightning_module):
            self.optimizers, self.lr_scheduler_configs, self._whole_optimizer = [], [], None
        self._steps = self._make_steps(self._kind_of_steps, None)

    @property
    def _is_plain_alone(self) -> bool:
        """Whether a plain module is on the only rank, so that its data and its loads are as without this strategy."""
        return self._ranks == 1 and self.lightning_module is not None and not self._has_megatron_module

    @property
    def _has_megatron_module(self) -> bool:
        return isinstance(self.lightning_module, MegatronModule)

    @property
    def _kind_of_steps(self) -> type[StepRunner]:
        return MegatronSteps if self._has_megatron_module else PlainSteps

    def _make_steps(self, kind: type[StepRunner], ddp: DistributedDataParallelConfig | None) -> StepRunner:
        module, stops = self.lightning_module, self.on_nonfinite == "raise"
        self._engine = kind.make_engine(module, self.layout, ddp, self.root_device)
        return kind(module, self._engine, self._precision, self.micro_batching, stops)

    def _named_weights(self) -> Iterable[tuple[str, torch.nn.Parameter]]:
        """This rank's weights, by their names in the whole model."""
        module = self.lightning_module
        assert module is not None
        return module.named_shards() if isinstance(module, MegatronModule) else module.named_parameters()

    def _hook_logs(self) -> hook_values.HookLogs | None:
        """The object that shares what hooks log with the other ranks; None where there are none."""
        if not isinstance(self.lightning_module, MegatronModule) or self._ranks == 1:
            return None
        return hook_values.HookLogs(self.lightning_module, lambda: self._steps.counts)

    def _after_backward(self) -> None:
        """Show the gradients to hooks, between Lightning's hooks around the backward pass that the schedule has run."""
        if self._steps.ends_window and gradients.hooks_read_gradients(self.lightning_module.trainer):  # type: ignore[union-attr]
            self.optimizers[0].expose_gradients()  # type: ignore[attr-defined]

    @property
    def _sharded(self) -> ShardedOptimizer | None:
        """The optimizer of a module that a schedule trains; None before a fit, and where Lightning's loop trains."""
        optimizer = self.optimizers[0] if self.optimizers else None
        return optimizer if isinstance(optimizer, ShardedOptimizer) else None

    def _shard(self, optimizer: Optimizer) -> ShardedOptimizer:
        sharded = shard_optimizer(
            optimizer,
            self.engine,
            params_dtype=self._precision.params_dtype,
            distributed=self.distributed_optimizer,
            initial_loss_scale=self._precision.initial_loss_scale,
            on_nonfinite=self.on_nonfinite,
        )
        lightning_private.optimizers_to_device([sharded.inner.optimizer], self.root_device)
        return sharded

    @property
    def _precision(self) -> MegatronPrecision:
        plugin = self.precision_plugin
        assert isinstance(plugin, MegatronPrecision)
        return plugin

    def _ddp_config(self) -> DistributedDataParallelConfig:
        settings = vars(self.ddp) if self.ddp is not None else {}
        follows = {
            "use_distributed_optimizer": self.distributed_optimizer,
            "grad_reduce_in_fp32": self._precision.grads_in_fp32,
        }
        return DistributedDataParallelConfig(**{**settings, **follows})

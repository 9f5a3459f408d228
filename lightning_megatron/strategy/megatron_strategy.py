"""``MegatronStrategy``: Lightning's hooks, in the order in which the Trainer calls them.

Those for checkpoints are in ``checkpoint_hooks.py``, and barrier, broadcast, reduce and gather in
``rank_communication.py``.
"""

from __future__ import annotations

import time
from datetime import timedelta
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.rank_zero import rank_zero_only as utils_rank_zero_only
from lightning.fabric.utilities.seed import pl_worker_init_function, reset_seed
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from megatron.core.distributed import DistributedDataParallelConfig
from typing_extensions import override

from lightning_megatron.checkpoint import Checkpointer, Checkpointing
from lightning_megatron.distributed import (
    heartbeat,
    lightning_private,
    process_group_backends,
    process_groups,
    shared_weights,
    warning_filters,
)
from lightning_megatron.distributed.argument_names import answer_wrong_names
from lightning_megatron.distributed.device import use_device
from lightning_megatron.distributed.layout import ContextComm, ParallelLayout
from lightning_megatron.models.host_answers import Answers, has_transfer_hooks, remember
from lightning_megatron.models.kernels import Kernels
from lightning_megatron.models.megatron_module import MegatronModule
from lightning_megatron.models.recompute import Recompute
from lightning_megatron.strategy import (
    checks,
    failures,
    launchers,
    plain_module,
    preemption,
    trainer_patches,
)
from lightning_megatron.strategy.batch_transfer import move_beside_computation
from lightning_megatron.strategy.checkpoint_hooks import CheckpointHooks
from lightning_megatron.strategy.dataloading import evaluation_sampler, prediction_gather, rank_consistency
from lightning_megatron.strategy.former_arguments import replacement
from lightning_megatron.strategy.logging import step_values
from lightning_megatron.strategy.precision import MegatronPrecision
from lightning_megatron.strategy.rank_communication import RankCommunication
from lightning_megatron.training import resumed_settings, timers
from lightning_megatron.training.microbatches import MicroBatching
from lightning_megatron.training.nonfinite import OnNonfinite
from lightning_megatron.training.optimizer import ShardedOptimizer

_DEFAULT_CHECKPOINTING = Checkpointing()
_DEFAULT_KERNELS = Kernels()
_DEFAULT_TIMEOUT = timedelta(minutes=30)


@partial(answer_wrong_names, former=replacement)
class MegatronStrategy(CheckpointHooks, RankCommunication):
    """Trains with megatron-core's process groups, pipeline schedules and distributed optimizer.

    A batch of the loader is one data-parallel rank's data of one optimizer step; it is cut into micro-batches here.

    Args:
        tp: Tensor-parallel size: the number of ranks that share each layer.
        pp: Pipeline-parallel size: the number of pipeline stages.
        vp: Virtual stages (model chunks) per pipeline stage, for the interleaved schedule; None is one.
        cp: Context-parallel size: the number of ranks that share the tokens of each sequence.
        ep: Expert-parallel size: the number of ranks over which a layer's experts are divided, of those of a pipeline
            stage, whatever else these divide.
        etp: Expert-tensor-parallel size: the number of ranks that share each expert. None: ``tp``.
        cp_comm: How attention reaches across the ranks that share a sequence: "all_gather" collects keys and values,
            "all_to_all" exchanges parts of the sequence for heads, "ring" passes keys and values around, which keeps
            least. None is the best for the shape.
        sequence_parallel: Split activations between the tensor-parallel regions over the sequence.
        micro_batch_size: Rows of a micro-batch. Give this or ``num_microbatches``, or neither: a batch is then one
            micro-batch where pp = 1, and otherwise the largest legal number of them up to 4 · pp.
        num_microbatches: Micro-batches per batch.
        distributed_optimizer: Shard optimizer state and main weights over the data-parallel ranks.
        recompute: Activations that the backward pass computes again, to save memory. "selective": those that are cheap
            for their size, which are norms, activations, and attention scores where they are kept. A list of modules:
            "layernorm", "mlp_act", "core_attn", "mlp". A number: that many whole layers of each model chunk (of an
            encoder-decoder, of each stack). "full": all layers.
        kernels: Which implementations compute the layers and the loss; see ``Kernels``.
        pipeline_split_rank: The first pipeline stage of an encoder-decoder model's decoder; with ``vp``, its first
            virtual stage, counted through the ranks. None splits so that the slowest stage is fastest. Other models
            refuse it.
        layers_per_stage: The number of layers of each pipeline stage; with ``vp`` of each virtual stage, in the order
            of the layers, or of each pipeline stage in all. The first and the last may have 0, and then have the
            embedding and the output layer alone. "auto" makes the slowest stage as fast as possible. A text is
            megatron-core's, such as "Ettt|tttt|tL". None: all stages have as many.
        ddp: Settings of megatron-core's data parallelism. ``use_distributed_optimizer`` and ``grad_reduce_in_fp32``
            follow from ``distributed_optimizer`` and ``Trainer(precision=)``.
        on_nonfinite: What happens when a loss, or a gradient norm that is computed, is NaN or infinite: "raise" ends
            the run, "skip" leaves the step out, counts it and logs ``skipped_steps``, and "ignore" does not look. The
            first two wait for the device once a step, behind its backward pass; with "ignore" nothing is read from the
            device but what is logged, and in fp16 whether the gradients overflowed.
        checkpointing: How checkpoints are saved, loaded and resumed from; see ``Checkpointing``.
        process_group_backend: "gloo" or "nccl". None is the one for the device; one that cannot carry the device's
            tensors is refused.
        timeout: How long ranks wait in a collective for a rank that is gone without a word, once the first step has
            ended.
        start_timeout: How long ranks wait for one another before that: until all have started, and then in a collective
            while one of them downloads data, reads weights or compiles. None is 30 minutes, or ``timeout`` if that is
            longer.
        launch: How the ranks start unless torchrun, SLURM or the like has started them: "subprocess" runs the script
            once per rank; "forkserver" takes them from a preloaded server and brings results back, for notebooks. None
            is the first in a script, and the second in an interactive session or notebook.
    """

    strategy_name = "megatron"

    def __init__(
        self,
        *,
        tp: int = 1,
        pp: int = 1,
        vp: int | None = None,
        cp: int = 1,
        cp_comm: ContextComm | None = None,
        ep: int = 1,
        etp: int | None = None,
        sequence_parallel: bool = False,
        micro_batch_size: int | None = None,
        num_microbatches: int | None = None,
        distributed_optimizer: bool = True,
        recompute: Recompute | None = None,
        kernels: Kernels = _DEFAULT_KERNELS,
        pipeline_split_rank: int | None = None,
        layers_per_stage: list[int] | str | None = None,
        ddp: DistributedDataParallelConfig | None = None,
        on_nonfinite: OnNonfinite = "raise",
        checkpointing: Checkpointing = _DEFAULT_CHECKPOINTING,
        process_group_backend: str | None = None,
        timeout: timedelta = _DEFAULT_TIMEOUT,
        start_timeout: timedelta | None = None,
        launch: launchers.Launch | None = None,
    ) -> None:
        super().__init__()
        self.sizes: dict[str, Any] = {"tp": tp, "pp": pp, "vp": vp, "cp": cp, "ep": ep, "etp": etp}
        self.sizes["sequence_parallel"] = sequence_parallel
        self.sizes |= {"pipeline_split_rank": pipeline_split_rank, "layers_per_stage": layers_per_stage}
        self.micro_batching = MicroBatching(micro_batch_size, num_microbatches)
        checks.check_sizes(self.sizes, self.micro_batching, recompute, kernels)
        checks.check_cp_comm(cp_comm, cp)
        checks.check_timeouts(timeout=timeout, start_timeout=start_timeout)
        checks.check_settings(ddp, process_group_backend, on_nonfinite, checkpointing, distributed_optimizer)
        self.distributed_optimizer = distributed_optimizer
        self.cp_comm = cp_comm
        self.recompute = recompute
        self.kernels = kernels
        self.ddp = ddp
        self.on_nonfinite = on_nonfinite
        self._heartbeat = heartbeat.Heartbeat()
        self.checkpointer = Checkpointer(checkpointing)
        self._resumed_settings = resumed_settings.ResumedSettings(checkpointing.optimizer_settings)
        self.num_nodes = 1
        self._process_group_backend = process_group_backend
        self._timeouts = launchers.Timeouts(timeout, start_timeout)
        self._patches = trainer_patches.TrainerPatches()
        self._ranks_have_met = False
        self.made_at = time.time()
        self._timers = timers.Timers()
        self.launch = launch
        launchers.check(launch)

    @override
    def __getstate__(self) -> dict[str, Any]:
        """Leave process groups, and what holds their buffers, out of a pickled Trainer."""
        state = {**super().__getstate__(), "_engine": None, "_timers": timers.Timers()}
        state.update(_whole_optimizer=None, _ranks_have_met=False)
        state["_patches"] = trainer_patches.TrainerPatches()
        for name in ("_steps", "_preemption"):
            state.pop(name, None)
        if any(isinstance(optimizer, ShardedOptimizer) for optimizer in self.optimizers):
            state.update(_optimizers=[], lr_scheduler_configs=[])
        return state

    # Listeners of the run's timing

    def listen(self, listener: timers.Listener) -> None:
        """Call ``listener`` from now on with each part of a step that this rank runs, and its times."""
        self._timers.listeners.append(listener)
        self.engine.set_timers(self._timers)

    def stop_listening(self, listener: timers.Listener) -> None:
        """Call ``listener`` no more."""
        self._timers.listeners.remove(listener)
        if not self._timers.listeners:
            self.engine.set_timers(None)

    # What the Trainer asks at its construction

    @property
    @override
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    @override
    def precision_plugin(self) -> Precision:
        return self._precision_plugin if self._precision_plugin is not None else MegatronPrecision()

    @precision_plugin.setter
    @override
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        self._precision_plugin = None if precision_plugin is None else MegatronPrecision.from_plugin(precision_plugin)

    def set_world_ranks(self) -> None:
        """Number the ranks, and check the layout against their number, which is known here for the first time."""
        if self.cluster_environment is not None:
            self.cluster_environment = launchers.environment_of(self)
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        rank_zero_only.rank = utils_rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]
        warning_filters.ignore_known_lines(self.global_rank)
        process_group_backends.choose(self.root_device.type, self._process_group_backend)
        self._layout = ParallelLayout(world_size=self._ranks, **self.sizes)
        if isinstance(self.lightning_module, MegatronModule):
            self._layout = self.lightning_module.complete_layout(self._layout, self.recompute)

    @override
    def _configure_launcher(self) -> None:
        checks.check_checkpoint_io(lightning_private.checkpoint_io(self))
        lightning_private.set_launcher(self, launchers.choose(self, self.launch))

    # What trainer.fit, validate, test and predict call before the loops

    @override
    def connect(self, model: pl.LightningModule) -> None:
        super().connect(model)
        self._precision.plain_module = not isinstance(model, MegatronModule)
        self._precision.check_module(model, self._is_plain_alone)
        warning_filters.ignore_unused_validation(model)
        if isinstance(model, MegatronModule):
            model.connect_data(model.trainer.datamodule)  # type: ignore[attr-defined]
            layout = ParallelLayout(world_size=self.layout.world_size, **self.sizes)
            self._layout = model.complete_layout(layout, self.recompute)
            model.check_layout(self.layout)
            checks.check_way(model, self.layout, self.cp_comm)
        else:
            plain_module.check_layout(model, self.layout)

    @override
    def setup_environment(self) -> None:
        checks.check_trainer(self.lightning_module.trainer)  # type: ignore[union-attr]
        super().setup_environment()
        process_groups.destroy_if_made_for_build()
        process_group_backends.destroy_unsuitable(self.root_device)
        if not self._is_plain_alone:
            reset_seed()
        self.set_world_ranks()
        use_device(self.root_device)
        launchers.meet(self, self._process_group_backend, self._timeouts)
        self._heartbeat.start()
        self._begin_run()
        rank_consistency.share_random_state()
        process_groups.seed(torch.initial_seed())
        self._set_build_settings()

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None
        assert self.lightning_module is not None
        self.accelerator.setup(trainer)
        if not self._has_megatron_module:
            plain_module.check_parallel_layers(self.lightning_module, self.layout)
        self.model = self.precision_plugin.convert_module(self.lightning_module)
        self.model_to_device()
        self._timers = timers.Timers()  # an earlier run that failed may have left its listeners
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
            self._set_up_training(trainer)
        else:
            self.checkpointer.begin_evaluation(trainer)
            self._set_up_evaluation()
        self._precision.check_norm = self.on_nonfinite == "raise"
        self.setup_precision_plugin()
        self._preemption = preemption.Preemption(trainer)
        after_backward = self._after_backward if self._sharded is not None else None
        self._patches.apply(trainer, self.checkpointer, self._preemption, self._hook_logs(), after_backward)

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        """Call ``configure_optimizers`` before gradient buffers are laid out, so that it may freeze weights."""
        self.optimizers = []
        shared_weights.freeze_all_copies(self._named_weights())
        super().setup_optimizers(trainer)

    @override
    def model_to_device(self) -> None:
        assert self.model is not None
        self.model.to(self.root_device)

    @override
    def process_dataloader(self, dataloader: Any) -> Any:
        """Check a loader, and seed its workers by replica, so that the ranks of a replica read the same batches."""
        trainer = self.lightning_module.trainer  # type: ignore[union-attr]
        counts = trainer.evaluating and isinstance(self.lightning_module, MegatronModule)
        if getattr(dataloader, "worker_init_fn", self) is None:
            of_replica = partial(pl_worker_init_function, rank=self.data_parallel_rank)
            self._patches.replace(dataloader, "worker_init_fn", of_replica)
        if counts:
            dataloader = evaluation_sampler.each_once(dataloader)
        elif trainer.predicting:
            dataloader = evaluation_sampler.without_repeats(dataloader)
        if not self._is_plain_alone or sized_len(dataloader) != 0:  # Lightning warns of an empty one, and goes on
            checks.check_loader(self.layout, dataloader, self.micro_batching)
        if trainer.training:
            dataloader = self.checkpointer.resumption.track(dataloader, self._patches.replace)
        if trainer.predicting:
            return dataloader
        return rank_consistency.read_evenly(dataloader, fills=counts)

    # What the loops call

    @override
    def on_train_start(self) -> None:
        trainer = self.lightning_module.trainer  # type: ignore[union-attr]
        if self._sharded is not None:
            self._sharded.copy_changed_weights()
        rank_consistency.check_numbers_of_batches(trainer)
        self._resumed_settings.set_rates()
        self.checkpointer.plateaus.begin(trainer)
        self._preemption.listen()
        self.checkpointer.resumption.begin(trainer)

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        module = self.lightning_module
        assert module is not None
        answers: Answers = {}
        if isinstance(module, MegatronModule):
            module.check_batch(batch)  # the tensors are still on the host here
            answers = module.answer_on_host(batch)
        move = partial(super().batch_to_device, device=device, dataloader_idx=dataloader_idx)
        batch = move_beside_computation(batch, device or self.root_device, move, has_transfer_hooks(module))
        if isinstance(module, MegatronModule):
            batch = module.complete_batch(batch)
            remember(batch, answers)
        return batch

    @override
    def training_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        with self._timeouts.step(self.lightning_module.trainer):  # type: ignore[union-attr]
            return self._steps.train(batch, *args, **kwargs)

    @override
    def optimizer_step(self, optimizer: Any, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        if (sharded := self._sharded) is not None:
            sharded.step_number = self.lightning_module.trainer.global_step  # type: ignore[union-attr]
        result = super().optimizer_step(optimizer, closure, model, **kwargs)
        if sharded is not None:
            scaled = self._precision.scales_loss
            step_values.log_step(
                self.lightning_module,  # type: ignore[arg-type]
                sharded,
                loss_scale=scaled,
                skipped_steps=scaled or self.on_nonfinite == "skip",
            )
        return result

    @override
    def on_validation_start(self) -> None:
        rank_consistency.check_numbers_of_batches(self.lightning_module.trainer)  # type: ignore[union-attr]
        self.checkpointer.plateaus.note_validation(self.lightning_module.trainer)  # type: ignore[union-attr]

    @override
    def validation_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        with self._timeouts.step(self.lightning_module.trainer):  # type: ignore[union-attr]
            return self._steps.evaluate("validation_step", batch, *args, **kwargs)

    @override
    def on_train_end(self) -> None:
        if not self._is_plain_alone:  # else Lightning warns of it, and goes on
            checks.check_some_batch(self.lightning_module.trainer)  # type: ignore[union-attr]
        self.engine.finish_param_gather()
        self.checkpointer.wait()

    @override
    def on_test_start(self) -> None:
        rank_consistency.check_numbers_of_batches(self.lightning_module.trainer)  # type: ignore[union-attr]

    @override
    def test_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        with self._timeouts.step(self.lightning_module.trainer):  # type: ignore[union-attr]
            return self._steps.evaluate("test_step", batch, *args, **kwargs)

    @override
    def on_predict_start(self) -> None:
        rank_consistency.check_numbers_of_batches(self.lightning_module.trainer)  # type: ignore[union-attr]

    @override
    def predict_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        with self._timeouts.step(self.lightning_module.trainer):  # type: ignore[union-attr]
            return self._steps.predict(batch, *args, **kwargs)

    @override
    def on_predict_end(self) -> None:
        self._steps.end_predictions()
        prediction_gather.join_replicas(self.lightning_module.trainer)  # type: ignore[union-attr]

    # The end of a run

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        failures.explain(exception, self)
        self.checkpointer.saves.wait_after_error()

    @override
    def teardown(self) -> None:
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self._patches.undo()
        self.checkpointer.wait()
        self.checkpointer.release_memory()
        self._heartbeat.stop()
        if self._engine is not None:
            self._engine.remove_hooks()
            self.checkpointer.resumption.end(self.lightning_module.trainer)  # type: ignore[union-attr]
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()

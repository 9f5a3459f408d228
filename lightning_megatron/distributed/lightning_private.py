"""Every private name of Lightning 2.6 that the package leans on, behind a public one.

No other file reads, calls or imports a private name of Lightning. Where a release of Lightning changes one,
``test_lightning_private.py`` fails, and the change that is needed is in this file. The names are grouped by what has
them: the Trainer, its loops, loaders, logging, callbacks, strategies and launchers. The file lies in the lowest room,
which starts the process group through one of them; every room above imports it.

Three methods of Lightning are overridden under their private names where the class stands, because Lightning calls
them: ``Strategy._configure_launcher``, ``LightningCLI._run_subcommand`` and ``Strategy._precision_plugin``, which its
public property fills. Their tests are in the same file.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.precision.utils import _convert_fp_tensor, _DtypeContextManager
from lightning.fabric.strategies.launchers.multiprocessing import _check_missing_main_guard
from lightning.fabric.utilities.distributed import (
    _DatasetSamplerWrapper,
    _init_dist_connection,
    _set_num_threads_if_needed,
    _sync_ddp_if_available,
)
from lightning.fabric.utilities.imports import _IS_INTERACTIVE
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.callbacks import ModelCheckpoint, ModelSummary, RichProgressBar, TQDMProgressBar
from lightning.pytorch.core.optimizer import _MockOptimizer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.optimization.automatic import Closure, _AutomaticOptimization
from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper
from lightning.pytorch.strategies.launchers.multiprocessing import _GlobalStateSnapshot, _MultiProcessingLauncher
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.trainer.call import _call_and_handle_interrupt, _call_lightning_module_hook
from lightning.pytorch.trainer.connectors.logger_connector.fx_validator import _FxValidator
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_summary import LayerSummary
from lightning.pytorch.utilities.model_summary import ModelSummary as Summary
from lightning.pytorch.utilities.model_summary.model_summary import _format_summary_table
from lightning_utilities.core.apply_func import apply_to_collection
from torch.optim import Optimizer
from typing_extensions import override

# The Trainer and its connectors


def data_connector(trainer: pl.Trainer) -> Any:
    """What makes the Trainer's loaders ready; ``resolve_sampler`` is its method ``RESOLVE_SAMPLER``."""
    return trainer._data_connector


def attach_to_fit(trainer: pl.Trainer, module: pl.LightningModule, data: Any) -> None:
    """Give the Trainer its module and data module as at the beginning of ``fit``, which is not run."""
    trainer.state.fn = TrainerFn.FITTING
    trainer.training = True
    trainer._data_connector.attach_data(module, datamodule=data)


RESOLVE_SAMPLER = "_resolve_sampler"


def resolve_sampler(trainer: pl.Trainer, loader: Any, shuffle: bool, mode: Any) -> Any:
    """The sampler that Lightning itself gives to a loader."""
    connector: Any = trainer._data_connector
    return type(connector)._resolve_sampler(connector, loader, shuffle, mode)


def requires_distributed_sampler(trainer: pl.Trainer, loader: Any) -> bool:
    """Whether Lightning shares the loader's samples out over the replicas."""
    return bool(trainer._data_connector._requires_distributed_sampler(loader))


def prepare_loader(trainer: pl.Trainer, loader: Any, shuffle: bool, mode: Any) -> Any:
    """The loader with the sampler that shares its samples out over the replicas, where Lightning gives it one."""
    return trainer._data_connector._prepare_dataloader(loader, shuffle, mode)


def handler_before(trainer: pl.Trainer, number: int) -> Any:
    """What the user's program listens to a signal by; Lightning puts it back when the run ends."""
    connector: Any = trainer._signal_connector
    return connector._original_handlers.get(number)


def note_sigterm(trainer: pl.Trainer) -> None:
    """Have ``trainer.received_sigterm`` be True."""
    trainer._signal_connector.received_sigterm = True


def save_and_requeue(trainer: pl.Trainer, number: int) -> None:
    """Save, then ask SLURM to start the job anew, which ends this one."""
    connector: Any = trainer._signal_connector
    connector._slurm_sigusr_handler_fn(number, None)


def call_module_hook(trainer: pl.Trainer, hook: str, *args: Any) -> Any:
    """Call a hook of the Trainer's module as Lightning does."""
    return _call_lightning_module_hook(trainer, hook, *args)


call_and_handle_interrupt = _call_and_handle_interrupt

# Loops


def ends_accumulation(trainer: pl.Trainer) -> bool:
    """Whether the optimizer steps with the batch that the fit loop is at: the last of an accumulation window."""
    return not trainer.fit_loop.epoch_loop._should_accumulate()


def skips_backward(trainer: pl.Trainer) -> bool:
    """Whether the fit loop only runs forward, as in StochasticWeightAveraging's epoch for batch norms."""
    return bool(trainer.fit_loop._skip_backward)


def active_loop(trainer: pl.Trainer) -> Any:
    """The loop of the stage that the Trainer is in."""
    return trainer._active_loop


def evaluation_loop(trainer: pl.Trainer) -> Any:
    """The loop of the running validation (inside of a fit too) or test."""
    return trainer._evaluation_loop


def uncount_logged_step(trainer: pl.Trainer) -> None:
    """Take one from the count of optimizer steps that is the loggers' x-axis."""
    trainer.fit_loop.epoch_loop._batches_that_stepped -= 1


def validation_is_due(trainer: pl.Trainer) -> bool:
    """Whether a validation comes behind the batch that the fit loop is at."""
    loop: Any = trainer.fit_loop
    return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


def last_reload_epoch(trainer: pl.Trainer) -> float:
    """The epoch before which the training loaders were last made."""
    return trainer.fit_loop._last_train_dl_reload_epoch


def set_last_reload_epoch(trainer: pl.Trainer, epoch: float) -> None:
    """Have the training loaders count as made before ``epoch``."""
    trainer.fit_loop._last_train_dl_reload_epoch = epoch


def end_restart(trainer: pl.Trainer) -> None:
    """Have the fit loop no longer count as one that resumes, while its inner loops still do.

    Lightning leaves out the ReduceLROnPlateau schedulers at the end of an epoch in which it still counts as one.
    """
    trainer.fit_loop._restarting = False


def forget_restart(loop: Any) -> None:
    """Have a fit loop whose state has been loaded count as one that ran there, not as one that resumes."""
    loop._combined_loader_states_to_load = []
    loop.restarting = False
    for part in (loop, loop.epoch_loop, loop.epoch_loop.val_loop):
        part._loaded_from_state_dict = part._resuming_from_checkpoint = False


def predictions(trainer: pl.Trainer) -> list[list[Any]]:
    """Return the predictions that the predict loop has collected, loader by loader."""
    loop: Any = trainer.predict_loop
    return loop._predictions


class AutomaticOptimization(_AutomaticOptimization):
    """Lightning's optimization of one batch, with the two steps that a subclass may change under public names."""

    def make_closure(self, step: Callable[[], Any], backward: Any, zero_grad: Any) -> Closure:
        """The closure that the optimizer's step calls.

        Args:
            step: Calls ``training_step``.
            backward: Takes the loss; None where the batch is only run forward.
            zero_grad: Zeroes the gradients; None inside of an accumulation window.
        """
        return Closure(step, backward, zero_grad)

    def after_step(self) -> None:
        """Called behind the optimizer's step."""

    @override
    def _make_closure(self, kwargs: OrderedDict[str, Any], optimizer: Optimizer, batch_idx: int) -> Closure:
        made = super()._make_closure(kwargs, optimizer, batch_idx)
        return self.make_closure(made._step_fn, made._backward_fn, made._zero_grad_fn)

    @override
    def _optimizer_step(self, batch_idx: int, train_step_and_backward_closure: Any) -> None:
        super()._optimizer_step(batch_idx, train_step_and_backward_closure)
        self.after_step()


# Loaders, fetchers and samplers


def combined_loader(loop: Any) -> CombinedLoader | None:
    """The loaders that a loop reads, as Lightning made them; None before there are any."""
    return loop._combined_loader


def set_combined_loader(loop: Any, combined: CombinedLoader | None) -> None:
    """Have a loop read ``combined``."""
    loop._combined_loader = combined


def combining_mode(combined: CombinedLoader) -> str:
    """How several loaders are read: "sequential", "max_size_cycle", ..."""
    return str(combined._mode)


def load_loader_states(trainer: pl.Trainer, states: list[Any]) -> None:
    """Hand the training loaders that have a state of their own the states of a checkpoint."""
    trainer.fit_loop._combined_loader_states_to_load = states
    trainer.fit_loop._load_combined_loader_states()


def data_fetcher(trainer: pl.Trainer) -> Any:
    """Return the object that the fit loop takes its batches from."""
    return trainer.fit_loop._data_fetcher


def start_fetcher(fetcher: Any) -> list[Iterator[Any]]:
    """Make a fetcher's iterators without the batch that it reads ahead where the length is not known; one a loader."""
    _DataFetcher.__iter__(fetcher)
    return fetcher.combined_loader._iterator.iterators


def fetch_ahead(fetcher: Any) -> None:
    """Read the batch that a fetcher keeps ahead.

    Raises:
        StopIteration: There is none.
    """
    fetcher.batches.append(_DataFetcher.__next__(fetcher))


DatasetSamplerWrapper = _DatasetSamplerWrapper
IndexBatchSamplerWrapper = _IndexBatchSamplerWrapper


def copy_inner_batch_sampler(wrapper: _IndexBatchSamplerWrapper, copy: Callable[[Any], Any]) -> Any:
    """Give the wrapper that predictions are made with a copy of the batch sampler inside it; the copy."""
    wrapper._batch_sampler = copy(wrapper._batch_sampler)
    return wrapper._batch_sampler


# Logging


def results(trainer: pl.Trainer) -> Any:
    """Return the results that have been logged in the running loop; None outside of loops."""
    return trainer._results


def logs_every_step(trainer: pl.Trainer, name: str) -> bool:
    """Whether the fit loop has been logged ``name`` for callbacks at its training steps."""
    return name in trainer.fit_loop.epoch_loop._results.metrics(on_step=True)["callback"]


@contextmanager
def logging_in(module: pl.LightningModule, hook: str) -> Iterator[None]:
    """Have ``module.log`` take what is logged inside for logged in ``hook``."""
    before, module._current_fx_name = module._current_fx_name, hook
    try:
        yield
    finally:
        module._current_fx_name = before


def may_log(hook: str) -> bool:
    """Whether ``self.log`` is allowed in a hook."""
    return _FxValidator.functions.get(hook) is not None


def draws_graph(logger: object) -> bool:
    """Whether a logger draws the module's graph."""
    return isinstance(logger, TensorBoardLogger) and bool(logger._log_graph)


# Callbacks

SUMMARY = "_summary"  # the method by which ModelSummary makes its summary
TRAIN_DESCRIPTION = "_get_train_description"  # the method by which RichProgressBar names the bar of an epoch
LINK_CHECKPOINT = "_link_checkpoint"  # the method by which ModelCheckpoint makes the link to its last checkpoint


def summary_depth(callback: ModelSummary) -> int:
    """Return the ``max_depth`` of a ModelSummary callback."""
    return callback._max_depth


def text_of_summary(
    total: int, trainable: int, size: float, modes: dict[str, int], flops: int, columns: list[tuple[str, list[str]]]
) -> str:
    """The table of a ModelSummary in characters, with the numbers below it; the last line has the FLOPs."""
    return _format_summary_table(total, trainable, size, modes, flops, *columns)


def summarized_module(summary: Summary) -> pl.LightningModule:
    """The module that a ModelSummary is about."""
    return summary._model


def layer_of(row: LayerSummary) -> torch.nn.Module:
    """The layer that a row of a ModelSummary is about."""
    return row._module


def last_saved_step(callback: ModelCheckpoint) -> int:
    """The optimizer step at which a ModelCheckpoint last saved."""
    return callback._last_global_step_saved


def bar_is_due(bar: TQDMProgressBar, current: int, total: Any) -> bool:
    """Whether a bar is drawn anew at ``current`` of ``total``."""
    return bar._should_update(current, total)


def update_rich_bar(
    bar: RichProgressBar, task: Any, current: int, trainer: pl.Trainer, module: pl.LightningModule
) -> None:
    """Have a rich bar show ``current``, and the metrics of now."""
    bar._update(task, current)
    bar._update_metrics(trainer, module)


# Strategies, precision and optimizers


def checkpoint_io(strategy: Any) -> Any:
    """The ``CheckpointIO`` among ``Trainer(plugins=)``, or None."""
    return strategy._checkpoint_io


def converts_batch_norms(strategy: Any) -> bool:
    """Whether the Trainer was given ``sync_batchnorm=True``."""
    return strategy._layer_sync is not None


def set_launcher(strategy: Any, launcher: Any) -> None:
    """Have ``strategy.launcher`` start the ranks; None where they run already."""
    strategy._launcher = launcher


def is_no_optimizer(optimizer: Optimizer) -> bool:
    """Whether it stands for the None that ``configure_optimizers`` returned."""
    return isinstance(optimizer, _MockOptimizer)


def convert_floats(data: Any, dtype: torch.dtype) -> Any:
    """The floating-point tensors in ``data`` as ``dtype``."""
    return apply_to_collection(data, function=_convert_fp_tensor, dtype=torch.Tensor, dst_type=dtype)


start_process_group = _init_dist_connection
reduce = _sync_ddp_if_available
optimizers_to_device = _optimizers_to_device
DefaultDtype = _DtypeContextManager

# Launchers

MultiProcessingLauncher = _MultiProcessingLauncher
SubprocessScriptLauncher = _SubprocessScriptLauncher
GlobalStateSnapshot = _GlobalStateSnapshot
check_missing_main_guard = _check_missing_main_guard
set_num_threads = _set_num_threads_if_needed


def start_scripts(launcher: _SubprocessScriptLauncher) -> None:
    """Start the user's script once for each other rank of this machine, without watching over them."""
    launcher._call_children_scripts()


def strategy_of(launcher: _MultiProcessingLauncher) -> Any:
    """The strategy whose ranks a launcher starts."""
    return launcher._strategy


def is_interactive() -> bool:
    """Whether the program runs in a notebook or at a Python prompt."""
    return bool(_IS_INTERACTIVE)

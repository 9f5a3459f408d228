"""The private names of Lightning and torch that this package leans on: fails when a release changes them."""

import dataclasses
import inspect
import multiprocessing.forkserver

import torch.distributed as dist
from lightning.fabric.strategies.launchers.multiprocessing import _check_missing_main_guard
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.fabric.utilities.imports import _IS_INTERACTIVE
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loops.fetchers import _DataFetcher, _PrefetchDataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.optimization.automatic import Closure, _AutomaticOptimization
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _GlobalStateSnapshot, _MultiProcessingLauncher
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.trainer.call import (
    _call_and_handle_interrupt,
    _call_callback_hooks,
    _call_lightning_module_hook,
)
from lightning.pytorch.trainer.connectors.data_connector import _DataConnector
from lightning.pytorch.trainer.connectors.logger_connector.fx_validator import _FxValidator
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities import CombinedLoader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.utils.data import BatchSampler, DataLoader

from tests.test_training import QUIET


def test_closure_takes_the_three_functions():
    assert list(inspect.signature(Closure.__init__).parameters) == ["self", "step_fn", "backward_fn", "zero_grad_fn"]


def test_optimization_makes_the_closure_and_steps():
    assert list(inspect.signature(_AutomaticOptimization._make_closure).parameters)[1:] == [
        "kwargs",
        "optimizer",
        "batch_idx",
    ]
    assert list(inspect.signature(_AutomaticOptimization._optimizer_step).parameters)[1:] == [
        "batch_idx",
        "train_step_and_backward_closure",
    ]


def test_the_epoch_loop_steps_schedulers():
    assert list(inspect.signature(_TrainingEpochLoop.update_lr_schedulers).parameters)[1:] == [
        "interval",
        "update_plateau_schedulers",
    ]


def test_what_a_resume_leans_on():
    assert {"fetched", "iterator", "batches", "length"} <= vars(_PrefetchDataFetcher()).keys()
    fetcher = _PrefetchDataFetcher()
    fetcher.setup(CombinedLoader([[1], [2]], "max_size_cycle"))
    _DataFetcher.__iter__(fetcher)
    assert not fetcher.batches
    assert [next(part) for part in fetcher.combined_loader._iterator.iterators] == [1, 2]
    assert fetcher.combined_loader._mode == "max_size_cycle"
    loop = _FitLoop(Trainer(logger=False))
    assert (loop._combined_loader, loop._last_train_dl_reload_epoch) == (None, float("-inf"))
    assert DataLoader([1])._iterator is None
    assert callable(_FitLoop._load_combined_loader_states)
    assert list(inspect.signature(_TrainingEpochLoop.advance).parameters)[1:] == ["data_fetcher"]
    assert list(inspect.signature(_TrainingEpochLoop.on_advance_end).parameters)[1:] == ["data_fetcher"]
    progress = _FitLoop(Trainer(logger=False)).state_dict()
    assert {"epoch_progress", "epoch_loop.batch_progress", "state_dict"} <= progress.keys()
    assert set(progress["epoch_progress"]["current"]) == {"ready", "started", "processed", "completed"}
    assert callable(_SignalConnector._slurm_sigusr_handler_fn)


def test_what_a_checkpoint_leans_on():
    assert [f.name for f in dataclasses.fields(_StorageInfo)][:3] == ["relative_path", "offset", "length"]
    assert {"storage_reader", "no_dist", "planner"} <= inspect.signature(_load_state_dict).parameters.keys()
    assert callable(dist.Store.clone if hasattr(dist.Store, "clone") else dist.TCPStore.clone)


def test_the_default_store():
    assert callable(dist.distributed_c10d._get_default_store)


def test_what_the_launchers_are_made_of():
    def names(function):
        return list(inspect.signature(function).parameters)

    assert names(_SubprocessScriptLauncher.__init__) == ["self", "cluster_environment", "num_processes", "num_nodes"]
    assert names(_MultiProcessingLauncher.__init__) == ["self", "strategy", "start_method"]
    assert names(_call_and_handle_interrupt)[:2] == ["trainer", "trainer_fn"]
    assert names(_set_num_threads_if_needed) == ["num_processes"]
    assert names(_check_missing_main_guard) == []
    assert _IS_INTERACTIVE is False
    _GlobalStateSnapshot.capture().restore()


def test_the_forkserver_says_what_it_preloads():
    assert multiprocessing.forkserver.ForkServer()._preload_modules == ["__main__"]


def test_where_a_loop_keeps_that_it_resumes():
    loop = Trainer(accelerator="cpu", **QUIET).fit_loop
    loop.load_state_dict(loop.state_dict())
    assert loop._combined_loader_states_to_load == []
    assert isinstance(type(loop).restarting, property)
    for part in (loop, loop.epoch_loop, loop.epoch_loop.val_loop):
        assert part._loaded_from_state_dict is True
        assert part._resuming_from_checkpoint is True
    assert loop.epoch_loop.automatic_optimization.optim_progress is not None


def test_where_refusals_look():
    assert ParallelStrategy.__init__.__code__.co_names.count("_layer_sync") == 1
    assert TensorBoardLogger(".", log_graph=True)._log_graph


def test_a_checkpoint_callback_makes_its_links_by_a_method_of_its_own():
    assert list(inspect.signature(ModelCheckpoint._link_checkpoint).parameters) == ["trainer", "filepath", "linkpath"]
    assert "self._link_checkpoint(trainer, " in inspect.getsource(ModelCheckpoint._save_last_checkpoint)
    assert list(inspect.signature(ModelCheckpoint.file_exists).parameters) == ["self", "filepath", "trainer"]
    assert "self.file_exists(" in inspect.getsource(ModelCheckpoint._get_metric_interpolated_filepath_name)


class _Named(Profiler):
    def __init__(self) -> None:
        super().__init__()
        self.actions: list[str] = []

    def start(self, action_name: str) -> None:
        self.actions.append(action_name)

    def stop(self, action_name: str) -> None:
        pass


def test_hooks_are_told_to_the_profiler_and_know_whether_they_may_log():
    profiler = _Named()
    trainer = Trainer(profiler=profiler, callbacks=[LambdaCallback()], **QUIET)
    trainer.strategy._lightning_module = module = LightningModule()
    _call_callback_hooks(trainer, "on_train_epoch_end")
    _call_lightning_module_hook(trainer, "on_train_epoch_end")
    assert f"[Callback]{LambdaCallback().state_key}.on_train_epoch_end" in profiler.actions
    assert profiler.actions[-1] == f"[LightningModule]{type(module).__name__}.on_train_epoch_end"
    assert _FxValidator.functions["on_train_epoch_end"] is not None
    assert _FxValidator.functions["on_save_checkpoint"] is None


def test_loaders_get_their_samplers_by_one_method():
    assert list(inspect.signature(_DataConnector._resolve_sampler).parameters) == [
        "self",
        "dataloader",
        "shuffle",
        "mode",
    ]
    assert "dataloader" in inspect.signature(_DataConnector._requires_distributed_sampler).parameters
    assert "_batch_sampler" in vars(_IndexBatchSamplerWrapper(BatchSampler([1], 1, False)))

"""The private names of Lightning and torch that this package leans on: fails when a release changes them."""

import dataclasses
import inspect

import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.loops.fetchers import _PrefetchDataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.optimization.automatic import Closure, _AutomaticOptimization
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict


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
    assert {"fetched", "iterator"} <= vars(_PrefetchDataFetcher()).keys()
    assert callable(_FitLoop._load_combined_loader_states)
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

"""The private names of Lightning and torch that this package leans on: fails when a release changes them."""

import inspect

import torch.distributed as dist
from lightning.pytorch.loops.optimization.automatic import Closure, _AutomaticOptimization
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop


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


def test_the_default_store():
    assert callable(dist.distributed_c10d._get_default_store)

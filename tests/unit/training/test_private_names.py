"""The private names of torch and megatron-core that a training step needs: fails when a release changes them."""

import pytest
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, MultiStepLR, StepLR

from lightning_megatron.training import engine, resumed_settings


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(StepLR, {"step_size": 2}), (MultiStepLR, {"milestones": [1]}), (ExponentialLR, {"gamma": 0.5})]
    + [(CosineAnnealingLR, {"T_max": 5})],
)
def test_rates_of_torchs_schedulers_in_closed_form(kind, settings):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    scheduler = kind(optimizer, **settings)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    assert resumed_settings._rates(scheduler) == pytest.approx(scheduler.get_last_lr())
    resumed_settings._set_last_rates(scheduler, [0.25])
    assert scheduler.get_last_lr() == [0.25]


def test_buffers_that_are_not_saved_are_left_out():
    layer = torch.nn.Linear(1, 1)
    layer.register_buffer("kept", torch.zeros(1))
    layer.register_buffer("not_kept", torch.zeros(1), persistent=False)
    assert engine._kept_buffers(layer) == [(layer, "kept")]


def test_the_distributed_optimizer_knows_its_slices():
    assert callable(DistributedOptimizer._get_model_param_range_map)

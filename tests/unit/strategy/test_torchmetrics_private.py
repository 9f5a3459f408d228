"""The private names of torchmetrics that logging needs: fails when a release changes them."""

import torch
from torchmetrics import CatMetric, MaxMetric, SumMetric
from torchmetrics.utilities.data import dim_zero_cat, dim_zero_max, dim_zero_sum

from lightning_megatron.strategy.logging import torchmetrics_private


def _called(*values: float) -> SumMetric:
    metric = SumMetric()
    for value in values:
        metric(value)
    return metric


def test_the_value_on_the_last_batch():
    metric = _called(1.0, 2.0)
    assert torchmetrics_private.value_on_batch(metric) == 2.0
    torchmetrics_private.set_value_on_batch(metric, 5.0)
    assert torchmetrics_private.value_on_batch(metric) == 5.0
    metric.reset()
    assert torchmetrics_private.value_on_batch(metric) is None


def test_the_number_of_updates():
    metric = _called(1.0)
    torchmetrics_private.set_update_count(metric, 3)
    assert metric.update_count == 3


def test_a_result_is_computed_again():
    metric = _called(1.0)
    assert metric.compute() == 1.0
    metric.merge_state({"sum_value": torch.tensor(2.0)})
    assert metric.compute() == 1.0
    torchmetrics_private.forget_computed(metric)
    assert metric.compute() == 3.0


def test_copied_states_can_be_merged():
    metric = _called(1.0)
    states = torchmetrics_private.copy_of_states(metric)
    metric.reset()
    metric.update(2.0)
    metric.merge_state(states)
    assert metric.compute() == 3.0


def test_reductions_of_states():
    found = [torchmetrics_private.reductions(metric) for metric in (SumMetric(), MaxMetric(), CatMetric())]
    assert found == [[dim_zero_sum], [dim_zero_max], [dim_zero_cat]]


def test_a_snapshot_holds_all_that_calls_change():
    metric = _called(1.0)
    metric.compute()
    before, taken = dict(vars(metric)), torchmetrics_private.snapshot(metric)
    metric(2.0)
    metric.compute()
    changed = {name for name, value in vars(metric).items() if value is not before[name]}
    assert changed == set(taken) == {"sum_value", "_update_count", "_computed", "_forward_cache"}
    torchmetrics_private.restore(metric, taken)
    assert (metric.compute(), metric.update_count, torchmetrics_private.value_on_batch(metric)) == (1.0, 1, 1.0)

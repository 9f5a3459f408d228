"""Synchronises torchmetrics objects of a module over the replicas, and gives every pipeline stage their states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning_utilities.core.apply_func import apply_to_collection
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities.data import dim_zero_cat, dim_zero_max, dim_zero_min, dim_zero_sum
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_megatron.distributed import collectives, process_groups
from lightning_megatron.strategy.dataloading.rank_consistency import checksum
from lightning_megatron.strategy.logging import torchmetrics_private


def metrics_to_sync(module: pl.LightningModule) -> list[Metric]:
    """The module's metrics that are reduced over data-parallel ranks; model-parallel ranks see the same samples.

    Metrics with a ``process_group`` or ``dist_sync_fn`` of their own keep it, and are not among them.
    """
    return [metric for metric in _metrics(module) if metric.process_group is None and metric.dist_sync_fn is None]


def gather(metric: Metric, tensor: torch.Tensor, group: Any | None = None) -> list[torch.Tensor]:
    """Gather a metric's state from the last pipeline stage of each replica: a ``dist_sync_fn`` of torchmetrics.

    Under context parallelism, the ranks that share each row's tokens have either seen whole rows (what ``predict_step``
    returns, or a hook's outputs): then all of them have the same states, of which one counts. Or each has seen its part
    of the rows (a loss in a step): then all of them count.

    It looks its process groups up when it is called, so that metrics can be copied and pickled.

    Args:
        metric: The metric; the partial function that is its ``dist_sync_fn`` has it.
        tensor: One of its states.
        group: The group that the metric was given, if any.
    """
    states = gather_all_tensors(tensor, group or process_groups.data_parallel())
    if group is None and _have_seen_whole_rows(metric):
        states = states[:: process_groups.context_parallel().size()]
    return states if group or _stages_agree else collectives.broadcast_object_from_last_stage(states)


def _have_seen_whole_rows(metric: Metric) -> bool:
    """Whether the ranks that share rows have the same states, in every replica."""
    sharing = process_groups.context_parallel().size()
    if sharing == 1:
        return False
    sums = collectives.gather(checksum(metric.metric_state), process_groups.data_parallel())
    return all(len(set(sums[first : first + sharing])) == 1 for first in range(0, len(sums), sharing))


_stages_agree = False  # whether every stage has the last stage's states, so that a stage may compute alone


@contextmanager
def same_on_all_stages(module: pl.LightningModule, counts: list[int]) -> Iterator[None]:
    """Give every pipeline stage the last stage's states; inside, a stage may compute a metric that the others do not.

    Args:
        module: The module that holds the metrics.
        counts: The number of updates of each metric when this context was last left; updated here. States that no stage
            has changed since are not sent again.
    """
    global _stages_agree
    found = _metrics(module) if process_groups.pipeline().size() > 1 else []
    if found:
        now = [metric.update_count for metric in found]
        changed = torch.tensor(int(counts != now), device=found[0].device)
        dist.all_reduce(changed, op=dist.ReduceOp.MAX, group=process_groups.pipeline())
        if changed:
            for metric, states in zip(found, collectives.broadcast_object_from_last_stage(_states(found)), strict=True):
                here = apply_to_collection(states, torch.Tensor, torch.Tensor.to, metric.device)
                torchmetrics_private.restore(metric, here)
    _stages_agree = bool(found)
    try:
        yield
    finally:
        _stages_agree = False
        counts[:] = [metric.update_count for metric in found]


def _states(found: list[Metric]) -> list[dict[str, Any]]:
    taken = [torchmetrics_private.snapshot(metric) for metric in found]
    return apply_to_collection(taken, torch.Tensor, torch.Tensor.cpu)


def attribute_of(module: pl.LightningModule, metric: torch.nn.Module) -> str:
    """The name by which ``module`` holds ``metric``.

    Raises:
        ValueError: The metric is no attribute of the module.
    """
    for name, child in module.named_modules():
        if child is metric:
            return name
    raise ValueError(
        f"self.log was given a {type(metric).__name__} that is no attribute of {type(module).__name__}. Make it one in"
        " __init__ (self.accuracy = ...), so that Lightning can reset it."
    )


class BatchStates:
    """Keeps the states of a module's metrics over one batch apart from what they held before.

    While micro-batches run, metrics whose states can be merged hold the states of this batch only; ``finish`` takes
    their value on the batch, and merges the earlier states in. Other metrics are left alone: those with
    ``full_state_update``, and those in a collection that shares states.

    Args:
        module: The module that holds the metrics.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self._before: dict[int, tuple[Metric, dict[str, Any], int]] = {}
        shared = {id(m) for c in module.modules() if isinstance(c, MetricCollection) for m in c.modules()}
        for metric in _metrics(module):
            if id(metric) not in shared and _is_mergeable(metric):
                states = torchmetrics_private.copy_of_states(metric)
                self._before[id(metric)] = (metric, states, metric.update_count)
                metric.reset()

    def finish(self, metric: Metric, fallback: Any, *, shown: bool) -> None:
        """Merge the states that ``metric`` held before the batch with the batch's, and set its value on the batch.

        Args:
            metric: The metric, which may have been updated on the last pipeline stage only.
            fallback: The value on the batch, for a metric whose states cannot be merged.
            shown: Whether the value on the batch is logged; all ranks give the same answer, since replicas are synced.
        """
        value = fallback
        if shown and id(metric) in self._before:
            torchmetrics_private.set_update_count(metric, max(metric.update_count, 1))
            value = metric.compute()
        self._merge(metric)
        torchmetrics_private.set_update_count(metric, max(metric.update_count, 1))
        torchmetrics_private.forget_computed(metric)
        torchmetrics_private.set_value_on_batch(metric, value)

    def finish_all(self) -> None:
        """Merge the metrics that were updated but not logged."""
        for metric, _, _ in list(self._before.values()):
            self._merge(metric)

    def _merge(self, metric: Metric) -> None:
        _, states, updates = self._before.pop(id(metric), (None, None, 0))
        if states is not None:
            torchmetrics_private.set_update_count(metric, metric.update_count + updates)
            metric.merge_state(states)


def _is_mergeable(metric: Metric) -> bool:
    """Whether states are sums, extremes or lists, which do not depend on the number of updates."""
    simple = (dim_zero_sum, dim_zero_max, dim_zero_min, dim_zero_cat)
    return metric.full_state_update is False and all(r in simple for r in torchmetrics_private.reductions(metric))


@contextmanager
def untouched(module: pl.LightningModule) -> Iterator[None]:
    """Undo, at the end, all changes of the module's metrics inside the context."""
    before = [(metric, torchmetrics_private.snapshot(metric)) for metric in _metrics(module)]
    try:
        yield
    finally:
        for metric, taken in before:
            torchmetrics_private.restore(metric, taken)


def _metrics(module: pl.LightningModule) -> list[Metric]:
    return [child for child in module.modules() if isinstance(child, Metric)]

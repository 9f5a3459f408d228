"""torchmetrics objects of a module: states summed over the data-parallel replicas, and known on every stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_megatron import groups


def sync_over_replicas(module: pl.LightningModule) -> None:
    """Have the module's metrics sync over data-parallel ranks: model-parallel ranks see the same samples.

    A metric that has a ``process_group`` or ``dist_sync_fn`` of its own keeps it.
    """
    for metric in _metrics(module):
        if metric.process_group is None and metric.dist_sync_fn is None:
            metric.dist_sync_fn = gather


def gather(tensor: torch.Tensor, group: Any | None = None) -> list[torch.Tensor]:
    """A metric's state on each replica, as the last pipeline stage has it: a ``dist_sync_fn`` of torchmetrics.

    A module-level function that looks its groups up when called, so that metrics can be copied and pickled.
    """
    states = gather_all_tensors(tensor, group or groups.data_parallel())
    return states if group else groups.broadcast_object_from_last_stage(states)


def attribute_of(module: pl.LightningModule, metric: torch.nn.Module) -> str:
    """The name by which ``module`` holds ``metric``.

    Raises:
        ValueError: It does not.
    """
    for name, child in module.named_modules():
        if child is metric:
            return name
    raise ValueError(
        f"self.log was given a {type(metric).__name__} that is no attribute of {type(module).__name__}. Make it one in"
        " __init__ (self.accuracy = ...), so that Lightning can reset it."
    )


def mark_updated(metric: Any, batch_value: Any) -> None:
    """Tell a metric that was updated on the last stage only that it was, and what it was on the whole batch."""
    if isinstance(metric, Metric):
        metric._update_count = max(metric._update_count, 1)
        metric._computed = None
        metric._forward_cache = batch_value


@contextmanager
def untouched(module: pl.LightningModule) -> Iterator[None]:
    """Undo what is done to the module's metrics inside."""
    before = [(metric, _snapshot(metric)) for metric in _metrics(module)]
    try:
        yield
    finally:
        for metric, attributes in before:
            for name, value in attributes.items():
                setattr(metric, name, value)


def _metrics(module: pl.LightningModule) -> list[Metric]:
    return [child for child in module.modules() if isinstance(child, Metric)]


def _snapshot(metric: Metric) -> dict[str, Any]:
    names = [*metric._defaults, "_update_count", "_computed", "_forward_cache"]
    values = {name: getattr(metric, name) for name in names}
    return {name: _copy(value) for name, value in values.items()}


def _copy(value: Any) -> Any:
    if isinstance(value, list):
        return list(value)
    return value.detach().clone() if isinstance(value, torch.Tensor) else value

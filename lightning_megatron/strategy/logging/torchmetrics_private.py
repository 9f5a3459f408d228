"""The private names of torchmetrics 1.9 that logging needs, a function each.

``tests/unit/strategy/test_torchmetrics_private.py`` fails when one of them changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torchmetrics import Metric

_BESIDE_STATES = ("_update_count", "_computed", "_forward_cache")  # what a metric changes in itself beside its states


def value_on_batch(metric: Metric) -> Any:
    """The value on the batch with which the metric was last called; Lightning logs it at each step."""
    return metric._forward_cache


def set_value_on_batch(metric: Metric, value: Any) -> None:
    """Set the value on the last batch; None for a metric that was not called."""
    metric._forward_cache = value


def set_update_count(metric: Metric, count: int) -> None:
    """Set ``metric.update_count``; torchmetrics and Lightning warn of a metric that is computed while it is 0."""
    metric._update_count = count


def forget_computed(metric: Metric) -> None:
    """Have ``metric.compute()`` compute from the states again, in place of returning its last result."""
    metric._computed = None


def copy_of_states(metric: Metric) -> dict[str, Any]:
    """Copies of the states, without gradients, in the form that ``metric.merge_state`` takes."""
    return metric._copy_state_dict()


def reductions(metric: Metric) -> list[Any]:
    """The ``dist_reduce_fx`` of each state, as the function that torchmetrics calls."""
    return list(metric._reductions.values())


def snapshot(metric: Metric) -> dict[str, Any]:
    """Copies of everything that an update, a call or ``compute`` changes in the metric, by attribute."""
    beside = {name: getattr(metric, name) for name in _BESIDE_STATES}
    return {name: _copy(value) for name, value in {**metric.metric_state, **beside}.items()}


def restore(metric: Metric, taken: Mapping[str, Any]) -> None:
    """Put a snapshot back into the metric that it was taken of, or into the same metric of another rank."""
    for name, value in taken.items():
        setattr(metric, name, value)


def _copy(value: Any) -> Any:
    if isinstance(value, list):
        return list(value)
    return value.detach().clone() if isinstance(value, torch.Tensor) else value

"""``self.log`` inside a micro-batch: recorded, reduced over the micro-batches, then logged once on every rank."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torchmetrics import Metric, MetricCollection

from lightning_megatron import groups, metrics

_SIGNATURE = inspect.signature(pl.LightningModule.log)


@dataclass
class _Entry:
    """What one name was given, micro-batch by micro-batch.

    Args:
        chunk: The virtual stage that logged it.
        values: Numbers, or of a metric its values on each micro-batch.
        weights: Of each value.
        options: Of ``self.log``.
        metric: The attribute that holds the logged metric, if it is one.
    """

    chunk: int
    options: dict[str, Any]
    metric: str | None = None
    values: list[Any] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)


class LogRecorder:
    """Stands in for ``module.log`` while a schedule runs."""

    def __init__(self, module: pl.LightningModule) -> None:
        self._module = module
        self._seen: dict[str, _Entry] = {}

    @contextmanager
    def listening(self, share: float, chunk: int) -> Iterator[None]:
        """Record instead of logging.

        Args:
            share: Of the batch's rows that the micro-batch holds; 0 for a ghost, which leaves no trace.
            chunk: The virtual stage that runs it.
        """

        def record(*args: Any, **options: Any) -> None:
            given = _SIGNATURE.bind(self._module, *args, **options).arguments
            given.pop("self")
            self._record(given.pop("name"), given.pop("value"), share, chunk, given)

        self._module.__dict__["log"] = record if share else lambda *_, **__: None
        try:
            if share:
                yield
            else:
                with metrics.untouched(self._module):
                    yield
        finally:
            del self._module.__dict__["log"]

    def replay(self) -> None:
        """Log each name once, the same names in the same order on every rank, as the latest stage gave it."""
        module = self._module
        for name, entry in _latest(groups.gather_from_stages(self._seen)).items():
            options = dict(entry.options)
            if options.get("batch_size") is not None:
                options["batch_size"] = sum(entry.weights)
            if entry.metric is None:
                module.log(name, _reduce(entry.values, entry.weights, options.get("reduce_fx", "mean")), **options)
            else:
                metric: Any = module.get_submodule(entry.metric)
                cached = [value for value in entry.values if value is not None]
                metrics.mark_updated(metric, _reduce(cached, entry.weights, "mean") if cached else None)
                module.log(name, metric, **{**options, "metric_attribute": entry.metric})

    def _record(self, name: str, value: Any, share: float, chunk: int, options: dict[str, Any]) -> None:
        entry = self._seen.get(name)
        if entry is None or entry.chunk < chunk:
            entry = self._seen[name] = _Entry(chunk, options)
        if isinstance(value, Metric | MetricCollection):
            entry.metric = metrics.attribute_of(self._module, value)
            value = getattr(value, "_forward_cache", None)
        elif isinstance(value, torch.Tensor):
            value = value.detach()
        entry.values.append(value)
        entry.weights.append(options.get("batch_size") or share)


def _latest(stages: list[dict[str, _Entry]]) -> dict[str, _Entry]:
    """Of entries that several stages made under one name, that nearest the model's end."""
    found: dict[str, _Entry] = {}
    for seen in stages:
        for name, entry in seen.items():
            if name not in found or entry.chunk >= found[name].chunk:
                found[name] = entry
    return found


def _reduce(values: list[Any], weights: list[float], reduce_fx: Any) -> Any:
    """One value of the micro-batches' values, as ``self.log(reduce_fx=)`` asks; a mean is weighted."""
    if len(values) == 1 or not all(isinstance(value, int | float | torch.Tensor) for value in values):
        return values[-1]  # Lightning says what it thinks of other types
    several = torch.stack([torch.as_tensor(value, dtype=torch.float32).squeeze() for value in values])
    if reduce_fx in ("mean", "avg", torch.mean):
        shares = torch.tensor(weights[: len(values)], dtype=several.dtype, device=several.device)
        return (several * shares).sum() / shares.sum()
    return getattr(torch, reduce_fx)(several) if isinstance(reduce_fx, str) else reduce_fx(several)

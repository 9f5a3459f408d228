"""Records what micro-batches log (``self.log``), reduces it over them and the replicas, and logs it on every rank.

Under context parallelism a step has a part of each row, so the ranks that share the rows are reduced over, too: a mean
is weighed by what ``batch_size`` says, and a sum adds the parts.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import WarningCache
from torchmetrics import Metric

from lightning_megatron.distributed import collectives, process_groups
from lightning_megatron.models.megatron_module import MegatronModule
from lightning_megatron.strategy.logging import torchmetrics_private, torchmetrics_sync
from lightning_megatron.strategy.logging.user_state import taken_back

_SIGNATURE = inspect.signature(pl.LightningModule.log)
_warnings = WarningCache()


@dataclass
class _Entry:
    """The values that the micro-batches of a batch have logged under one name.

    Args:
        chunk: The virtual stage that logged them.
        options: The other arguments of ``self.log``.
        metric: The name of the module's attribute that holds the logged metric; None for numbers.
        values: The number, or the metric's value, of each micro-batch.
        weights: The weight of each value: ``batch_size`` where it was given, otherwise the micro-batch's rows.
    """

    chunk: int
    options: dict[str, Any]
    metric: str | None = None
    values: list[Any] = field(default_factory=list)
    weights: list[float | torch.Tensor] = field(default_factory=list)


class NullRecorder:
    """Records nothing: where a batch is one micro-batch of a plain module, ``self.log`` logs by itself."""

    def listening(self, share: float, chunk: int) -> AbstractContextManager[None]:
        """Do nothing."""
        return nullcontext()

    def has_entries(self) -> bool:
        """Return False: nothing is recorded."""
        return False

    def replay(self, gather: bool = True) -> None:
        """Do nothing: everything has been logged."""

    def end_prediction(self) -> None:
        """Do nothing."""


class LogRecorder:
    """Stands in for ``module.log`` while one batch runs.

    Args:
        module: The module whose ``log`` is replaced.
        rows: The number of rows of the batch on this rank.
    """

    def __init__(self, module: pl.LightningModule, rows: int) -> None:
        self._module = module
        self._rows = rows
        self._seen: dict[str, _Entry] = {}
        self._states = torchmetrics_sync.BatchStates(module)

    @contextmanager
    def listening(self, share: float, chunk: int) -> Iterator[None]:
        """Record what is logged inside, in place of logging it.

        Args:
            share: The micro-batch's share of the batch's rows; 0 for a padding micro-batch, whose values are dropped.
            chunk: The virtual stage that runs it.
        """

        def record(*args: Any, **options: Any) -> None:
            given = _SIGNATURE.bind(self._module, *args, **options).arguments
            given.pop("self")
            self._record(given.pop("name"), given.pop("value"), share * self._rows, chunk, given)

        before = self._module.__dict__.get("log")
        self._module.__dict__["log"] = record if share else lambda *_, **__: None
        try:
            if share:
                yield
            else:
                with torchmetrics_sync.untouched(self._module), taken_back([self._module]):
                    yield
        finally:
            del self._module.__dict__["log"]
            if before is not None:
                self._module.__dict__["log"] = before

    def has_entries(self) -> bool:
        """Whether this rank has recorded anything."""
        return bool(self._seen)

    def replay(self, gather: bool = True) -> None:
        """Log each name once: the same names in the same order on every rank, with the last stage's values.

        A MegatronModule's values are those of the global batch. A plain module's are this replica's, as in Lightning,
        and ``sync_dist`` decides whether replicas are reduced.

        Args:
            gather: Whether any rank has recorded something; all ranks give the same answer.
        """
        module = self._module
        whole = isinstance(module, MegatronModule)
        stages: list[dict[str, _Entry]] = []
        if gather:
            stages = _over_ranks(self._seen) if whole else collectives.gather_from_stages(self._seen)
        for name, entry in _latest(stages).items():
            options = dict(entry.options)
            if entry.metric is not None:
                metric: Any = module.get_submodule(entry.metric)
                fallback = reduce_values(entry.values, entry.weights, "mean")
                shown = options.get("on_step", module.trainer.training) is not False
                self._states.finish(metric, fallback, shown=shown)
                module.log(name, metric, **{**options, "metric_attribute": entry.metric})
                continue
            if whole:
                options.update(batch_size=sum(entry.weights), sync_dist=True, sync_dist_group=process_groups.REDUCED)
            elif options.get("batch_size") is not None:
                options["batch_size"] = sum(entry.weights)
            value = reduce_values(entry.values, entry.weights, options.get("reduce_fx", "mean"))
            module.log(name, value.float() if whole and isinstance(value, torch.Tensor) else value, **options)
        self._states.finish_all()

    def end_prediction(self) -> None:
        """Have Lightning refuse what ``predict_step`` logged; no collectives, as replicas may have unequal batches."""
        for name, entry in self._seen.items():
            self._module.log(name, entry.values[-1])
        self._states.finish_all()

    def _record(self, name: str, value: Any, rows: float, chunk: int, options: dict[str, Any]) -> None:
        entry = self._seen.get(name)
        if entry is None or entry.chunk < chunk:
            entry = self._seen[name] = _Entry(chunk, options)
        if isinstance(value, Metric):
            entry.metric = torchmetrics_sync.attribute_of(self._module, value)
            value = torchmetrics_private.value_on_batch(value)
        weight = options.get("batch_size")
        entry.values.append(value.detach() if isinstance(value, torch.Tensor) else value)
        weight = rows if weight is None else weight
        entry.weights.append(weight.detach() if isinstance(weight, torch.Tensor) else float(weight))


def _over_ranks(seen: dict[str, _Entry]) -> list[dict[str, _Entry]]:
    """What each stage recorded, over all data; where this rank has all of it, its values stay on the device."""
    if process_groups.data_parallel().size() * process_groups.pipeline().size() == 1:
        return [seen]
    return collectives.gather_from_stages(_over_data(seen))


def _over_data(seen: dict[str, _Entry]) -> dict[str, _Entry]:
    """Join what all replicas, and all parts of rows, recorded on this stage, also under names that only some logged."""
    joined: dict[str, _Entry] = {}
    here = {name: _on_the_host(entry) for name, entry in seen.items()}
    every = collectives.gather(here, process_groups.data_parallel())
    _warn_of_sums(every[: process_groups.context_parallel().size()])
    for rank in every:
        for name, entry in rank.items():
            if name not in joined:
                joined[name] = entry
            else:
                joined[name].values += entry.values
                joined[name].weights += entry.weights
    return joined


def _warn_of_sums(parts: list[dict[str, _Entry]]) -> None:
    """Warn of a sum of equal numbers: what each of the ranks that share rows has counted may be of the whole rows."""
    for name, first in parts[0].items() if len(parts) > 1 else ():
        numbers = [value for value in first.values if isinstance(value, int | float)]
        if first.options.get("reduce_fx") not in ("sum", torch.sum) or not any(numbers):
            continue
        if all(name in part and part[name].values == numbers for part in parts):
            _warnings.warn(
                f"self.log({name!r}, reduce_fx='sum') in a step with cp={len(parts)}: the ranks that share each row"
                f" have logged the same number, {numbers[-1]}, and their sum is logged. A step has a part of each row's"
                " tokens. If the number is of whole rows, log it in on_train_batch_end (on_validation_batch_end)."
            )


def _on_the_host(entry: _Entry) -> _Entry:
    values = [v.item() if isinstance(v, torch.Tensor) and v.numel() == 1 else v for v in entry.values]
    return replace(entry, values=values, weights=[float(weight) for weight in entry.weights])


def _latest(stages: list[dict[str, _Entry]]) -> dict[str, _Entry]:
    """Return for each name the entry of the last stage that has logged it."""
    found: dict[str, _Entry] = {}
    for seen in stages:
        for name, entry in seen.items():
            if name not in found or entry.chunk >= found[name].chunk:
                found[name] = entry
    return found


def reduce_values(values: list[Any], weights: Sequence[float | torch.Tensor], reduce_fx: Any) -> Any:
    """Reduce the values of micro-batches to one, as ``self.log(reduce_fx=)`` asks; a mean is weighted."""
    if len(values) == 1 or not all(isinstance(value, int | float | torch.Tensor) for value in values):
        return values[-1]  # Lightning refuses values of other types with a message of its own
    device = next((value.device for value in values if isinstance(value, torch.Tensor)), torch.device("cpu"))
    several = _stacked(values, device)
    if reduce_fx in ("mean", "avg", torch.mean):
        shares = _stacked(weights, device)
        return ((several * shares).sum() / shares.sum()).float()
    return (getattr(torch, reduce_fx)(several) if isinstance(reduce_fx, str) else reduce_fx(several)).float()


def _stacked(values: Sequence[float | torch.Tensor], device: torch.device) -> torch.Tensor:
    """Scalars as a vector on the device; numbers are filled in there, as a copy from the host would wait for it."""

    def scalar(value: float | torch.Tensor) -> torch.Tensor:
        if isinstance(value, torch.Tensor):
            return value.to(device, torch.float64).squeeze()
        return torch.full((), value, dtype=torch.float64, device=device)

    return torch.stack([scalar(value) for value in values])

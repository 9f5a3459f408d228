"""Records what micro-batches log (``self.log``), reduces it over them and the replicas, and logs it on every rank.

Under context parallelism, what all ranks that share rows have logged alike is of whole rows (of the batch, or of what
``predict_step`` gives), and counts once. What differs is of their parts of the rows (of a loss, of its tokens), and is
reduced over them, too: a mean is weighed by what ``batch_size`` says, and a sum adds the parts.
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
    sharing = process_groups.context_parallel().size()
    whole = _of_whole_rows(every, sharing)
    for number, rank in enumerate(every):
        for name, entry in rank.items():
            if number % sharing and name in whole:
                continue
            if name not in joined:
                joined[name] = entry
            else:
                joined[name].values += entry.values
                joined[name].weights += entry.weights
    return joined


def _of_whole_rows(every: list[dict[str, _Entry]], sharing: int) -> set[str]:
    """The names under which the ranks that share rows, ``sharing`` in turn, have logged the same in each replica."""
    if sharing == 1:
        return set()
    whole = set()
    for name in {name for rank in every for name in rank}:
        seen = [repr((rank[name].values, rank[name].weights)) if name in rank else "" for rank in every]
        if all(len(set(seen[first : first + sharing])) == 1 for first in range(0, len(seen), sharing)):
            whole.add(name)
            _warn_of_sum(name, every[0].get(name))
    return whole


def _warn_of_sum(name: str, entry: _Entry | None) -> None:
    """Warn of equal numbers whose sum is logged: they may as well be counts of the ranks' own tokens."""
    if entry is not None and entry.options.get("reduce_fx") in ("sum", torch.sum) and any(_numbers(entry)):
        _warnings.warn(
            f"self.log({name!r}, reduce_fx='sum') in a step: the ranks that share each row (cp) have logged the same"
            f" number, {_numbers(entry)[-1]}, which is taken for that of whole rows, and counts once. If it counts the"
            " tokens of one rank, add them up before it is logged: sum_over_parts_of_rows of"
            " lightning_megatron.distributed.collectives."
        )


def _numbers(entry: _Entry) -> list[int | float]:
    return [value for value in entry.values if isinstance(value, int | float)]


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
